//! Starts the consumer, or carries out an operator's command on dead letters.

use mq::config::{Command, Config};
use serving::{health, listener::bind, process};
use std::process::ExitCode;
use tokio::select;

// One thread: see docs/decisions/0004-one-thread.md.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let config = Config::load();
    if let Some(Command::Health) = &config.command {
        return process::health(health::probe(config.listen)).await;
    }
    process::run("mq", env!("CARGO_PKG_VERSION"), config.shutdown, async |shutdown| {
        if let Some(Command::DeadLetters(command)) = &config.command {
            return select! {
                done = mq::dead_letters::run(&config, command) => done,
                _ = shutdown.begun() => Err(anyhow::anyhow!("interrupted")),
            };
        }
        let listener = bind(config.listen)?;
        tracing::info!(address = %listener.local_addr()?, "listening for health checks");
        mq::run(&config, listener, shutdown).await
    })
    .await
}
