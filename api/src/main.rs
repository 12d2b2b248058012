//! Starts the HTTP service, or carries out an operator's command on a spool.

use api::config::{Command, Config};
use serving::{listener::bind, process};
use std::process::ExitCode;
use tokio::select;

// One thread: see docs/decisions/0004-one-thread.md.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let config = Config::load();
    if let Some(Command::Health) = config.command {
        return process::health(api::health::probe(config.listen)).await;
    }
    process::run("api", env!("CARGO_PKG_VERSION"), config.shutdown, async |shutdown| {
        if let Some(Command::Spool(command)) = config.command {
            return select! {
                done = api::spool::run(&config, command) => done,
                _ = shutdown.begun() => Err(anyhow::anyhow!("interrupted")),
            };
        }
        let listener = bind(config.listen)?;
        tracing::info!(address = %listener.local_addr()?, "listening");
        api::run(&config, listener, shutdown).await
    })
    .await
}
