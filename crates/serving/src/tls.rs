//! Makes rustls configurations from the PEM files that the configuration names, with ring as the only crypto
//! provider. With `own`, a server with TLS checks its own health.
//!
//! Files are read once, at the start, so a process uses a new certificate only after a restart.

use crate::own::{OrOwn, Own};
use clap::Args;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio_rustls::rustls::{
    ClientConfig, ConfigBuilder, ConfigSide, RootCertStore, ServerConfig, WantsVerifier, WantsVersions,
    client::danger::ServerCertVerifier,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tonic::transport::{ClientTlsConfig, Identity};

/// A PEM file, as configured: the variable that names it, and its path if it is set.
#[derive(Debug, Clone, Copy)]
pub struct PemFile<'a>(pub &'static str, pub &'a Option<PathBuf>);

/// The flags and environment variables for a connection to the broker with TLS.
#[derive(Debug, Clone, Args)]
pub struct BrokerFiles {
    /// For amqps: a PEM file with the certificates of the authorities that the broker's certificate is
    /// checked with; by default the system's.
    #[arg(long, env = "AMQP_CA", global = true)]
    amqp_ca: Option<PathBuf>,

    /// For amqps: a PEM file with the client certificate to show to the broker, and with its intermediate
    /// certificates.
    #[arg(long, env = "AMQP_CLIENT_CERTIFICATE", global = true)]
    amqp_client_certificate: Option<PathBuf>,

    /// For amqps: a PEM file with the key of that certificate.
    #[arg(long, env = "AMQP_CLIENT_KEY", global = true)]
    amqp_client_key: Option<PathBuf>,
}

impl BrokerFiles {
    /// Reads the files for a connection that uses TLS if `is_wanted`.
    ///
    /// # Errors
    /// As for [`Client::read`].
    pub fn read(&self, is_wanted: bool) -> Result<Option<Client>, String> {
        Client::read(
            is_wanted.then_some(()).ok_or("AMQP_URL is not amqps"),
            [
                PemFile("AMQP_CA", &self.amqp_ca),
                PemFile("AMQP_CLIENT_CERTIFICATE", &self.amqp_client_certificate),
                PemFile("AMQP_CLIENT_KEY", &self.amqp_client_key),
            ],
        )
    }
}

/// How a client checks its server, and which certificate it shows.
#[derive(Debug, Clone)]
pub struct Client {
    /// For tokio-rustls.
    pub rustls: Arc<ClientConfig>,
    /// The same for tonic.
    pub tonic: ClientTlsConfig,
}

impl Client {
    /// Reads the authorities, the client's certificate and its key. If no authorities are named, the system's
    /// are used. `is_wanted` says whether there will be TLS, and if not, why.
    ///
    /// # Errors
    /// If a file can't be read, or has the wrong content; if only one of certificate and key is set; or if a
    /// file is set although there will be no TLS. The message is one line.
    pub fn read(
        is_wanted: Result<(), &'static str>,
        [ca, certificate, key]: [PemFile<'_>; 3],
    ) -> Result<Option<Self>, String> {
        if let Err(why_not) = is_wanted {
            let set = [ca, certificate, key].into_iter().find(|PemFile(_, path)| path.is_some());
            return set.map_or(Ok(None), |PemFile(variable, _)| Err(format!("{variable}: {why_not}")));
        }
        let roots = match ca.read(authorities)? {
            Some(roots) => roots,
            None => system_roots().map_err(|problem| format!("{}: not set, and {problem}", ca.0))?,
        };
        let tonic = ClientTlsConfig::new().trust_anchors(roots.roots.iter().cloned());
        let builder = with_ring(ClientConfig::builder_with_provider)?.with_root_certificates(roots);
        let Some(Pair { pem, chain, key }) = Pair::read(certificate, key)? else {
            return Ok(Some(Self { rustls: Arc::new(builder.with_no_client_auth()), tonic }));
        };
        let rustls =
            builder.with_client_auth_cert(chain, key).map_err(|error| certificate.problem(&error))?;
        let [certificate, key] = pem;
        Ok(Some(Self {
            rustls: Arc::new(rustls),
            tonic: tonic.identity(Identity::from_pem(certificate, key)),
        }))
    }
}

/// Which certificate a gRPC server shows to its clients, and how it checks theirs.
#[derive(Debug, Clone)]
pub struct Server {
    /// For tokio-rustls.
    pub rustls: Arc<ServerConfig>,
    own: Own,
    identity: Identity,
}

impl Server {
    /// Reads the server's certificate, its key, and the authorities of its clients. Without authorities, it
    /// accepts any client. Returns `None` if no file is set.
    ///
    /// # Errors
    /// If a file can't be read, has the wrong content, or is missing although another one needs it. The
    /// message is one line.
    pub fn read([certificate, key, client_ca]: [PemFile<'_>; 3]) -> Result<Option<Self>, String> {
        let Some(pair) = Pair::read(certificate, key)? else {
            return match client_ca.1 {
                Some(_) => Err(format!("{}: {} is not set", client_ca.0, certificate.0)),
                None => Ok(None),
            };
        };
        let Pair { pem: [certificate_pem, key_pem], chain, key } = pair;
        let own = Own(chain[0].clone());
        let builder = with_ring(ServerConfig::builder_with_provider)?;
        let builder = match client_ca.read(authorities)? {
            Some(roots) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
                let clients = verifier.build().map_err(|error| client_ca.problem(&error))?;
                builder.with_client_cert_verifier(Arc::new(OrOwn { clients, own: own.clone() }))
            }
            None => builder.with_no_client_auth(),
        };
        let mut rustls = builder.with_single_cert(chain, key).map_err(|error| certificate.problem(&error))?;
        rustls.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Some(Self {
            rustls: Arc::new(rustls),
            own,
            identity: Identity::from_pem(certificate_pem, key_pem),
        }))
    }

    /// Returns the TLS configuration for a probe by the same process. The probe accepts only the server's own
    /// certificate, whatever name is in it, and shows that certificate as well.
    pub fn asked_by_itself(&self) -> (ClientTlsConfig, Arc<dyn ServerCertVerifier>) {
        (ClientTlsConfig::new().identity(self.identity.clone()), Arc::new(self.own.clone()))
    }
}

/// A certificate with its key.
struct Pair {
    /// The contents of both files.
    pem: [Vec<u8>; 2],
    /// The certificate, followed by its intermediate certificates, if any.
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Pair {
    fn read(certificate: PemFile<'_>, key: PemFile<'_>) -> Result<Option<Self>, String> {
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
            (Some(_), None) => Err(format!("{}: {} is not set", certificate.0, key.0)),
            (None, Some(_)) => Err(format!("{}: {} is not set", key.0, certificate.0)),
        }
    }
}

impl PemFile<'_> {
    fn read<T>(self, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<Option<T>, String> {
        let Some(path) = self.1 else {
            return Ok(None);
        };
        let pem = fs::read(path).map_err(|error| self.problem(&error))?;
        parse(&pem).map(Some).map_err(|problem| self.problem(&problem))
    }

    fn problem(self, problem: &dyn std::fmt::Display) -> String {
        let Self(variable, path) = self;
        let path = path.as_deref().unwrap_or(Path::new(""));
        format!("{variable}: {}: {problem}", path.display())
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
) -> Result<ConfigBuilder<S, WantsVerifier>, String> {
    builder(provider()).with_safe_default_protocol_versions().map_err(|error| error.to_string())
}
