//! Tools for development.

use clap::{Parser, Subcommand};
use devstack::{bench, broker::Broker};
use std::net::SocketAddr;

/// Tools for development.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    tool: Tool,
}

#[derive(Subcommand)]
enum Tool {
    /// Measure what tracing costs: the three services on a real broker, under load.
    Bench(bench::Options),
    /// Measure whether the embedded broker is as fast as RabbitMQ.
    BenchBroker(bench::broker::Options),
    /// Run the embedded broker alone, until it is interrupted.
    Broker {
        /// Where to listen.
        #[arg(long, default_value = "127.0.0.1:5672")]
        listen: SocketAddr,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().tool {
        Tool::Bench(options) => bench::run(options).await,
        Tool::BenchBroker(options) => bench::broker::run(options).await,
        Tool::Broker { listen } => {
            let _broker = Broker::start_at(listen).await?;
            Ok(tokio::signal::ctrl_c().await?)
        }
    }
}
