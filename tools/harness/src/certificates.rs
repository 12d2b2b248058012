//! Certificates for tests of TLS: two authorities, of which only one is trusted, and certificates with the
//! usual faults.

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use std::fs;
use tempfile::TempDir;

/// A directory of PEM files, which is deleted when this value is dropped.
pub struct Certificates {
    directory: TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
    unknown: CertifiedIssuer<'static, KeyPair>,
}

/// Whether a certificate is valid, or which fault it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Valid for `localhost`, 127.0.0.1 and ::1, for servers and for clients.
    Good,
    /// Valid for another host.
    WrongName,
    /// Expired long ago.
    Expired,
    /// Issued by an authority that nobody trusts.
    UnknownIssuer,
}

/// The file of a certificate and the file of its key.
#[derive(Debug, Clone)]
pub struct Files {
    /// The path of the certificate.
    pub certificate: String,
    /// The path of the certificate's key.
    pub key: String,
}

impl Certificates {
    /// Makes both authorities.
    ///
    /// # Errors
    /// If the files can't be written.
    pub fn new() -> Result<Self> {
        let certificates = Self {
            directory: TempDir::new()?,
            authority: authority("known")?,
            unknown: authority("unknown")?,
        };
        fs::write(certificates.ca(), certificates.authority.pem())?;
        Ok(certificates)
    }

    /// Returns the path of the trusted authority's certificate.
    pub fn ca(&self) -> String {
        self.path("ca.pem")
    }

    /// Returns the path of a file with this name in the same directory.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// Issues a certificate and writes its files.
    ///
    /// # Errors
    /// If the files can't be written.
    pub fn issue(&self, kind: Kind) -> Result<Files> {
        let names: &[&str] = match kind {
            Kind::WrongName => &["elsewhere.example"],
            Kind::Good | Kind::Expired | Kind::UnknownIssuer => &["localhost", "127.0.0.1", "::1"],
        };
        let mut certificate =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        certificate.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        if kind == Kind::Expired {
            certificate.not_before = date_time_ymd(2020, 1, 1);
            certificate.not_after = date_time_ymd(2020, 12, 31);
        }
        let issuer = if kind == Kind::UnknownIssuer { &self.unknown } else { &self.authority };
        let key = KeyPair::generate()?;
        let certificate = certificate.signed_by(&key, issuer)?;
        let files = Files {
            certificate: self.path(&format!("{kind:?}.pem")),
            key: self.path(&format!("{kind:?}.key.pem")),
        };
        fs::write(&files.certificate, certificate.pem())?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}

fn authority(name: &str) -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut certificate = CertificateParams::default();
    certificate.distinguished_name.push(DnType::CommonName, name);
    certificate.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    certificate.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(CertifiedIssuer::self_signed(certificate, KeyPair::generate()?)?)
}
