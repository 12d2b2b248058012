//! Builds the published OTLP exporters on connections that are made here, so that TLS has one provider,
//! a silent connection is closed, and failures report their cause.

use crate::{
    config::{ConfigError, OtlpConfig, Protocol},
    outage::note_cause,
};
use async_trait::async_trait;
use http::header;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
#[cfg(feature = "otlp-grpc")]
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, hyper::HyperClient};
use opentelemetry_otlp::{LogExporter, MetricExporter, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::metrics::Temporality;
use std::time::Duration;
#[cfg(feature = "otlp-grpc")]
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may be silent after a request, as a fraction of the request's time-out. It is below
/// 1, because a request that times out writes to the connection, and each write restarts the wait.
#[cfg(feature = "otlp-grpc")]
const MAX_SILENCE: f64 = 0.95;

/// Builds an exporter. (The builders of the three kinds have no common trait.)
macro_rules! exporter {
    ($builder:expr, $config:expr) => {{
        let exporter = match $config.protocol {
            #[cfg(feature = "otlp-grpc")]
            Protocol::Grpc => grpc($builder.with_tonic(), $config)?.build(),
            _ => http($builder.with_http(), $config)?.build(),
        };
        exporter.map_err(|error| ConfigError::new("OTEL_EXPORTER_OTLP", error.to_string()))
    }};
}

/// Builds the exporter that sends spans.
pub(crate) fn span_exporter(config: &OtlpConfig) -> Result<SpanExporter, ConfigError> {
    exporter!(SpanExporter::builder(), config)
}

/// Builds the exporter that sends metrics.
pub(crate) fn metric_exporter(
    config: &OtlpConfig,
    temporality: Temporality,
) -> Result<MetricExporter, ConfigError> {
    exporter!(MetricExporter::builder().with_temporality(temporality), config)
}

/// Builds the exporter that sends log records.
pub(crate) fn log_exporter(config: &OtlpConfig) -> Result<LogExporter, ConfigError> {
    exporter!(LogExporter::builder(), config)
}

/// Configures an exporter for gRPC. The library itself reads the headers from the environment. [`OtlpConfig`]
/// has already checked them.
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
    let client = client(config.tls.as_deref(), config.timeout);
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
    let endpoint =
        Endpoint::from(config.endpoint.clone()).connect_timeout(CONNECT_TIMEOUT).timeout(config.timeout);
    let endpoint = match &config.tls {
        Some(tls) => endpoint
            .tls_config(tls.tonic.clone())
            .map_err(|error| ConfigError::new("OTEL_EXPORTER_OTLP_CERTIFICATE", error.to_string()))?,
        None => endpoint,
    };
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.enforce_http(false);
    // If a connection dies silently, the time-out closes it, and the next request opens another one. HTTP/2
    // pings would also detect this, but gRPC servers close a connection on which pings come more often than
    // every five minutes.
    let mut connector = TimeoutConnector::new(connector);
    // `Duration::MAX` means no time-out. As a time-out of the connection, it would overflow.
    let silence = (config.timeout < Duration::MAX).then(|| config.timeout.mul_f64(MAX_SILENCE));
    connector.set_read_timeout(silence);
    connector.set_reset_reader_on_write(true);
    Ok(endpoint.connect_with_connector_lazy(connector))
}

/// Makes an HTTP client for the exporters of this crate.
pub(crate) fn client(tls: Option<&tls::Client>, timeout: Duration) -> Client {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    connector.enforce_http(false);
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls.map_or_else(tls::without_authorities, |tls| (*tls.rustls).clone()))
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Client(HyperClient::new(connector, timeout, None))
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
