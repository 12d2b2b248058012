//! The flags and environment variables of this service. The `OTEL_*` variables belong to the crate
//! `telemetry`.

use clap::{Parser, Subcommand};
use serving::{
    arguments::{self, duration, positive_duration},
    shutdown,
};
use std::{net::SocketAddr, path::PathBuf, time::Duration};
use tls::{PemFile, Server};

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

    /// How long a call may take; the caller may set a shorter deadline.
    #[arg(long, env = "USERCENTER_DEADLINE", default_value = "2s", value_parser = positive_duration)]
    pub deadline: Duration,

    /// How many calls may be in flight; further calls are refused at once.
    #[arg(long, env = "USERCENTER_MAX_IN_FLIGHT", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_in_flight: u32,

    /// The age of a connection at which its client is asked to close it. The client then opens a new
    /// connection, which a load balancer may send to another instance.
    #[arg(
        long,
        env = "USERCENTER_MAX_CONNECTION_AGE",
        default_value = "5m",
        value_parser = duration
    )]
    pub max_connection_age: Duration,

    /// For TLS: a PEM file with the certificate of this service, and with its intermediate certificates.
    #[arg(long, env = "USERCENTER_TLS_CERTIFICATE", global = true)]
    tls_certificate: Option<PathBuf>,

    /// For TLS: a PEM file with the key of the service's certificate.
    #[arg(long, env = "USERCENTER_TLS_KEY", global = true)]
    tls_key: Option<PathBuf>,

    /// With TLS: a PEM file with the CA certificates that a client's certificate is checked against. Without
    /// this file, clients need no certificate.
    #[arg(long, env = "USERCENTER_TLS_CLIENT_CA", global = true)]
    tls_client_ca: Option<PathBuf>,

    /// How to shut down.
    #[command(flatten)]
    pub shutdown: shutdown::Options,
}

/// What to do instead of serving.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Ask the running service whether it is ready. The exit code is 0 if it is ready, and 1 if not.
    Health,
}

impl Config {
    /// Reads flags and environment variables. Exits with code 2 if a value can't be used.
    pub fn load() -> Self {
        arguments::parse(|config: &Self| config.shutdown.check().and(config.tls().map(drop)))
    }

    /// Returns the TLS configuration for callers, if one is configured.
    ///
    /// # Errors
    /// If a file can't be used. [`Config::load`] has already checked that.
    pub fn tls(&self) -> Result<Option<Server>, String> {
        let tls = Server::read([
            PemFile("USERCENTER_TLS_CERTIFICATE", self.tls_certificate.as_deref()),
            PemFile("USERCENTER_TLS_KEY", self.tls_key.as_deref()),
            PemFile("USERCENTER_TLS_CLIENT_CA", self.tls_client_ca.as_deref()),
        ]);
        tls.map_err(|error| error.to_string())
    }
}
