//! Reads certificates, keys and authorities from PEM files.

use std::{fmt::Display, fs, path::Path};
use tokio_rustls::rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// A PEM file, as configured: the variable that names it, and its path if it is set.
#[derive(Debug, Clone, Copy)]
pub struct PemFile<'a>(pub &'a str, pub Option<&'a Path>);

/// The variable that names an unusable file, and what is wrong with that file, in one line.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {problem}")]
#[expect(missing_docs, reason = "the type tells what the fields hold")]
pub struct Error {
    pub variable: String,
    pub problem: String,
}

/// A certificate with its key.
pub(crate) struct Pair {
    /// The contents of both files.
    #[cfg_attr(not(feature = "tonic"), expect(dead_code, reason = "tonic's client and server read PEM"))]
    pub pem: [Vec<u8>; 2],
    /// The certificate, followed by its intermediate certificates, if any.
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Pair {
    pub fn read(certificate: PemFile<'_>, key: PemFile<'_>) -> Result<Option<Self>, Error> {
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
    pub(crate) fn read<T>(self, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<Option<T>, Error> {
        let Some(path) = self.1 else {
            return Ok(None);
        };
        let pem = fs::read(path).map_err(|error| self.unusable(&error))?;
        parse(&pem).map(Some).map_err(|problem| self.unusable(&problem))
    }

    pub(crate) fn unusable(self, problem: &dyn Display) -> Error {
        self.error(format!("{}: {problem}", self.1.unwrap_or(Path::new("")).display()))
    }

    pub(crate) fn error(self, problem: String) -> Error {
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

pub(crate) fn authorities(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(roots)
}
