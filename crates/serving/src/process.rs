//! Runs the process of a service: starts telemetry, runs the service, ends telemetry, and chooses the exit
//! code.

use crate::shutdown::{Options, Shutdown};
use std::process::ExitCode;

/// Runs `service` between the start and the end of telemetry.
///
/// The exit code is 0 after a stop signal, 1 if the service failed, and 2 if an `OTEL_*` variable can't be
/// used. `name` and `version` describe the process in its telemetry.
#[expect(clippy::print_stderr, reason = "without a valid configuration there is no log yet")]
pub async fn run(
    name: &'static str,
    version: &'static str,
    options: Options,
    service: impl AsyncFnOnce(&Shutdown) -> anyhow::Result<()>,
) -> ExitCode {
    let shutdown = match Shutdown::on_signal(options) {
        Ok(shutdown) => shutdown,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let configured = telemetry::Config::from_env(name, version);
    let telemetry = match configured.and_then(telemetry::Telemetry::start) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };

    let result = service(&shutdown).await;
    if let Err(error) = &result {
        tracing::error!("{}", telemetry::causes(&**error));
    }
    // Telemetry is shut down after a failure too, because the last spans matter most.
    telemetry.shut_down(shutdown.time_left()).await;
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a probe of the running service. If the service is healthy, prints `SERVING` and returns exit code 0.
/// Otherwise returns 1, as Docker's health checks expect.
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a probe has no log")]
pub async fn health(probe: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
    match probe.await {
        Ok(()) => {
            println!("SERVING");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("unhealthy: {error:#}");
            ExitCode::FAILURE
        }
    }
}
