//! Flags and environment of this service. The `OTEL_*` variables belong to the crate `telemetry`.

use clap::{Parser, Subcommand};
use std::{net::SocketAddr, time::Duration};

/// The gRPC service usercenter.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Config {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where to listen for gRPC.
    #[arg(long, env = "USERCENTER_LISTEN", default_value = "127.0.0.1:50051", global = true)]
    pub listen: SocketAddr,

    /// From the signal to stop until exit, at most: calls in flight, then spans.
    #[arg(long, env = "SHUTDOWN_TIMEOUT", default_value = "8s", value_parser = humantime::parse_duration)]
    pub shutdown_timeout: Duration,
}

/// What to do instead of serving.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Ask the service on this machine whether it is ready; exit code 0 if it is, 1 if not.
    Health,
}

impl Config {
    /// The part of the shutdown that calls in flight may take.
    pub fn drain_timeout(&self) -> Duration {
        self.shutdown_timeout.mul_f64(0.6)
    }

    /// The part of the shutdown that is kept for spans.
    pub fn telemetry_timeout(&self) -> Duration {
        self.shutdown_timeout.mul_f64(0.4)
    }
}
