//! Tells the crate the version of the compiler, for `process.runtime.version`.

use std::{env, process::Command};

fn main() {
    let rustc = env::var_os("RUSTC").expect("cargo sets it");
    let output = Command::new(rustc).arg("--version").output().expect("rustc runs");
    let version = String::from_utf8_lossy(&output.stdout);
    // For example `rustc 1.95.0 (f7bc97a31 2026-04-14)`.
    let version = version.split(' ').nth(1).unwrap_or_default();
    println!("cargo::rustc-env=RUSTC_VERSION={version}");
    println!("cargo::rerun-if-changed=build.rs");
}
