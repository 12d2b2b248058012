//! Flags and environment of this service. The `OTEL_*` variables belong to the crate `telemetry`.

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use serving::{arguments, shutdown};
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

    /// How long a call may take; the caller may give it less time.
    #[arg(long, env = "USERCENTER_DEADLINE", default_value = "2s", value_parser = positive_duration)]
    pub deadline: Duration,

    /// How many calls may be in flight; more are refused at once.
    #[arg(long, env = "USERCENTER_MAX_IN_FLIGHT", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_in_flight: u32,

    /// After how long a connection is asked to go; its client makes a new one, which a balancer may lead to
    /// another instance.
    #[arg(
        long,
        env = "USERCENTER_MAX_CONNECTION_AGE",
        default_value = "5m",
        value_parser = humantime::parse_duration
    )]
    pub max_connection_age: Duration,

    /// How to end.
    #[command(flatten)]
    pub shutdown: shutdown::Options,
}

/// What to do instead of serving.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Ask the service on this machine whether it is ready; exit code 0 if it is, 1 if not.
    Health,
}

impl Config {
    /// Reads flags and environment; exits with 2 if something in them can't be honoured.
    pub fn load() -> Self {
        let config: Self = arguments::parse();
        if let Err(problem) = config.shutdown.check() {
            Self::command().error(ErrorKind::ValueValidation, problem).exit();
        }
        config
    }
}

fn positive_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must be more than 0".to_owned()),
        duration => duration.map_err(|error| error.to_string()),
    }
}
