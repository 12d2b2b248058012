//! `cargo dev`: the whole system on this machine, and tools around it.

use clap::{Parser, Subcommand};
use devstack::{
    backend::{Addresses, Backend},
    bench, dev, verify,
};
use std::{
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
};
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
    /// Serve the trace backend alone, until a signal. Prints where: one `name address` a line.
    Backend {
        /// Listen on this address.
        #[arg(long, default_value_t = Ipv4Addr::LOCALHOST.into())]
        address: IpAddr,
        /// Listen on free ports rather than 4317, 4318 and 16686.
        #[arg(long)]
        free_ports: bool,
    },
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
        Some(Tool::Backend { address, free_ports }) => serve_backend(address, free_ports).await,
        Some(Tool::Bench(options)) => bench::run(options).await.map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[expect(clippy::print_stdout, reason = "addresses are what this tool says")]
async fn serve_backend(address: IpAddr, free_ports: bool) -> anyhow::Result<ExitCode> {
    let at = |port| (address, if free_ports { 0 } else { port }).into();
    let addresses = Addresses { otlp_grpc: at(4317), otlp_http: at(4318), query: at(16686) };
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let backend = Backend::start_at(addresses).await?;
    let Addresses { otlp_grpc, otlp_http, query } = backend.addresses();
    println!("otlp-grpc http://{otlp_grpc}\notlp-http http://{otlp_http}\npage http://{query}");
    select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
    Ok(ExitCode::SUCCESS)
}
