//! Builds the published OTLP exporters on connections that are made here, so that TLS has one provider,
//! a silent connection is given up, and failures report their cause.

use crate::{
    config::{ConfigError, OtlpConfig, Pem, Protocol, Tls},
    outage::note_cause,
};
use async_trait::async_trait;
use http::{Uri, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
#[cfg(feature = "otlp-grpc")]
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, hyper::HyperClient};
use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithExportConfig, WithHttpConfig,
};
use opentelemetry_sdk::metrics::Temporality;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use std::{fmt::Display, sync::Arc, time::Duration};
#[cfg(feature = "otlp-grpc")]
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may be silent after a request, as a part of the request's time-out. It is less than
/// the whole, because a request that times out writes to the connection, which begins the wait anew.
#[cfg(feature = "otlp-grpc")]
const MAX_SILENCE: f64 = 0.95;

/// Builds the exporter that sends spans.
pub(crate) fn span_exporter(config: &OtlpConfig) -> Result<SpanExporter, ConfigError> {
    let builder = SpanExporter::builder();
    built(match config.protocol {
        #[cfg(feature = "otlp-grpc")]
        Protocol::Grpc => grpc(builder.with_tonic(), config)?.build(),
        _ => http(builder.with_http(), config)?.build(),
    })
}

/// Builds the exporter that sends metrics.
pub(crate) fn metric_exporter(
    config: &OtlpConfig,
    temporality: Temporality,
) -> Result<MetricExporter, ConfigError> {
    let builder = MetricExporter::builder().with_temporality(temporality);
    built(match config.protocol {
        #[cfg(feature = "otlp-grpc")]
        Protocol::Grpc => grpc(builder.with_tonic(), config)?.build(),
        _ => http(builder.with_http(), config)?.build(),
    })
}

/// Builds the exporter that sends log records.
pub(crate) fn log_exporter(config: &OtlpConfig) -> Result<LogExporter, ConfigError> {
    let builder = LogExporter::builder();
    built(match config.protocol {
        #[cfg(feature = "otlp-grpc")]
        Protocol::Grpc => grpc(builder.with_tonic(), config)?.build(),
        _ => http(builder.with_http(), config)?.build(),
    })
}

fn built<E>(exporter: Result<E, ExporterBuildError>) -> Result<E, ConfigError> {
    exporter.map_err(|error| ConfigError::new("OTEL_EXPORTER_OTLP", error.to_string()))
}

/// The library reads the headers from the environment itself; [`OtlpConfig`] has already checked them.
#[cfg(feature = "otlp-grpc")]
fn grpc<B: WithExportConfig + opentelemetry_otlp::WithTonicConfig>(
    builder: B,
    config: &OtlpConfig,
) -> Result<B, ConfigError> {
    let builder = builder.with_channel(channel(config)?).with_timeout(config.timeout);
    Ok(match config.compression {
        Some(compression) => builder.with_compression(compression),
        None => builder,
    })
}

fn http<B: WithExportConfig + WithHttpConfig>(builder: B, config: &OtlpConfig) -> Result<B, ConfigError> {
    let client = client(&config.endpoint, &config.tls, config.timeout)?;
    let builder = builder.with_http_client(client).with_endpoint(config.endpoint.to_string());
    let protocol = match config.protocol {
        Protocol::HttpJson => opentelemetry_otlp::Protocol::HttpJson,
        _ => opentelemetry_otlp::Protocol::HttpBinary,
    };
    let builder = builder.with_protocol(protocol).with_timeout(config.timeout);
    Ok(match config.compression {
        Some(compression) => builder.with_compression(compression),
        None => builder,
    })
}

#[cfg(feature = "otlp-grpc")]
fn channel(config: &OtlpConfig) -> Result<Channel, ConfigError> {
    // Check the files here, because tonic's errors do not name them.
    client_config(&config.endpoint, &config.tls)?;
    let endpoint =
        Endpoint::from(config.endpoint.clone()).connect_timeout(CONNECT_TIMEOUT).timeout(config.timeout);
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.enforce_http(false);
    // A connection that died without a word is closed, and the next request gets another one. HTTP/2 pings
    // would tell that too, but gRPC servers close a connection on which they come more often than every five
    // minutes.
    let mut connector = TimeoutConnector::new(connector);
    // Without a time-out, the maximum stands for it, which would be an overflow.
    let silence = (config.timeout < Duration::MAX).then(|| config.timeout.mul_f64(MAX_SILENCE));
    connector.set_read_timeout(silence);
    connector.set_reset_reader_on_write(true);
    if config.endpoint.scheme_str() != Some("https") {
        return Ok(endpoint.connect_with_connector_lazy(connector));
    }
    let Tls { ca, identity } = &*config.tls;
    let mut tls = match ca {
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&pem.bytes)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let Some((certificate, key)) = identity {
        tls = tls.identity(Identity::from_pem(&certificate.bytes, &key.bytes));
    }
    Ok(endpoint.tls_config(tls).map_err(|error| unusable(&error))?.connect_with_connector_lazy(connector))
}

/// Makes an HTTP client for the exporters of this crate.
pub(crate) fn client(endpoint: &Uri, tls: &Tls, timeout: Duration) -> Result<Client, ConfigError> {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    connector.enforce_http(false);
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(client_config(endpoint, tls)?)
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Ok(Client(HyperClient::new(connector, timeout, None)))
}

/// The published client, except that it notes the cause of an error, and treats a web page as an error.
#[derive(Debug)]
pub(crate) struct Client(HyperClient<HttpsConnector<HttpConnector>>);

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let result = self.0.send_bytes(request).await.and_then(|response| {
            if response.status().is_success() && is_page(&response) {
                return Err("the answer is a web page".into());
            }
            Ok(response)
        });
        result.inspect_err(|error| note_cause(error.as_ref()))
    }
}

/// Whether the answer is a web page. Some web servers answer any request with a page, which the exporter
/// would take for success.
fn is_page(response: &Response<Bytes>) -> bool {
    let content_type = response.headers().get(header::CONTENT_TYPE);
    content_type.is_some_and(|content_type| content_type.as_bytes().starts_with(b"text/html"))
}

fn client_config(endpoint: &Uri, tls: &Tls) -> Result<ClientConfig, ConfigError> {
    let mut roots = RootCertStore::empty();
    if let Some(pem) = &tls.ca {
        for certificate in certificates(pem)? {
            roots.add(certificate).map_err(|error| pem.problem(&error))?;
        }
    } else if endpoint.scheme_str() == Some("https") {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(unusable(&"not set, and this system has no CA certificates"));
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&error))?
        .with_root_certificates(roots);
    let Some((certificate, key)) = &tls.identity else {
        return Ok(config.with_no_client_auth());
    };
    let private_key = PrivateKeyDer::from_pem_slice(&key.bytes).map_err(|error| key.problem(&error))?;
    config
        .with_client_auth_cert(certificates(certificate)?, private_key)
        .map_err(|error| certificate.problem(&error))
}

fn certificates(pem: &Pem) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem.bytes).collect();
    let certificates = certificates.map_err(|error| pem.problem(&error))?;
    if certificates.is_empty() {
        return Err(pem.problem(&"there is no certificate in it"));
    }
    Ok(certificates)
}

fn unusable(problem: &dyn Display) -> ConfigError {
    ConfigError::new("OTEL_EXPORTER_OTLP_CERTIFICATE", problem.to_string())
}
