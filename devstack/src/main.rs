//! Tools for development.

use clap::{Parser, Subcommand};
use devstack::bench;

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
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().tool {
        Tool::Bench(options) => bench::run(options).await,
    }
}
