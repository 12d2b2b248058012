//! The `OTEL_*` variables, read and validated before anything opens.
//!
//! Names, meanings and defaults are those of the OpenTelemetry specification ("Environment Variable
//! Specification", "OTLP Exporter Configuration"); docs/configuration.md lists every one, with the test
//! that shows it. One thing is stricter: where the specification says to warn and go on with a default,
//! a value that can't be honoured is an error here. A service is either right or not started.

mod environment;

use crate::{log, propagation::Propagator};
use environment::{Environment, parse, unknown};
use http::{HeaderName, HeaderValue, Uri};
use opentelemetry::KeyValue;
use opentelemetry_sdk::{Resource, trace::Sampler, trace::SpanLimits};
use percent_encoding::percent_decode_str;
use std::{
    env,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

/// Everything that shapes tracing and logging in this process.
#[derive(Debug)]
pub struct Config {
    pub(crate) resource: Resource,
    /// Spans go to each of these; to nowhere if there is none.
    pub(crate) exporters: Vec<Exporter>,
    pub(crate) sampler: Sampler,
    pub(crate) propagators: Vec<Propagator>,
    pub(crate) limits: SpanLimits,
    pub(crate) batch: BatchConfig,
    /// Members of baggage that become attributes of every span.
    pub(crate) baggage_attributes: Vec<String>,
    pub(crate) sdk_disabled: bool,
    /// Where Prometheus may ask for the metrics, if it may.
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) log: log::Config,
}

/// Where spans go, and how.
#[derive(Debug, Clone)]
pub(crate) enum Exporter {
    Otlp(OtlpConfig),
    Zipkin { endpoint: Uri, timeout: Duration },
    Console,
}

/// `OTEL_EXPORTER_OTLP_*`
#[derive(Clone)]
pub(crate) struct OtlpConfig {
    pub protocol: OtlpProtocol,
    /// For gRPC the server, for HTTP the whole URL.
    pub endpoint: Uri,
    /// May hold credentials: never shown.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Bounds one attempt.
    pub timeout: Duration,
    pub gzip: bool,
}

impl std::fmt::Debug for OtlpConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { protocol, endpoint, headers: _, timeout, gzip } = self;
        write!(f, "OtlpConfig({protocol:?} to {endpoint}, timeout {timeout:?}, gzip {gzip})")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OtlpProtocol {
    Grpc,
    HttpProtobuf,
}

/// `OTEL_BSP_*`, and the limit on values that belongs to encoding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchConfig {
    /// The longest that a span waits for its batch to fill.
    pub schedule_delay: Duration,
    /// Bounds the export of one batch, retries included.
    pub export_timeout: Duration,
    /// Spans held at most; what ends beyond that is dropped.
    pub max_queue_size: usize,
    pub max_export_batch_size: usize,
    /// Longer strings are cut to so many characters.
    pub value_length_limit: Option<usize>,
}

/// A variable whose value can't be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct ConfigError {
    variable: String,
    /// Holds no secret: the values of headers are left out.
    problem: String,
}

impl ConfigError {
    pub(crate) fn new(variable: &str, problem: impl Into<String>) -> Self {
        Self { variable: variable.to_owned(), problem: problem.into() }
    }
}

impl Config {
    /// Reads the environment of this process.
    ///
    /// `service_name` and `service_version` are used unless `OTEL_SERVICE_NAME` or
    /// `OTEL_RESOURCE_ATTRIBUTES` say otherwise.
    ///
    /// # Errors
    /// If a variable has a value that is unknown, malformed, or contradicts another.
    pub fn from_env(service_name: &'static str, service_version: &'static str) -> Result<Self, ConfigError> {
        Self::read(service_name, service_version, &Environment(&|name| env::var_os(name)))
    }

    fn read(name: &'static str, version: &'static str, env: &Environment) -> Result<Self, ConfigError> {
        if env.get("OTEL_CONFIG_FILE")?.is_some() {
            return Err(ConfigError::new("OTEL_CONFIG_FILE", "declarative configuration is not supported"));
        }
        Ok(Self {
            resource: resource(name, version, env)?,
            exporters: exporters(env)?,
            sampler: sampler(env)?,
            propagators: propagators(env)?,
            limits: span_limits(env)?,
            batch: batch(env)?,
            baggage_attributes: match env.get("BAGGAGE_SPAN_ATTRIBUTES")? {
                None => Vec::new(),
                Some(keys) => keys.split(',').map(|key| key.trim().to_owned()).collect(),
            },
            sdk_disabled: env.boolean("OTEL_SDK_DISABLED")?,
            metrics: metrics(env)?,
            log: log::Config {
                format: match env.name(&["LOG_FORMAT"])?.as_ref().map(|(_, name)| name.as_str()) {
                    None | Some("text") => log::Format::Text,
                    Some("json") => log::Format::Json,
                    Some(other) => return Err(unknown("LOG_FORMAT", other, "text, json")),
                },
                filter: env.parse("RUST_LOG", "filter directives like info,api=debug")?,
            },
        })
    }
}

/// What describes this process in every span (semantic conventions 1.45, resources).
fn resource(name: &'static str, version: &'static str, env: &Environment) -> Result<Resource, ConfigError> {
    const VARIABLE: &str = "OTEL_RESOURCE_ATTRIBUTES";

    let mut attributes = crate::resource::detect(name, version);
    if let Some(list) = env.get(VARIABLE)? {
        for pair in list.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let malformed = || ConfigError::new(VARIABLE, format!("expected key=value, found {pair:?}"));
            let (key, value) = pair.split_once('=').ok_or_else(malformed)?;
            let decoded = |text: &str| match percent_decode_str(text.trim()).decode_utf8() {
                Ok(text) => Ok(text.into_owned()),
                Err(_) => Err(malformed()),
            };
            let (key, value) = (decoded(key)?, decoded(value)?);
            if key.is_empty() {
                return Err(malformed());
            }
            attributes.push(KeyValue::new(key, value));
        }
    }
    if let Some(name) = env.get("OTEL_SERVICE_NAME")? {
        attributes.push(KeyValue::new("service.name", name));
    }
    // Of several values for a key the last one stays.
    Ok(Resource::builder_empty()
        .with_detector(Box::new(opentelemetry_sdk::resource::TelemetryResourceDetector))
        .with_attributes(attributes)
        .build())
}

fn exporters(env: &Environment) -> Result<Vec<Exporter>, ConfigError> {
    const VARIABLE: &str = "OTEL_TRACES_EXPORTER";

    let names = env.list(VARIABLE, "otlp")?;
    if names.iter().any(|name| name == "none") && names.len() > 1 {
        return Err(ConfigError::new(VARIABLE, "none contradicts the other exporters"));
    }
    let exporter = |name: &String| match name.as_str() {
        "none" => Ok(None),
        "otlp" => Ok(Some(Exporter::Otlp(otlp(env)?))),
        "zipkin" => Ok(Some(Exporter::Zipkin {
            endpoint: env.endpoint(&["OTEL_EXPORTER_ZIPKIN_ENDPOINT"])?.map_or_else(
                || Uri::from_static("http://127.0.0.1:9411/api/v2/spans"),
                |(_, endpoint)| endpoint,
            ),
            timeout: env.timeout(&["OTEL_EXPORTER_ZIPKIN_TIMEOUT"], 10_000)?,
        })),
        "console" => Ok(Some(Exporter::Console)),
        other => Err(unknown(VARIABLE, other, "otlp, zipkin, console, none")),
    };
    names.iter().filter_map(|name| exporter(name).transpose()).collect()
}

fn otlp(env: &Environment) -> Result<OtlpConfig, ConfigError> {
    const PROTOCOL: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    const ENDPOINT: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    const HEADERS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];
    const TIMEOUT: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"];
    const COMPRESSION: [&str; 2] =
        ["OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"];

    let protocol = match env.name(&PROTOCOL)? {
        None => OtlpProtocol::Grpc,
        Some((variable, value)) => match value.as_str() {
            "grpc" => OtlpProtocol::Grpc,
            "http/protobuf" => OtlpProtocol::HttpProtobuf,
            other => return Err(unknown(variable, other, "grpc, http/protobuf")),
        },
    };
    let endpoint = match (protocol, env.endpoint(&ENDPOINT)?) {
        (OtlpProtocol::Grpc, None) => Uri::from_static("http://127.0.0.1:4317"),
        (OtlpProtocol::Grpc, Some((_, endpoint))) => endpoint,
        (OtlpProtocol::HttpProtobuf, None) => Uri::from_static("http://127.0.0.1:4318/v1/traces"),
        // The general endpoint is a base to which the signal's path is added; the traces endpoint is not.
        (OtlpProtocol::HttpProtobuf, Some((variable, base))) if variable == ENDPOINT[1] => {
            let url = format!("{}/v1/traces", base.to_string().trim_end_matches('/'));
            url.parse()
                .map_err(|_| ConfigError::new(variable, format!("expected a base URL, found {base}")))?
        }
        (OtlpProtocol::HttpProtobuf, Some((_, endpoint))) => endpoint,
    };
    for variable in ["CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"] {
        let variables =
            ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"].map(|v| v.to_owned() + variable);
        if let Some((variable, _)) = env.first(&[&variables[0], &variables[1]])? {
            return Err(ConfigError::new(variable, "TLS is not supported"));
        }
    }
    let gzip = match env.name(&COMPRESSION)? {
        None => false,
        Some((variable, value)) => match value.as_str() {
            "gzip" => true,
            "none" => false,
            other => return Err(unknown(variable, other, "gzip, none")),
        },
    };
    Ok(OtlpConfig {
        protocol,
        endpoint,
        headers: otlp_headers(env.first(&HEADERS)?)?,
        timeout: env.timeout(&TIMEOUT, 10_000)?,
        gzip,
    })
}

/// `key=value,key=value`, the values percent-encoded. Errors tell the position, not the content.
fn otlp_headers(setting: Option<(&str, String)>) -> Result<Vec<(HeaderName, HeaderValue)>, ConfigError> {
    let Some((variable, list)) = setting else {
        return Ok(Vec::new());
    };
    let pairs = list.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_bytes(name.trim().as_bytes()).ok()?, value))
    };
    let numbered = pairs.enumerate().map(|(i, pair)| {
        header(pair).ok_or_else(|| ConfigError::new(variable, format!("header {} is not key=value", i + 1)))
    });
    numbered.collect()
}

/// The specification's default is `otlp`. Here it is `none`: there is one kind of metrics, and it is asked for.
fn metrics(env: &Environment) -> Result<Option<SocketAddr>, ConfigError> {
    const VARIABLE: &str = "OTEL_METRICS_EXPORTER";
    const HOST: &str = "OTEL_EXPORTER_PROMETHEUS_HOST";

    match env.name(&[VARIABLE])?.as_ref().map(|(_, name)| name.as_str()) {
        None | Some("none") => return Ok(None),
        Some("prometheus") => {}
        Some(other) => return Err(unknown(VARIABLE, other, "prometheus, none")),
    }
    let host = match env.get(HOST)?.as_deref() {
        None | Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some(host) => parse(HOST, host, "localhost or an IP address")?,
    };
    Ok(Some(SocketAddr::new(host, env.number(&["OTEL_EXPORTER_PROMETHEUS_PORT"], 9464)?)))
}

fn sampler(env: &Environment) -> Result<Sampler, ConfigError> {
    const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
    const ARG: &str = "OTEL_TRACES_SAMPLER_ARG";

    let name = env.name(&[SAMPLER])?.map(|(_, name)| name);
    let name = name.as_deref().unwrap_or("parentbased_always_on");
    let arg: Option<f64> = env.parse(ARG, "a number from 0 to 1")?;
    if arg.is_some_and(|ratio| !(0.0..=1.0).contains(&ratio)) {
        return Err(ConfigError::new(ARG, "expected a number from 0 to 1"));
    }
    if arg.is_some() && !name.ends_with("traceidratio") {
        return Err(ConfigError::new(ARG, format!("the sampler {name} takes no argument")));
    }
    let ratio = Sampler::TraceIdRatioBased(arg.unwrap_or(1.0));
    let parent_based = |root| Sampler::ParentBased(Box::new(root));
    Ok(match name {
        "always_on" => Sampler::AlwaysOn,
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => ratio,
        "parentbased_always_on" => parent_based(Sampler::AlwaysOn),
        "parentbased_always_off" => parent_based(Sampler::AlwaysOff),
        "parentbased_traceidratio" => parent_based(ratio),
        other => {
            let known = "always_on, always_off, traceidratio, parentbased_always_on, \
                         parentbased_always_off, parentbased_traceidratio";
            return Err(unknown(SAMPLER, other, known));
        }
    })
}

fn propagators(env: &Environment) -> Result<Vec<Propagator>, ConfigError> {
    const VARIABLE: &str = "OTEL_PROPAGATORS";

    let names = env.list(VARIABLE, "tracecontext,baggage")?;
    if names == ["none"] {
        return Ok(Vec::new());
    }
    let propagator = |name: &String| match Propagator::from_name(name) {
        Some(propagator) => Ok(propagator),
        None if name == "none" => Err(ConfigError::new(VARIABLE, "none contradicts the other propagators")),
        None => Err(unknown(VARIABLE, name, "tracecontext, baggage, b3, b3multi, jaeger, none")),
    };
    names.iter().map(propagator).collect()
}

fn span_limits(env: &Environment) -> Result<SpanLimits, ConfigError> {
    let count = |variables: &[&'static str]| env.number(variables, 128);
    let default_attributes = env.number(&["OTEL_ATTRIBUTE_COUNT_LIMIT"], 128)?;
    Ok(SpanLimits {
        max_attributes_per_span: env.number(&["OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"], default_attributes)?,
        max_events_per_span: count(&["OTEL_SPAN_EVENT_COUNT_LIMIT"])?,
        max_links_per_span: count(&["OTEL_SPAN_LINK_COUNT_LIMIT"])?,
        max_attributes_per_event: count(&["OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT"])?,
        max_attributes_per_link: count(&["OTEL_LINK_ATTRIBUTE_COUNT_LIMIT"])?,
    })
}

fn batch(env: &Environment) -> Result<BatchConfig, ConfigError> {
    const QUEUE: &str = "OTEL_BSP_MAX_QUEUE_SIZE";
    const BATCH: &str = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE";
    const VALUE_LENGTH: [&str; 2] =
        ["OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"];

    let max_queue_size = env.number(&[QUEUE], 16_384)?;
    // The default follows a small queue; a value that was given must fit.
    let max_export_batch_size = env.number(&[BATCH], max_queue_size.min(512))?;
    for (variable, size) in [(QUEUE, max_queue_size), (BATCH, max_export_batch_size)] {
        if size == 0 {
            return Err(ConfigError::new(variable, "expected a number above 0"));
        }
    }
    if max_export_batch_size > max_queue_size {
        return Err(ConfigError::new(
            BATCH,
            format!("{max_export_batch_size} is more than {QUEUE}, {max_queue_size}"),
        ));
    }
    Ok(BatchConfig {
        schedule_delay: Duration::from_millis(env.number(&["OTEL_BSP_SCHEDULE_DELAY"], 5_000)?),
        export_timeout: env.timeout(&["OTEL_BSP_EXPORT_TIMEOUT"], 30_000)?,
        max_queue_size,
        max_export_batch_size,
        value_length_limit: match env.first(&VALUE_LENGTH)? {
            None => None,
            Some((variable, value)) => Some(parse(variable, &value, "a number of characters")?),
        },
    })
}

#[cfg(test)]
mod tests;
