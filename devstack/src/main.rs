//! `cargo dev`: the whole system on this machine, and tools around it.

use clap::{Parser, Subcommand};
use devstack::{
    backend::{Addresses, Backend},
    bench, dev, verify,
};
use std::process::ExitCode;
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
};

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
    /// Run the embedded trace backend alone, until a signal.
    Backend(Addresses),
    /// Measure what tracing costs: the three services on a real broker, under load.
    Bench(bench::Options),
    /// Measure how many spans the embedded trace backend takes.
    BenchBackend(bench::backend::Options),
}

#[tokio::main]
#[expect(clippy::print_stderr, reason = "this is where it tells what failed")]
async fn main() -> ExitCode {
    let Arguments { tool, dev } = Arguments::parse();
    let done = |()| ExitCode::SUCCESS;
    let result = match tool {
        None => dev::run(dev).await,
        Some(Tool::Verify(options)) => verify::run(options).await,
        Some(Tool::Backend(addresses)) => backend(addresses).await.map(done),
        Some(Tool::Bench(options)) => bench::run(options).await.map(done),
        Some(Tool::BenchBackend(options)) => bench::backend::run(options).await.map(done),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[expect(clippy::print_stdout, reason = "who starts it wants to know where it listens")]
async fn backend(addresses: Addresses) -> anyhow::Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let backend = Backend::start_at(addresses).await?;
    let Addresses { otlp_grpc, otlp_http, query } = backend.addresses();
    println!("listening otlp_grpc={otlp_grpc} otlp_http={otlp_http} query={query}");
    select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
    Ok(())
}
