//! Tools for development.

use clap::{Parser, Subcommand};
use devstack::{
    backend::{Addresses, Backend},
    bench,
};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Tools for development.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    tool: Tool,
}

#[derive(Subcommand)]
enum Tool {
    /// Serve the trace backend alone, until interrupted. Prints where: one `name address` a line.
    Backend {
        /// Listen on free ports rather than 4317, 4318 and 16686.
        #[arg(long)]
        free_ports: bool,
    },
    /// Measure what tracing costs: the three services on a real broker, under load.
    Bench(bench::Options),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().tool {
        Tool::Backend { free_ports } => serve_backend(free_ports).await,
        Tool::Bench(options) => bench::run(options).await,
    }
}

#[expect(clippy::print_stdout, reason = "addresses are what this tool says")]
async fn serve_backend(free_ports: bool) -> anyhow::Result<()> {
    let at = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let usual = Addresses { otlp_grpc: at(4317), otlp_http: at(4318), query: at(16686) };
    let backend = Backend::start_at(if free_ports { Addresses::FREE } else { usual }).await?;
    let Addresses { otlp_grpc, otlp_http, query } = backend.addresses();
    println!("otlp-grpc http://{otlp_grpc}\notlp-http http://{otlp_http}\npage http://{query}");
    tokio::signal::ctrl_c().await?;
    Ok(())
}
