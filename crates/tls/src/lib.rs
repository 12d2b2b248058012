//! Makes rustls configurations from the PEM files that the configuration names, with ring as the only crypto
//! provider. With the feature `tonic`, this crate also makes configurations for a tonic client and for a gRPC
//! server. The server also accepts its own certificate from a client, so that its health probe can connect.
//!
//! Files are read once, at the start, so a process uses a new certificate only after a restart.

#[cfg(feature = "tonic")]
mod own;
mod pem;
mod provider;
#[cfg(feature = "tonic")]
mod server;

pub use pem::{Error, PemFile};
#[cfg(feature = "tonic")]
pub use server::Server;

use pem::{Pair, authorities};
use provider::with_ring;
use std::sync::Arc;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
#[cfg(feature = "tonic")]
use tonic::transport::{ClientTlsConfig, Identity};

/// How a client checks its server, and which certificate it shows.
#[derive(Clone)]
pub struct Client {
    /// The configuration for rustls.
    pub rustls: Arc<ClientConfig>,
    /// The same configuration for tonic.
    #[cfg(feature = "tonic")]
    pub tonic: ClientTlsConfig,
}

impl Client {
    /// Reads the authorities, the client's certificate and its key, unless `unused` tells why there will be
    /// no TLS. If no file of authorities is set, the system's authorities are used.
    ///
    /// # Errors
    /// If a file can't be read or has the wrong content, if only one of certificate and key is set, if there
    /// are no authorities, or if a file is set although there will be no TLS.
    pub fn read(
        [ca, certificate, key]: [PemFile<'_>; 3],
        unused: Option<&str>,
    ) -> Result<Option<Self>, Error> {
        if let Some(why) = unused {
            let set = [ca, certificate, key].into_iter().find(|file| file.1.is_some());
            return set.map_or(Ok(None), |file| Err(file.error(why.to_owned())));
        }
        let roots = match ca.read(authorities)? {
            Some(roots) => roots,
            None => system_roots().map_err(|problem| ca.error(format!("not set, and {problem}")))?,
        };
        #[cfg(feature = "tonic")]
        let tonic = ClientTlsConfig::new().trust_anchors(roots.roots.iter().cloned());
        let builder = with_ring(ClientConfig::builder_with_provider).with_root_certificates(roots);
        let pair = Pair::read(certificate, key)?;
        #[cfg(feature = "tonic")]
        let tonic = match &pair {
            Some(Pair { pem: [certificate, key], .. }) => {
                tonic.identity(Identity::from_pem(certificate, key))
            }
            None => tonic,
        };
        let rustls = match pair {
            Some(Pair { chain, key, .. }) => builder.with_client_auth_cert(chain, key),
            None => Ok(builder.with_no_client_auth()),
        };
        Ok(Some(Self {
            rustls: Arc::new(rustls.map_err(|error| certificate.unusable(&error))?),
            #[cfg(feature = "tonic")]
            tonic,
        }))
    }
}

/// Returns a configuration that trusts no server, for a client that must not use TLS.
pub fn without_authorities() -> ClientConfig {
    let builder = with_ring(ClientConfig::builder_with_provider);
    builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
}

fn system_roots() -> Result<RootCertStore, String> {
    let loaded = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Some systems have certificates that can't be parsed. These are skipped.
    let (usable, _) = roots.add_parsable_certificates(loaded.certs);
    match (usable, loaded.errors.first()) {
        (0, Some(error)) => Err(format!("the system's authorities can't be read: {error}")),
        (0, None) => Err("this system has no CA certificates".to_owned()),
        _ => Ok(roots),
    }
}
