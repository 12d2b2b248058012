//! The first step of `cargo dev`: it checks the requirements before minutes of compiling, and then becomes
//! `cargo run --bin devstack`.

use std::{
    env,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

#[expect(clippy::print_stderr, reason = "this program says what is missing")]
fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    // Only `cargo dev` without a subcommand, which runs the whole system, uses the usual ports.
    let usual_ports = arguments.iter().all(|argument| argument == "--logs");
    let checked = check_rust().and_then(|()| check_compiler());
    if let Err(error) = checked.and_then(|()| if usual_ports { dev::check_ports() } else { Ok(()) }) {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }

    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The variables that cargo sets for this package would make cargo rebuild some dependencies.
    for (variable, _) in env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_"]
            .iter()
            .any(|prefix| variable.to_string_lossy().starts_with(prefix))
        {
            cargo.env_remove(variable);
        }
    }
    let error = cargo.args(["run", "--bin", "devstack", "--"]).args(arguments).exec();
    eprintln!("error: starting cargo: {error}");
    ExitCode::FAILURE
}

/// Checks that the compiler is at least as new as the workspace demands.
fn check_rust() -> Result<(), String> {
    let needed = env!("CARGO_PKG_RUST_VERSION");
    let version = said_by(env::var("RUSTC").as_deref().unwrap_or("rustc"))?;
    let found = version.split(' ').nth(1).unwrap_or_default();
    let numbers =
        |version: &str| version.split('.').take(2).map(|n| n.parse().unwrap_or(0)).collect::<Vec<u32>>();
    match numbers(found) >= numbers(needed) {
        true => Ok(()),
        false => Err(format!("Rust {needed} is needed, and this is {found}: run `rustup update stable`")),
    }
}

/// Checks that there is a C compiler, which SQLite, ring and zstd need.
fn check_compiler() -> Result<(), String> {
    let install =
        if cfg!(target_os = "macos") { "xcode-select --install" } else { "sudo apt install build-essential" };
    let found = said_by(env::var("CC").as_deref().unwrap_or("cc"));
    found
        .map(drop)
        .map_err(|error| format!("a C compiler is needed: {error}; install one, for example by `{install}`"))
}

/// Returns what `program --version` prints.
fn said_by(program: &str) -> Result<String, String> {
    // `CC` may contain arguments.
    let mut words = program.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default()).args(words).arg("--version").output();
    match output {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(format!("`{program} --version` failed ({})", output.status)),
        Err(error) => Err(format!("`{program}` can't be run ({error})")),
    }
}
