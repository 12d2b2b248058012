//! Starts the gRPC service usercenter.

use rpc::config::{Command, Config};
use serving::{listener::bind, process};
use std::process::ExitCode;

// One thread: see docs/decisions/0004-one-thread.md.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let config = Config::load();
    if let Some(Command::Health) = config.command {
        return process::health(rpc::health(&config)).await;
    }
    process::run("usercenter", env!("CARGO_PKG_VERSION"), config.shutdown, async |shutdown| {
        let listener = bind(config.listen)?;
        tracing::info!(address = %listener.local_addr()?, "listening");
        rpc::run(&config, listener, shutdown).await
    })
    .await
}
