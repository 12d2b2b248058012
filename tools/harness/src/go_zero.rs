//! The three services in Go, on the framework go-zero (`tools/peers/go-zero`). Each service in Go takes the
//! same variables as the service in Rust that it replaces.

use crate::{
    PATIENCE, free_port, poll,
    process::{self, Process},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};
use tokio::net::TcpStream;

/// Returns whether Go and the modules are available. If not, prints a line on standard error that says what
/// is not checked. The line appears even if the test's output is captured.
pub fn is_available() -> bool {
    let download = go(&["mod", "download"]).stdin(Stdio::null()).output();
    let why = match download {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    let _ =
        writeln!(io::stderr(), "NOT CHECKED: the services in Go, because `go mod download` failed: {why}");
    false
}

/// Starts the service in Go that replaces the service `name` in Rust, on a free port. `variables` are the
/// variables of the service in Rust. In addition, `CONFIRMS=false` makes api publish without confirms, as the
/// original does, and `TRACING_DISABLED=true` makes api publish without a trace context. Returns once the
/// service listens or, if it is mq, consumes.
///
/// # Errors
/// If the services can't be built, or if this service doesn't start; the error contains its output.
pub async fn start(name: &'static str, variables: &[(&str, &str)]) -> Result<Process> {
    let of = |name: &str| variables.iter().rfind(|(of, _)| *of == name).map_or("", |(_, value)| value);
    let or = |name: &str, default| Some(of(name)).filter(|value| !value.is_empty()).unwrap_or(default);
    let after_scheme = |name: &str| of(name).rsplit("://").next().unwrap_or_default();
    let server = amqp::connection::parse_url(of("AMQP_URL")).map_err(anyhow::Error::msg)?;
    let broker = &server.uri().authority;
    // The virtual host is escaped, because the services in Go put it into a URL.
    let vhost = server.uri().vhost.replace('/', "%2f");
    let (broker_port, port) = (broker.port.to_string(), free_port()?);
    let (listen, port_text) = (format!("127.0.0.1:{port}"), port.to_string());
    let database = after_scheme("MQ_DATABASE_URL");
    if let Some(directory) = Path::new(database).parent() {
        fs::create_dir_all(directory)?;
    }
    let file = module().join(name).join("etc").join(if name == "rpc" { "usercenter" } else { name });
    let mut command = Process::isolated(binaries()?.join(name), variables);
    command.arg("-f").arg(file.with_extension("yaml")).envs([
        ("AMQP_HOST", broker.host.as_str()),
        ("AMQP_PORT", &broker_port),
        ("AMQP_VHOST", &vhost),
        ("API_PORT", &port_text),
        ("USERCENTER_LISTEN", &listen),
        ("USERCENTER", after_scheme("USERCENTER_URL")),
        ("COLLECTOR", after_scheme("OTEL_EXPORTER_OTLP_ENDPOINT")),
        ("MQ_DATABASE", database),
        ("CONFIRMS", or("CONFIRMS", "true")),
        ("TRACING_DISABLED", or("TRACING_DISABLED", "false")),
    ]);
    let mut process = Process::spawn(name, listen.parse()?, command)?;
    let started = poll(PATIENCE, async || {
        let is_up = match name {
            "mq" => process.output().contains("consuming"),
            _ => TcpStream::connect(&listen).await.is_ok(),
        };
        process.exited().map(Err).or_else(|| is_up.then_some(Ok(())))
    });
    match started.await {
        Some(Ok(())) => Ok(process),
        Some(Err(exit)) => {
            process.exit().await?;
            bail!("{name} in Go ended ({exit}):\n{}", process.output())
        }
        None => bail!("{name} in Go does not start:\n{}", process.output()),
    }
}

/// Returns the directory of the binaries. The first call builds them.
///
/// # Errors
/// If the services can't be built.
pub fn binaries() -> Result<&'static Path> {
    static BINARIES: OnceLock<Result<PathBuf, String>> = OnceLock::new();

    let build = || -> Result<PathBuf> {
        // The binaries in Go are in a directory beside the directories in which cargo puts the services.
        let target = process::binary("api")?;
        let target = target.ancestors().nth(2).context("the target directory")?.join("go-zero");
        fs::create_dir_all(&target)?;
        let build = go(&["build", "-o"]).arg(&target).args(["./api", "./rpc", "./mq"]).output()?;
        ensure!(build.status.success(), "go build: {}", String::from_utf8_lossy(&build.stderr));
        Ok(target)
    };
    let binaries = BINARIES.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    binaries.as_deref().map_err(|error| anyhow::anyhow!(error.clone()))
}

fn go(arguments: &[&str]) -> Command {
    let mut go = Command::new("go");
    go.args(arguments).current_dir(module());
    go
}

fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../peers/go-zero")
}
