//! Tools for development.

use clap::{Parser, Subcommand};
use devstack::{
    backend::{Addresses, Backend},
    bench,
};

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
    /// Run the embedded trace backend alone, until it is interrupted.
    Backend(Addresses),
    /// Measure how many spans the embedded trace backend takes.
    BenchBackend(bench::backend::Options),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().tool {
        Tool::Bench(options) => bench::run(options).await,
        Tool::Backend(addresses) => backend(addresses).await,
        Tool::BenchBackend(options) => bench::backend::run(options).await,
    }
}

#[expect(clippy::print_stdout, reason = "who starts it wants to know where it listens")]
async fn backend(addresses: Addresses) -> anyhow::Result<()> {
    let backend = Backend::start_at(addresses).await?;
    let Addresses { otlp_grpc, otlp_http, query } = backend.addresses();
    println!("listening otlp_grpc={otlp_grpc} otlp_http={otlp_http} query={query}");
    Ok(tokio::signal::ctrl_c().await?)
}
