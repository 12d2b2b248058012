//! Starts the usercenter: configuration, telemetry, service, and telemetry again at the end.

use anyhow::Context;
use clap::Parser;
use rpc::config::{Command, Config};
use std::process::ExitCode;
use tokio::{
    net::TcpListener,
    select,
    signal::unix::{SignalKind, signal},
    time::Instant,
};

// One thread: see docs/decisions/0004-one-thread.md.
#[tokio::main(flavor = "current_thread")]
#[expect(clippy::print_stderr, reason = "without a valid configuration there is no log yet")]
async fn main() -> ExitCode {
    let config = Config::parse();
    if let Some(Command::Health) = config.command {
        return match proto::health::probe(config.listen).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("unhealthy: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let telemetry = match telemetry::Config::from_env("usercenter", env!("CARGO_PKG_VERSION")) {
        Ok(config) => telemetry::Telemetry::start(config),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };

    let result = serve(&config).await;
    if let Err(error) = &result {
        tracing::error!("{error:#}");
    }
    // After a failure, too: the last spans matter most.
    telemetry.shut_down(config.telemetry_timeout()).await;
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        Instant::now() + config.drain_timeout()
    };
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("listening on {}", config.listen))?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    rpc::run(listener, stop).await
}
