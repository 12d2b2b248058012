//! TLS in front of a server without TLS, such as a test's broker. The front does the server's part of the
//! handshake, and passes the decrypted bytes on.

use crate::certificates::Files;
use anyhow::Result;
use loopback::background::Background;
use std::{net::SocketAddr, sync::Arc};
use tokio::{
    io::{AsyncWriteExt, copy, copy_bidirectional, sink},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

/// A running TLS server. It stops when it is dropped.
pub struct TlsFront {
    /// The address that the TLS server listens on.
    pub address: SocketAddr,
    _runtime: Background,
}

impl TlsFront {
    /// Listens on a free port, for connections to `target`. If `client_ca` is the certificate file of an
    /// authority, only clients with a certificate of that authority can connect.
    ///
    /// # Errors
    /// If a file can't be read.
    pub fn start(target: SocketAddr, files: &Files, client_ca: Option<&str>) -> Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match client_ca {
            Some(file) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_file(file)?)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build()?)
            }
            None => builder.with_no_client_auth(),
        };
        let certificate = CertificateDer::from_pem_file(&files.certificate)?;
        let mut config =
            builder.with_single_cert(vec![certificate], PrivateKeyDer::from_pem_file(&files.key)?)?;
        // gRPC insists on ALPN. A client that offers no protocols, as for AMQP, connects without ALPN.
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let runtime = Background::start(1, 1)?;
        let listener = runtime.listen(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = listener.local_addr()?;
        runtime.spawn(accept(listener, TlsAcceptor::from(Arc::new(config)), target));
        Ok(Self { address, _runtime: runtime })
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, target: SocketAddr) {
    while let Ok((client, _)) = listener.accept().await {
        let tls = tls.clone();
        tokio::spawn(async move {
            let mut client = match tls.accept(client).into_fallible().await {
                Ok(client) => client,
                Err((error, mut client)) => {
                    // The connection stays open until the client closes it, so that the client reads the
                    // alert before a reset.
                    client.shutdown().await?;
                    copy(&mut client, &mut sink()).await?;
                    return Err(error);
                }
            };
            let mut server = TcpStream::connect(target).await?;
            copy_bidirectional(&mut client, &mut server).await
        });
    }
}
