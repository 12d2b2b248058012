//! Flags and environment of this service. The `OTEL_*` variables belong to the crate `telemetry`.

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use lapin::uri::AMQPUri;
use std::{net::SocketAddr, time::Duration};
use telemetry::amqp::Relation;

/// The consumer of login messages.
// Without Debug: the URL may hold a password.
#[derive(Parser)]
#[command(version)]
pub struct Config {
    /// What to do instead of consuming.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where to listen for gRPC health checks.
    #[arg(long, env = "MQ_LISTEN", default_value = "127.0.0.1:50052", global = true)]
    pub listen: SocketAddr,

    /// The broker, as amqp://user:password@host:port/vhost.
    #[arg(long, env = "AMQP_URL", default_value = proto::broker::DEFAULT_URL, hide_env_values = true)]
    amqp_url: String,

    /// Put before the names of exchange and queues, for deployments that share a broker.
    #[arg(long, env = "AMQP_PREFIX", default_value = "")]
    pub amqp_prefix: String,

    /// How many messages the broker may send ahead of their acknowledgement.
    #[arg(long, env = "MQ_PREFETCH", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub prefetch: u16,

    /// How the consumer span relates to the producer span: parent (its child), link (a new trace, linked)
    /// or both.
    #[arg(long, env = "MQ_RELATION", default_value = "parent")]
    pub relation: Relation,

    /// From the signal to stop until exit, at most: deliveries in hand, then spans.
    #[arg(long, env = "SHUTDOWN_TIMEOUT", default_value = "8s", value_parser = humantime::parse_duration)]
    pub shutdown_timeout: Duration,
}

/// What to do instead of consuming.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Ask the service on this machine whether it is consuming; exit code 0 if it is, 1 if not.
    Health,
}

impl Config {
    /// Reads flags and environment; exits with 2 if something in them can't be honoured.
    pub fn load() -> Self {
        let config = Self::parse();
        // A secret is checked here, not by clap, whose error messages quote the value.
        if let Err(problem) = config.amqp_uri() {
            Self::command().error(ErrorKind::ValueValidation, problem).exit();
        }
        config
    }

    /// The broker.
    ///
    /// # Errors
    /// If the URL is not one; [`Config::load`] has seen to that.
    pub fn amqp_uri(&self) -> Result<AMQPUri, String> {
        proto::broker::parse_url(&self.amqp_url).map_err(|problem| format!("AMQP_URL: {problem}"))
    }

    /// The part of the shutdown that deliveries in hand may take.
    pub fn drain_timeout(&self) -> Duration {
        self.shutdown_timeout.mul_f64(0.6)
    }

    /// The part of the shutdown that is kept for spans.
    pub fn telemetry_timeout(&self) -> Duration {
        self.shutdown_timeout.mul_f64(0.4)
    }
}
