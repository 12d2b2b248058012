//! `cargo dev`: the whole system on this machine, and tools around it.

use clap::{Parser, Subcommand};
use devstack::{bench, dev, verify};
use std::process::ExitCode;

/// Run the whole system on this machine: three services, a broker, a trace backend with a page.
#[derive(Parser)]
#[command(name = "cargo dev", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    tool: Option<Tool>,
    #[command(flatten)]
    dev: dev::Options,
}

#[derive(Subcommand)]
enum Tool {
    /// Log in to a running system, and check its traces against the contract.
    Verify(verify::Options),
    /// Measure what tracing costs: the three services on a real broker, under load.
    Bench(bench::Options),
}

#[tokio::main]
#[expect(clippy::print_stderr, reason = "this is where it tells what failed")]
async fn main() -> ExitCode {
    let Arguments { tool, dev } = Arguments::parse();
    let result = match tool {
        None => dev::run(dev).await,
        Some(Tool::Verify(options)) => verify::run(options).await,
        Some(Tool::Bench(options)) => bench::run(options).await.map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
