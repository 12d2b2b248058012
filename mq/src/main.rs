//! Starts the consumer: reads the configuration, starts telemetry, runs the service, and shuts telemetry
//! down.

use anyhow::Context;
use mq::config::{Command, Config};
use serving::{listener::bind, shutdown::Shutdown};
use std::process::ExitCode;
use tokio::select;

// The service runs on one thread; see docs/decisions/0004-one-thread.md.
#[tokio::main(flavor = "current_thread")]
#[expect(clippy::print_stderr, reason = "without a valid configuration there is no log yet")]
async fn main() -> ExitCode {
    let config = Config::load();
    if let Some(Command::Health) = &config.command {
        return match proto::health::probe(config.listen).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("unhealthy: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let shutdown = match Shutdown::on_signal(config.shutdown) {
        Ok(shutdown) => shutdown,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let configured = telemetry::Config::from_env("mq", env!("CARGO_PKG_VERSION"));
    let telemetry = match configured.and_then(telemetry::Telemetry::start) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };

    let result = match &config.command {
        Some(Command::DeadLetters(command)) => select! {
            done = mq::dead_letters::run(&config, command) => done,
            _ = shutdown.begun() => Err(anyhow::anyhow!("interrupted")),
        },
        Some(Command::Health) | None => consume(&config, &shutdown).await,
    };
    if let Err(error) = &result {
        tracing::error!("{error:#}");
    }
    // Telemetry is shut down even after a failure, because the last spans matter most.
    telemetry.shut_down(shutdown.time_left()).await;
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn consume(config: &Config, shutdown: &Shutdown) -> anyhow::Result<()> {
    let listener = bind(config.listen).with_context(|| format!("listening on {}", config.listen))?;
    tracing::info!(address = %listener.local_addr()?, "listening for health checks");
    mq::run(config, listener, shutdown).await
}
