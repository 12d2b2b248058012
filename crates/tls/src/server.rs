//! The configuration of a server with TLS.

use crate::{
    own::{OrOwn, Own},
    pem::{Error, Pair, PemFile, authorities},
    provider::{provider, with_ring},
};
use std::sync::Arc;
use tokio_rustls::rustls::{ServerConfig, client::danger::ServerCertVerifier, server::WebPkiClientVerifier};
use tonic::transport::{ClientTlsConfig, Identity};

/// Which certificate a gRPC server shows to its clients, and how it checks the clients' certificates.
#[derive(Debug, Clone)]
pub struct Server {
    /// The configuration for tokio-rustls.
    pub rustls: Arc<ServerConfig>,
    own: Own,
    identity: Identity,
}

impl Server {
    /// Reads the server's certificate, its key, and the authorities of its clients. Without authorities, the
    /// server accepts any client. Returns `None` if no file is set.
    ///
    /// # Errors
    /// If a file can't be read, has the wrong content, or is missing although another file needs it. The
    /// message is one line.
    pub fn read([certificate, key, client_ca]: [PemFile<'_>; 3]) -> Result<Option<Self>, Error> {
        let Some(pair) = Pair::read(certificate, key)? else {
            return match client_ca.1 {
                Some(_) => Err(client_ca.error(format!("{} is not set", certificate.0))),
                None => Ok(None),
            };
        };
        let Pair { pem: [certificate_pem, key_pem], chain, key } = pair;
        let own = Own(chain[0].clone());
        let builder = with_ring(ServerConfig::builder_with_provider);
        let builder = match client_ca.read(authorities)? {
            Some(roots) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
                let clients = verifier.build().map_err(|error| client_ca.unusable(&error))?;
                builder.with_client_cert_verifier(Arc::new(OrOwn { clients, own: own.clone() }))
            }
            None => builder.with_no_client_auth(),
        };
        let mut rustls =
            builder.with_single_cert(chain, key).map_err(|error| certificate.unusable(&error))?;
        rustls.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Some(Self {
            rustls: Arc::new(rustls),
            own,
            identity: Identity::from_pem(certificate_pem, key_pem),
        }))
    }

    /// Returns the TLS configuration with which a service probes its own health. The probe accepts only the
    /// server's own certificate, whatever name is in it, and shows the same certificate to the server.
    pub fn asked_by_itself(&self) -> (ClientTlsConfig, Arc<dyn ServerCertVerifier>) {
        (ClientTlsConfig::new().identity(self.identity.clone()), Arc::new(self.own.clone()))
    }
}
