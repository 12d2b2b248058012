//! The flags and environment variables of this service. The `OTEL_*` variables belong to the crate
//! `telemetry`.

use crate::outbox::{Capacity, PublishOptions};
use clap::{Parser, Subcommand, builder::RangedU64ValueParser};
use serving::{
    arguments::{self, positive_duration},
    shutdown,
};
use std::{net::SocketAddr, path::PathBuf, time::Duration};
use tls::{Client, PemFile};
use tonic::{
    codegen::http::uri::Authority,
    transport::{ClientTlsConfig, Uri},
};

/// The HTTP service: logs users in.
// It has no `Debug`, because two of the values are secrets.
#[derive(Parser)]
#[command(version)]
pub struct Config {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where to listen for HTTP.
    #[arg(long, env = "API_LISTEN", default_value = "127.0.0.1:8888", global = true)]
    pub listen: SocketAddr,

    /// How long a request may take, from its headers to the headers of the answer.
    #[arg(long, env = "API_DEADLINE", default_value = "3s", value_parser = positive_duration)]
    pub deadline: Duration,

    /// How many requests may be in flight; further requests are refused at once.
    #[arg(long, env = "API_MAX_IN_FLIGHT", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_in_flight: u32,

    /// The gRPC service usercenter, as http://host:port or https://host:port.
    #[arg(long, env = "USERCENTER_URL", default_value = "http://127.0.0.1:50051", value_parser = grpc_url)]
    pub usercenter_url: Uri,

    /// For https: a PEM file with the CA certificates that usercenter's certificate is checked against; by
    /// default, the system's CA certificates.
    #[arg(long, env = "USERCENTER_CA")]
    usercenter_ca: Option<PathBuf>,

    /// For https: a PEM file with the client certificate to show to usercenter, and with its intermediate
    /// certificates.
    #[arg(long, env = "USERCENTER_CLIENT_CERTIFICATE")]
    usercenter_client_certificate: Option<PathBuf>,

    /// For https: a PEM file with the key of the client certificate.
    #[arg(long, env = "USERCENTER_CLIENT_KEY")]
    usercenter_client_key: Option<PathBuf>,

    /// How long a call to usercenter may take, including its retries.
    #[arg(long, env = "USERCENTER_TIMEOUT", default_value = "2s", value_parser = positive_duration)]
    pub usercenter_timeout: Duration,

    /// How many attempts a call to usercenter may have; 1 for no retries.
    #[arg(long, env = "USERCENTER_ATTEMPTS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=5))]
    pub usercenter_attempts: u32,

    /// How long api makes no call to usercenter after half of the recent calls failed.
    #[arg(long, env = "USERCENTER_CIRCUIT_PAUSE", default_value = "1s", value_parser = positive_duration)]
    pub usercenter_circuit_pause: Duration,

    /// The broker.
    #[command(flatten)]
    pub amqp: amqp::Arguments,

    /// Whether a copy of each login goes to the exchange, for the queues of other consumers.
    #[arg(long, env = "PUBLISH_COPIES", default_value_t = false, action = clap::ArgAction::Set)]
    pub publish_copies: bool,

    /// How long the broker may take to confirm a message, before the message goes to the spool.
    #[arg(long, env = "PUBLISH_TIMEOUT", default_value = "1s", value_parser = positive_duration)]
    pub publish_timeout: Duration,

    /// The directory of the spool, which holds the logins that the broker has not confirmed. No other process
    /// may use this directory.
    #[arg(long, env = "API_DATA_DIR", default_value = "data/api", global = true)]
    pub data_dir: PathBuf,

    /// The most logins in the spool. When the spool is full, logins are refused while the broker is
    /// unavailable.
    #[arg(long, env = "API_SPOOL_MAX_ENTRIES", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    spool_max_entries: u64,

    /// The most bytes in the spool. The file may be several times as large.
    #[arg(long, env = "API_SPOOL_MAX_BYTES", default_value_t = 512 * 1024 * 1024, value_parser = clap::value_parser!(u64).range(1..))]
    spool_max_bytes: u64,

    /// The secret that signs access tokens, at least 32 bytes. Without a secret, tokens are valid only until
    /// this process ends.
    #[arg(long, env = "ACCESS_SECRET", hide_env_values = true)]
    access_secret: Option<String>,

    /// How long an access token is valid, at least a second.
    #[arg(long, env = "ACCESS_EXPIRE", default_value = "24h", value_parser = whole_second)]
    pub access_expire: Duration,

    /// How many connections from callers there may be at once. Beyond that number, each new connection
    /// replaces the connection that has waited longest for a request.
    #[arg(long, env = "API_MAX_CONNECTIONS", default_value_t = 10_000, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub max_connections: usize,

    /// How many connections may come from one address; by default half of the total. An address is an IPv4
    /// address or a /64 of IPv6.
    #[arg(long, env = "API_MAX_CONNECTIONS_PER_ADDRESS", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub max_connections_per_address: Option<usize>,

    /// How to shut down.
    #[command(flatten)]
    pub shutdown: shutdown::Options,
}

/// What to do instead of serving.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum Command {
    /// Ask the running service whether it is ready. The exit code is 0 if it is ready, and 1 if not.
    Health,
    /// List, publish or export the logins in the spool of an instance that no longer runs.
    #[command(subcommand)]
    Spool(SpoolCommand),
}

/// What to do with a spool that no process uses.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum SpoolCommand {
    /// List the message id, the age and the bytes of each login, the oldest first. The spool is not changed.
    List,
    /// Publish all logins, and remove those that the broker confirms.
    Drain,
    /// Write all logins to standard output, one JSON object per line. They hold personal data. The spool is
    /// not changed.
    Export,
}

impl Config {
    /// Reads flags and environment variables. Exits with code 2 if a value can't be used.
    pub fn load() -> Self {
        arguments::parse(|config: &Self| {
            config.amqp.server()?;
            let usercenter = config.usercenter_url.authority();
            if usercenter.is_some_and(|authority| authority.as_str().contains('@')) {
                return Err("USERCENTER_URL: a user or a password is not allowed".to_owned());
            }
            config.usercenter_tls()?;
            config.access_secret()?;
            config.shutdown.check()
        })
    }

    /// Returns the TLS configuration for usercenter, if its URL asks for TLS.
    ///
    /// # Errors
    /// If a file can't be used. [`Config::load`] has already checked that.
    pub fn usercenter_tls(&self) -> Result<Option<ClientTlsConfig>, String> {
        let is_https = self.usercenter_url.scheme_str() == Some("https");
        let files = [
            PemFile("USERCENTER_CA", self.usercenter_ca.as_deref()),
            PemFile("USERCENTER_CLIENT_CERTIFICATE", self.usercenter_client_certificate.as_deref()),
            PemFile("USERCENTER_CLIENT_KEY", self.usercenter_client_key.as_deref()),
        ];
        let unused = (!is_https).then_some("USERCENTER_URL is not https");
        let tls = Client::read(files, unused).map_err(|error| error.to_string())?;
        Ok(tls.map(|tls| tls.tonic))
    }

    /// Returns how logins are published.
    pub fn publish_options(&self) -> PublishOptions {
        PublishOptions { timeout: self.publish_timeout, copies: self.publish_copies }
    }

    /// Returns how much the spool may hold.
    pub fn spool_capacity(&self) -> Capacity {
        Capacity { entries: self.spool_max_entries, bytes: self.spool_max_bytes }
    }

    /// Returns the key for access tokens, if one is set.
    ///
    /// # Errors
    /// If the key is too short. [`Config::load`] has already checked that.
    pub fn access_secret(&self) -> Result<Option<&[u8]>, String> {
        // An empty value counts as unset, because a compose file can't unset a variable, only leave it empty.
        match self.access_secret.as_deref().filter(|secret| !secret.is_empty()) {
            Some(secret) if secret.len() < 32 => {
                Err("ACCESS_SECRET: at least 32 bytes are needed".to_owned())
            }
            secret => Ok(secret.map(str::as_bytes)),
        }
    }
}

/// Reads a duration of at least a second, because the times in a token are whole seconds.
fn whole_second(text: &str) -> Result<Duration, String> {
    let duration = positive_duration(text)?;
    if duration < Duration::from_secs(1) { Err("must be at least 1s".to_owned()) } else { Ok(duration) }
}

fn grpc_url(url: &str) -> Result<Uri, &'static str> {
    match url.parse::<Uri>() {
        // A path or a query is refused. It would be ignored, because each gRPC method has its own path.
        Ok(uri)
            if matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.authority().is_some_and(has_good_port)
                && uri.path_and_query().is_none_or(|path| path == "/") =>
        {
            Ok(uri)
        }
        _ => Err("expected http(s)://host:port"),
    }
}

/// Whether the port is valid or missing. The URL parser treats an invalid port as missing. Without this check,
/// port 80 would be used in its place.
fn has_good_port(authority: &Authority) -> bool {
    authority.port_u16().is_some() || authority.as_str().ends_with(authority.host())
}
