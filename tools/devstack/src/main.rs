//! `cargo dev`: the whole system on this machine, and the tools around it.
//!
//! - [`dev`]: the system, with a broker and a trace backend, and its traces drawn in the terminal
//! - [`verify`]: checks a running system against the contract, with [`jaeger`]
//! - the other commands are in the crates `broker`, `backend`, `chaos` and `bench`
//!
//! The end-to-end tests of the services are in `tests/`, and use the crate `harness`.

mod dev;
mod jaeger;
mod verify;

use backend::{Addresses, Backend};
use broker::Broker;
use clap::{Parser, Subcommand};
use std::{io, net::SocketAddr, process::ExitCode};
use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
};

/// Run the whole system on this machine: three services, a broker, and a trace backend with a page.
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
    /// Run only the embedded broker, until a signal ends it.
    Broker {
        /// Where to listen.
        #[arg(long, default_value = "127.0.0.1:5672")]
        listen: SocketAddr,
    },
    /// Run only the embedded trace backend, until a signal ends it.
    Backend(Addresses),
    /// Inject faults into the system under load, and count the lost logins.
    Chaos(chaos::Options),
    /// Run the control, which `chaos --control` starts in place of api and mq.
    #[command(hide = true, subcommand)]
    Control(chaos::control::Service),
    /// Measure what traces, metrics and logs cost in the three services, under load and on a real broker.
    Bench(bench::Options),
}

#[tokio::main]
#[expect(clippy::print_stderr, reason = "here the program says what failed")]
async fn main() -> ExitCode {
    let Arguments { tool, dev } = Arguments::parse();
    let done = |()| ExitCode::SUCCESS;
    let result = match tool {
        None => dev::run(dev).await,
        Some(Tool::Verify(options)) => verify::run(options).await,
        Some(Tool::Broker { listen }) => broker(listen).await.map(done),
        Some(Tool::Backend(addresses)) => backend(addresses).await.map(done),
        Some(Tool::Chaos(options)) => chaos::run(options).await,
        Some(Tool::Control(service)) => chaos::control::run(service).await.map(done),
        Some(Tool::Bench(options)) => bench::run(options).await.map(done),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[expect(clippy::print_stdout, reason = "the user needs to know the address")]
async fn broker(listen: SocketAddr) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let broker = Broker::start_at(listen).await?;
    println!("listening amqp={}", broker.address());
    signals.stop().await;
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the user needs to know the address")]
async fn backend(addresses: Addresses) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let backend = Backend::start_at(addresses).await?;
    let Addresses { otlp_grpc, otlp_http, query } = backend.addresses();
    println!("listening otlp_grpc={otlp_grpc} otlp_http={otlp_http} query={query}");
    signals.stop().await;
    Ok(())
}

/// Streams of SIGINT and SIGTERM. The signals are caught from the moment the streams are made.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn stop(&mut self) {
        select! { _ = self.interrupt.recv() => {}, _ = self.terminate.recv() => {} }
    }
}
