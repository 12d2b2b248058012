//! Makes rustls configurations from the PEM files that the configuration names, with ring as the only crypto
//! provider. With the feature `tonic`, this crate also makes configurations for tonic's client, and for a
//! server that can check its own health.
//!
//! Files are read once, at the start, so a process uses a new certificate only after a restart.

#[cfg(feature = "tonic")]
mod own;
#[cfg(feature = "tonic")]
mod server;

#[cfg(feature = "tonic")]
pub use server::Server;

use std::{fmt::Display, fs, path::Path, sync::Arc};
use tokio_rustls::rustls::{
    ClientConfig, ConfigBuilder, ConfigSide, RootCertStore, WantsVerifier, WantsVersions,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
#[cfg(feature = "tonic")]
use tonic::transport::{ClientTlsConfig, Identity};

/// A PEM file, as configured: the variable that names it, and its path if it is set.
#[derive(Debug, Clone, Copy)]
pub struct PemFile<'a>(pub &'a str, pub Option<&'a Path>);

/// The variable that names a file which can't be used, and what is wrong with the file, in one line.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {problem}")]
#[expect(missing_docs, reason = "the type tells what the fields hold")]
pub struct Error {
    pub variable: String,
    pub problem: String,
}

/// How a client checks its server, and which certificate it shows.
#[derive(Clone)]
pub struct Client {
    /// For rustls.
    pub rustls: Arc<ClientConfig>,
    /// The same for tonic.
    #[cfg(feature = "tonic")]
    pub tonic: ClientTlsConfig,
}

impl Client {
    /// Reads the authorities, the client's certificate and its key, unless `unused` tells why there will be no
    /// TLS. If no file of authorities is set, the system's authorities are used.
    ///
    /// # Errors
    /// If a file can't be read, or has the wrong content; if only one of certificate and key is set; if there
    /// are no authorities; or if a file is set although there will be no TLS.
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

/// A certificate with its key.
struct Pair {
    /// The contents of both files.
    #[cfg_attr(not(feature = "tonic"), expect(dead_code, reason = "tonic's client and server read PEM"))]
    pem: [Vec<u8>; 2],
    /// The certificate, followed by its intermediate certificates, if any.
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Pair {
    fn read(certificate: PemFile<'_>, key: PemFile<'_>) -> Result<Option<Self>, Error> {
        let chain = certificate.read(|pem| Ok((pem.to_vec(), certificates(pem)?)))?;
        let read_key = |pem: &[u8]| {
            let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| error.to_string())?;
            Ok((pem.to_vec(), key))
        };
        match (chain, key.read(read_key)?) {
            (Some((certificate, chain)), Some((key_pem, key))) => {
                Ok(Some(Self { pem: [certificate, key_pem], chain, key }))
            }
            (None, None) => Ok(None),
            (Some(_), None) => Err(certificate.error(format!("{} is not set", key.0))),
            (None, Some(_)) => Err(key.error(format!("{} is not set", certificate.0))),
        }
    }
}

impl PemFile<'_> {
    fn read<T>(self, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<Option<T>, Error> {
        let Some(path) = self.1 else {
            return Ok(None);
        };
        let pem = fs::read(path).map_err(|error| self.unusable(&error))?;
        parse(&pem).map(Some).map_err(|problem| self.unusable(&problem))
    }

    fn unusable(self, problem: &dyn Display) -> Error {
        self.error(format!("{}: {problem}", self.1.unwrap_or(Path::new("")).display()))
    }

    fn error(self, problem: String) -> Error {
        Error { variable: self.0.to_owned(), problem }
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| error.to_string())?;
    if certificates.is_empty() {
        return Err("there is no certificate in it".to_owned());
    }
    Ok(certificates)
}

fn authorities(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(roots)
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

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn with_ring<S: ConfigSide>(
    builder: fn(Arc<CryptoProvider>) -> ConfigBuilder<S, WantsVersions>,
) -> ConfigBuilder<S, WantsVerifier> {
    builder(provider()).with_safe_default_protocol_versions().expect("ring has TLS 1.2 and 1.3")
}
