//! Reads `OTEL_EXPORTER_OTLP_*`: where a signal is sent by OTLP, and how (OTLP exporter specification).
//!
//! Each variable exists once for all signals, and once for each signal (like `OTEL_EXPORTER_OTLP_TRACES_…`).
//! The variable for one signal takes precedence.

use super::environment::{ConfigError, Environment, unknown};
use http::{HeaderName, HeaderValue, Uri, uri::PathAndQuery};
use opentelemetry_otlp::Compression;
use percent_encoding::percent_decode_str;
use std::{fmt, path::PathBuf, time::Duration};
use tls::PemFile;

/// The kind of data that is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Traces,
    Metrics,
    Logs,
}

/// `OTEL_EXPORTER_OTLP_PROTOCOL`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// OTLP over gRPC, which needs the feature `otlp-grpc`.
    Grpc,
    HttpProtobuf,
    HttpJson,
}

/// How a signal is exported by OTLP.
#[derive(Clone)]
pub(crate) struct OtlpConfig {
    pub protocol: Protocol,
    /// The address of the server for gRPC, or the whole URL for HTTP.
    pub endpoint: Uri,
    /// The longest time for one request.
    pub timeout: Duration,
    pub compression: Option<Compression>,
    /// The TLS configuration, for an `https` endpoint.
    pub tls: Option<Box<tls::Client>>,
}

impl fmt::Debug for OtlpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, endpoint, timeout, compression, tls: _ } = self;
        write!(f, "OtlpConfig({protocol:?} to {endpoint}, timeout {timeout:?}, {compression:?})")
    }
}

impl Signal {
    /// Returns the names of the signal's own variable and of the general variable.
    fn variables(self, name: &str) -> [String; 2] {
        let signal = match self {
            Self::Traces => "TRACES",
            Self::Metrics => "METRICS",
            Self::Logs => "LOGS",
        };
        [format!("OTEL_EXPORTER_OTLP_{signal}_{name}"), format!("OTEL_EXPORTER_OTLP_{name}")]
    }

    fn path(self) -> &'static str {
        match self {
            Self::Traces => "/v1/traces",
            Self::Metrics => "/v1/metrics",
            Self::Logs => "/v1/logs",
        }
    }
}

impl OtlpConfig {
    pub(super) fn read(env: &Environment, signal: Signal) -> Result<Self, ConfigError> {
        let [own, general] = signal.variables("PROTOCOL");
        let protocol = match env.name(&[&own, &general])? {
            None if cfg!(feature = "otlp-grpc") => Protocol::Grpc,
            None => Protocol::HttpProtobuf,
            Some((variable, value)) => match value.as_str() {
                "grpc" if cfg!(feature = "otlp-grpc") => Protocol::Grpc,
                "grpc" => return Err(ConfigError::new(variable, "grpc is not built in (feature otlp-grpc)")),
                "http/protobuf" => Protocol::HttpProtobuf,
                "http/json" => Protocol::HttpJson,
                other => return Err(unknown(variable, other, "grpc, http/protobuf, http/json")),
            },
        };
        let [own, general] = signal.variables("COMPRESSION");
        let compression = match env.name(&[&own, &general])? {
            None => None,
            Some((variable, value)) => match value.as_str() {
                "gzip" => Some(Compression::Gzip),
                "zstd" => Some(Compression::Zstd),
                "none" => None,
                other => return Err(unknown(variable, other, "gzip, zstd, none")),
            },
        };
        let [own, general] = signal.variables("HEADERS");
        check_headers(env.first(&[&own, &general])?)?;
        let [own, general] = signal.variables("TIMEOUT");
        let timeout = env.timeout(&[&own, &general], 10_000)?;
        let endpoint = endpoint(env, signal, protocol)?;
        let tls = read_tls(env, signal, &endpoint)?;
        Ok(Self { protocol, endpoint, timeout, compression, tls })
    }
}

fn endpoint(env: &Environment, signal: Signal, protocol: Protocol) -> Result<Uri, ConfigError> {
    let [own, general] = signal.variables("ENDPOINT");
    let found = env.endpoint(&[&own, &general])?;
    if protocol == Protocol::Grpc {
        return Ok(found.map_or(Uri::from_static("http://127.0.0.1:4317"), |(_, endpoint)| endpoint));
    }
    match found {
        Some((variable, endpoint)) if variable == own => Ok(endpoint),
        // The general endpoint is a base URL. The signal's path is inserted before the query.
        Some((variable, base)) => with_path(&base, signal.path())
            .ok_or_else(|| ConfigError::new(variable, format!("expected a base URL, found {base}"))),
        None => Ok(with_path(&Uri::from_static("http://127.0.0.1:4318"), signal.path()).unwrap_or_default()),
    }
}

fn with_path(base: &Uri, path: &str) -> Option<Uri> {
    let query = base.query().map(|query| format!("?{query}")).unwrap_or_default();
    let path = format!("{}{path}{query}", base.path().trim_end_matches('/'));
    let mut parts = base.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path).ok()?);
    Uri::from_parts(parts).ok()
}

/// Checks `key=value,key=value`, in which the values are percent-encoded. The exporter reads the variable
/// itself, and leaves out the headers that it can't read. Errors name the position of a header instead of its
/// content, because the content may be a credential.
fn check_headers(setting: Option<(&str, String)>) -> Result<(), ConfigError> {
    let Some((variable, list)) = setting else {
        return Ok(());
    };
    let pairs = list.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    for (i, pair) in pairs.enumerate() {
        let name = pair.split_once('=').and_then(|(name, value)| {
            let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
            HeaderValue::from_str(&value).ok()?;
            HeaderName::from_bytes(name.trim().as_bytes()).ok()
        });
        let problem = match name {
            None => format!("header {} is not key=value", i + 1),
            Some(name) if is_of_the_protocol(name.as_str()) => {
                format!("header {name} belongs to the protocol")
            }
            Some(_) => continue,
        };
        return Err(ConfigError::new(variable, problem));
    }
    Ok(())
}

/// Whether the exporter sets this header itself. Another value would break each request, and some receivers
/// would still answer with success.
fn is_of_the_protocol(name: &str) -> bool {
    const HEADERS: [&str; 10] = [
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "transfer-encoding",
        "upgrade",
    ];
    HEADERS.contains(&name) || name.starts_with("grpc-")
}

/// Reads the files for TLS. For an `http` endpoint, the files are checked but not used.
fn read_tls(
    env: &Environment,
    signal: Signal,
    endpoint: &Uri,
) -> Result<Option<Box<tls::Client>>, ConfigError> {
    let is_used = endpoint.scheme_str() == Some("https");
    let mut files = Vec::new();
    for name in ["CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"] {
        let [own, general] = signal.variables(name);
        files.push(match env.first(&[&own, &general])? {
            Some((variable, path)) => (variable.to_owned(), Some(PathBuf::from(path))),
            None => (general, None),
        });
    }
    if !is_used && files.iter().all(|(_, path)| path.is_none()) {
        return Ok(None);
    }
    let files = [0, 1, 2].map(|i| PemFile(&files[i].0, files[i].1.as_deref()));
    let tls = tls::Client::read(files, None);
    let tls = tls.map_err(|tls::Error { variable, problem }| ConfigError::new(&variable, problem))?;
    Ok(tls.filter(|_| is_used).map(Box::new))
}
