//! Flags and environment of this service. The `OTEL_*` variables belong to the crate `telemetry`.

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use lapin::uri::AMQPUri;
use std::{net::SocketAddr, time::Duration};
use tonic::transport::Uri;

/// The HTTP service: logs users in.
// Without Debug: two of the values are secrets.
#[derive(Parser)]
#[command(version)]
pub struct Config {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where to listen for HTTP.
    #[arg(long, env = "API_LISTEN", default_value = "127.0.0.1:8888", global = true)]
    pub listen: SocketAddr,

    /// The gRPC service usercenter, as http://host:port.
    #[arg(long, env = "USERCENTER_URL", default_value = "http://127.0.0.1:50051", value_parser = grpc_url)]
    pub usercenter_url: Uri,

    /// How long usercenter may take to answer.
    #[arg(long, env = "USERCENTER_TIMEOUT", default_value = "2s", value_parser = humantime::parse_duration)]
    pub usercenter_timeout: Duration,

    /// The broker, as amqp://user:password@host:port/vhost.
    #[arg(long, env = "AMQP_URL", default_value = proto::broker::DEFAULT_URL, hide_env_values = true)]
    amqp_url: String,

    /// Put before the names of exchange and queues, for deployments that share a broker.
    #[arg(long, env = "AMQP_PREFIX", default_value = "")]
    pub amqp_prefix: String,

    /// How long the broker may take to confirm a message.
    #[arg(long, env = "PUBLISH_TIMEOUT", default_value = "2s", value_parser = humantime::parse_duration)]
    pub publish_timeout: Duration,

    /// Signs access tokens, at least 32 bytes. Without it tokens are valid until this process ends.
    #[arg(long, env = "ACCESS_SECRET", hide_env_values = true)]
    access_secret: Option<String>,

    /// How long an access token is valid.
    #[arg(long, env = "ACCESS_EXPIRE", default_value = "24h", value_parser = humantime::parse_duration)]
    pub access_expire: Duration,

    /// From the signal to stop until exit, at most: requests in flight, then spans.
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
    /// Reads flags and environment; exits with 2 if something in them can't be honoured.
    pub fn load() -> Self {
        let config = Self::parse();
        // Secrets are checked here, not by clap, whose error messages quote the value.
        if let Err(problem) = config.amqp_uri().and_then(|_| config.access_secret()) {
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

    /// The key for access tokens, if one is set.
    ///
    /// # Errors
    /// If it is too short; [`Config::load`] has seen to that.
    pub fn access_secret(&self) -> Result<Option<&[u8]>, String> {
        // Unset and empty are the same, as compose files need it.
        match self.access_secret.as_deref().filter(|secret| !secret.is_empty()) {
            Some(secret) if secret.len() < 32 => {
                Err("ACCESS_SECRET: at least 32 bytes are needed".to_owned())
            }
            secret => Ok(secret.map(str::as_bytes)),
        }
    }

    /// The part of the shutdown that requests in flight may take.
    pub fn drain_timeout(&self) -> Duration {
        self.shutdown_timeout.mul_f64(0.6)
    }

    /// The part of the shutdown that is kept for spans.
    pub fn telemetry_timeout(&self) -> Duration {
        self.shutdown_timeout.mul_f64(0.4)
    }
}

fn grpc_url(url: &str) -> Result<Uri, &'static str> {
    match url.parse::<Uri>() {
        Ok(uri) if uri.scheme_str() == Some("http") && uri.host().is_some() => Ok(uri),
        _ => Err("expected http://host:port"),
    }
}
