//! The flags and environment variables of a client of the broker.

use crate::{
    connection::{DEFAULT_URL, Server, parse_url},
    topology::{QueueType, Topology},
};
use clap::Args;
use std::path::PathBuf;
use tls::PemFile;

/// Where the broker is, and how to connect to it.
// It has no `Debug`, because the URL may hold a password.
#[derive(Args)]
pub struct Arguments {
    /// The broker, as amqp://user:password@host:port/vhost, or amqps for TLS. In place of host:port, there
    /// may be a list like host1:port,host2:port, whose hosts are tried in turn.
    #[arg(long, env = "AMQP_URL", default_value = DEFAULT_URL, hide_env_values = true, global = true)]
    amqp_url: String,

    /// The type of all queues. All services that share queues need the same type.
    #[arg(long, env = "AMQP_QUEUE_TYPE", default_value = "quorum", global = true)]
    queue_type: QueueType,

    /// The prefix of the names of the exchange and the queues, for deployments that share a broker.
    #[arg(long, env = "AMQP_PREFIX", default_value = "", value_parser = prefix, global = true)]
    amqp_prefix: String,

    /// For amqps: a PEM file with the certificates of the authorities that are trusted for the broker's
    /// certificate; by default the system's authorities.
    #[arg(long, env = "AMQP_CA", global = true)]
    amqp_ca: Option<PathBuf>,

    /// For amqps: a PEM file with the client certificate to show to the broker, and with its intermediate
    /// certificates.
    #[arg(long, env = "AMQP_CLIENT_CERTIFICATE", global = true)]
    amqp_client_certificate: Option<PathBuf>,

    /// For amqps: a PEM file with the key of the client certificate.
    #[arg(long, env = "AMQP_CLIENT_KEY", global = true)]
    amqp_client_key: Option<PathBuf>,
}

impl Arguments {
    /// Returns the broker that is configured.
    ///
    /// # Errors
    /// If the URL is malformed, a file can't be used, or a file is set although the URL does not ask for TLS.
    pub fn server(&self) -> Result<Server, String> {
        let server = parse_url(&self.amqp_url).map_err(|problem| format!("AMQP_URL: {problem}"))?;
        let files = [
            PemFile("AMQP_CA", self.amqp_ca.as_deref()),
            PemFile("AMQP_CLIENT_CERTIFICATE", self.amqp_client_certificate.as_deref()),
            PemFile("AMQP_CLIENT_KEY", self.amqp_client_key.as_deref()),
        ];
        let unused = (!server.wants_tls()).then_some("AMQP_URL is not amqps");
        let tls = tls::Client::read(files, unused).map_err(|error| error.to_string())?;
        Ok(match tls {
            Some(tls) => server.with_tls(tls.rustls),
            None => server,
        })
    }

    /// Returns the exchange and the queues, with the configured prefix and queue type. A queue that
    /// has retry queues may have a name of at most 13 bytes, so that their names are not too long, even with
    /// the longest prefix and delay.
    pub fn topology(&self, exchange: &str, routing_key: &str, queue: &str) -> Topology {
        Topology::new(&self.amqp_prefix, exchange, routing_key, queue, self.queue_type)
    }
}

/// Reads a prefix. A name in AMQP has at most 255 bytes (0-9-1, "short strings"), and 60 of them are reserved
/// for the name of a queue (13 bytes), `.retry.` (7) and a delay (40).
fn prefix(prefix: &str) -> Result<String, String> {
    match prefix.len() {
        0..=195 => Ok(prefix.to_owned()),
        length => Err(format!("expected at most 195 bytes, found {length}")),
    }
}
