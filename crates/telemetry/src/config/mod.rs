//! The `OTEL_*` variables, read and validated before any connection or port opens.
//!
//! Names, meanings and defaults are those of the OpenTelemetry specification ("Environment Variable
//! Specification", "OTLP Exporter Configuration"). docs/configuration.md lists every variable, with the test
//! that covers it. One thing is stricter here. If a value can't be honoured, the specification says to warn
//! and to use a default, but this crate returns an error. So a service either runs as configured, or does not
//! start.

mod environment;
mod otlp;

pub use environment::ConfigError;
pub(crate) use otlp::{OtlpConfig, Protocol, Signal};

use crate::{log, semconv};
use environment::{Environment, parse, unknown};
use http::Method;
use opentelemetry::KeyValue;
use opentelemetry_sdk::{
    Resource,
    metrics::Temporality,
    trace::{Sampler, SpanLimits},
};
use percent_encoding::percent_decode_str;
use propagation::{AskedBy, Propagator};
use std::{
    env,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

const VALUE_LENGTH: [&str; 2] =
    ["OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"];

/// The variable that lists the known methods, in place of the default (semantic conventions 1.45, HTTP
/// spans, `http.request.method`). The comparison is case-sensitive.
pub(crate) const KNOWN_METHODS_VARIABLE: &str = "OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS";

const MAX_QUEUE_SIZE: usize = 1_000_000;

/// The configuration of tracing, metrics and logging in this process.
#[derive(Debug)]
pub struct Config {
    pub(crate) resource: Resource,
    /// Where spans are sent: to each of these exporters, or nowhere if there are none.
    pub(crate) exporters: Vec<Exporter>,
    pub(crate) sampler: Sampler,
    pub(crate) propagators: Vec<Propagator>,
    pub(crate) limits: SpanLimits,
    /// String values of attributes are cut to this many characters.
    pub(crate) value_length_limit: Option<usize>,
    pub(crate) batch: BatchConfig,
    /// Members of baggage that become attributes of every span.
    pub(crate) baggage_attributes: Vec<String>,
    pub(crate) sdk_disabled: bool,
    pub(crate) metrics: MetricsConfig,
    pub(crate) logs: LogsConfig,
    pub(crate) log: log::Config,
}

/// Where spans are sent, and how.
#[derive(Debug, Clone)]
pub(crate) enum Exporter {
    Otlp(OtlpConfig),
    #[cfg(feature = "zipkin")]
    Zipkin {
        endpoint: http::Uri,
        timeout: Duration,
    },
    Console,
}

/// `OTEL_METRICS_EXPORTER` and `OTEL_METRIC_*`
#[derive(Debug)]
pub(crate) struct MetricsConfig {
    pub exporters: Vec<MetricsExporter>,
    /// The time from one export to the next.
    pub interval: Duration,
    /// The longest time for one export.
    pub timeout: Duration,
}

/// Where metrics are sent, and how.
#[derive(Debug)]
pub(crate) enum MetricsExporter {
    Otlp(OtlpConfig, Temporality),
    /// The address at which Prometheus fetches the metrics.
    Prometheus(SocketAddr),
    Console,
}

/// `OTEL_LOGS_EXPORTER` and `OTEL_BLRP_*`
#[derive(Debug)]
pub(crate) struct LogsConfig {
    pub exporters: Vec<LogsExporter>,
    pub batch: BatchConfig,
}

/// Where log records are sent in addition to standard error, and how.
#[derive(Debug)]
pub(crate) enum LogsExporter {
    Otlp(OtlpConfig),
    Console,
}

/// The settings `OTEL_BSP_*` for spans, and `OTEL_BLRP_*` for log records.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchConfig {
    /// The longest time that a span or log record waits for its batch to fill.
    pub schedule_delay: Duration,
    /// The longest time for the export of one batch, retries included.
    pub export_timeout: Duration,
    /// The maximum number of waiting spans or log records. Further ones are dropped.
    pub max_queue_size: usize,
    pub max_export_batch_size: usize,
}

impl Config {
    /// Reads the environment of this process.
    ///
    /// `service_name` and `service_version` are used unless `OTEL_SERVICE_NAME` or
    /// `OTEL_RESOURCE_ATTRIBUTES` say otherwise.
    ///
    /// # Errors
    /// If a variable has a value that is unknown or malformed, or that contradicts another variable.
    pub fn from_env(service_name: &'static str, service_version: &'static str) -> Result<Self, ConfigError> {
        Self::read(service_name, service_version, &Environment(&|name| env::var_os(name)))
    }

    fn read(name: &'static str, version: &'static str, env: &Environment) -> Result<Self, ConfigError> {
        if env.get("OTEL_CONFIG_FILE")?.is_some() {
            return Err(ConfigError::new("OTEL_CONFIG_FILE", "declarative configuration is not supported"));
        }
        known_methods(env)?;
        Ok(Self {
            resource: resource(name, version, env)?,
            exporters: exporters(env)?,
            sampler: sampler(env)?,
            propagators: propagators(env)?,
            limits: span_limits(env)?,
            value_length_limit: match env.first(&VALUE_LENGTH)? {
                None => None,
                Some((variable, value)) => Some(parse(variable, &value, "a number of characters")?),
            },
            // The specification's default queue of 2,048 spans overflows at 2,000 logins per second.
            batch: batch(env, "OTEL_BSP_", [5_000, 16_384])?,
            baggage_attributes: match env.get("BAGGAGE_SPAN_ATTRIBUTES")? {
                None => Vec::new(),
                Some(keys) => keys.split(',').map(|key| key.trim().to_owned()).collect(),
            },
            sdk_disabled: env.boolean("OTEL_SDK_DISABLED")?,
            metrics: metrics(env)?,
            logs: logs(env)?,
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

/// Builds the resource, which describes this process in every span (semantic conventions 1.45, resources).
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
    // If a key has several values, the last one is kept.
    Ok(Resource::builder_empty()
        .with_detector(Box::new(opentelemetry_sdk::resource::TelemetryResourceDetector))
        .with_schema_url(attributes, semconv::SCHEMA_URL)
        .build())
}

fn exporters(env: &Environment) -> Result<Vec<Exporter>, ConfigError> {
    const VARIABLE: &str = "OTEL_TRACES_EXPORTER";

    let exporter = |name: &String| match name.as_str() {
        "otlp" => Ok(Exporter::Otlp(OtlpConfig::read(env, Signal::Traces)?)),
        #[cfg(feature = "zipkin")]
        "zipkin" => Ok(Exporter::Zipkin {
            endpoint: env.endpoint(&["OTEL_EXPORTER_ZIPKIN_ENDPOINT"])?.map_or_else(
                || http::Uri::from_static("http://127.0.0.1:9411/api/v2/spans"),
                |(_, endpoint)| endpoint,
            ),
            timeout: env.timeout(&["OTEL_EXPORTER_ZIPKIN_TIMEOUT"], 10_000)?,
        }),
        "console" => Ok(Exporter::Console),
        other => Err(unknown(VARIABLE, other, "otlp, zipkin, console, none")),
    };
    exporter_names(env, VARIABLE, "otlp")?.iter().map(exporter).collect()
}

/// Returns the exporters that a variable names, each only once. For `none`, returns an empty list. `default`
/// is the value of an unset variable.
fn exporter_names(env: &Environment, variable: &str, default: &str) -> Result<Vec<String>, ConfigError> {
    let mut names = env.list(variable, default)?;
    if names.iter().any(|name| name == "none") {
        if names.len() > 1 {
            return Err(ConfigError::new(
                variable,
                "the value \"none\" can't be combined with other exporters",
            ));
        }
        names.clear();
    }
    Ok(names)
}

/// Reads where metrics are sent. The specification's default is `otlp`. Here it is `none`, because Jaeger
/// does not accept metrics.
fn metrics(env: &Environment) -> Result<MetricsConfig, ConfigError> {
    const VARIABLE: &str = "OTEL_METRICS_EXPORTER";
    const TEMPORALITY: &str = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE";
    const HISTOGRAM: &str = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION";

    let temporality = match env.name(&[TEMPORALITY])? {
        None => Temporality::Cumulative,
        Some((_, name)) => match name.as_str() {
            "cumulative" => Temporality::Cumulative,
            "delta" => Temporality::Delta,
            "lowmemory" => Temporality::LowMemory,
            other => return Err(unknown(TEMPORALITY, other, "cumulative, delta, lowmemory")),
        },
    };
    if let Some((_, name)) = env.name(&[HISTOGRAM])?
        && name != "explicit_bucket_histogram"
    {
        return Err(unknown(HISTOGRAM, &name, "explicit_bucket_histogram"));
    }
    let exporter = |name: &String| match name.as_str() {
        "otlp" => Ok(MetricsExporter::Otlp(OtlpConfig::read(env, Signal::Metrics)?, temporality)),
        "prometheus" => Ok(MetricsExporter::Prometheus(prometheus(env)?)),
        "console" => Ok(MetricsExporter::Console),
        other => Err(unknown(VARIABLE, other, "otlp, prometheus, console, none")),
    };
    Ok(MetricsConfig {
        exporters: exporter_names(env, VARIABLE, "none")?.iter().map(exporter).collect::<Result<_, _>>()?,
        interval: match env.milliseconds(&["OTEL_METRIC_EXPORT_INTERVAL"], 60_000)? {
            Duration::ZERO => {
                return Err(ConfigError::new("OTEL_METRIC_EXPORT_INTERVAL", "expected a number above 0"));
            }
            interval => interval,
        },
        timeout: env.timeout(&["OTEL_METRIC_EXPORT_TIMEOUT"], 30_000)?,
    })
}

fn prometheus(env: &Environment) -> Result<SocketAddr, ConfigError> {
    const HOST: &str = "OTEL_EXPORTER_PROMETHEUS_HOST";

    let host = match env.get(HOST)?.as_deref() {
        None | Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some(host) => parse(HOST, host, "localhost or an IP address")?,
    };
    Ok(SocketAddr::new(host, env.number(&["OTEL_EXPORTER_PROMETHEUS_PORT"], 9464)?))
}

/// Reads where log records are sent. The specification's default is `otlp`. Here it is `none`, because Jaeger
/// does not accept log records.
fn logs(env: &Environment) -> Result<LogsConfig, ConfigError> {
    const VARIABLE: &str = "OTEL_LOGS_EXPORTER";

    let exporter = |name: &String| match name.as_str() {
        "otlp" => Ok(LogsExporter::Otlp(OtlpConfig::read(env, Signal::Logs)?)),
        "console" => Ok(LogsExporter::Console),
        other => Err(unknown(VARIABLE, other, "otlp, console, none")),
    };
    Ok(LogsConfig {
        exporters: exporter_names(env, VARIABLE, "none")?.iter().map(exporter).collect::<Result<_, _>>()?,
        batch: batch(env, "OTEL_BLRP_", [1_000, 2_048])?,
    })
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
    let parent_based = |root| Sampler::ParentBased(Box::new(AskedBy(root)));
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
        None if name == "none" => {
            Err(ConfigError::new(VARIABLE, "the value \"none\" can't be combined with other propagators"))
        }
        None => Err(unknown(VARIABLE, name, "tracecontext, baggage, b3, b3multi, jaeger, none")),
    };
    names.iter().map(propagator).collect()
}

/// Checks the list of known methods, which the HTTP layer reads by itself.
fn known_methods(env: &Environment) -> Result<(), ConfigError> {
    let list = env.get(KNOWN_METHODS_VARIABLE)?.unwrap_or_default();
    for method in list.split(',').map(str::trim).filter(|_| !list.is_empty()) {
        if Method::from_bytes(method.as_bytes()).is_err() {
            let problem = format!("expected methods like GET,POST, found {method:?}");
            return Err(ConfigError::new(KNOWN_METHODS_VARIABLE, problem));
        }
    }
    Ok(())
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

/// Reads the variables of a batch processor, whose names begin with `prefix`. `delay` is the default
/// delay in milliseconds, and `queue` is the default size of the queue.
fn batch(env: &Environment, prefix: &str, [delay, queue]: [u64; 2]) -> Result<BatchConfig, ConfigError> {
    let variable = |name: &str| format!("{prefix}{name}");
    let (queue_variable, batch_variable) = (variable("MAX_QUEUE_SIZE"), variable("MAX_EXPORT_BATCH_SIZE"));

    let max_queue_size = env.number(&[&queue_variable], queue as usize)?;
    // For a small queue, the default batch size is reduced. A configured batch size must fit into the queue.
    let max_export_batch_size = env.number(&[&batch_variable], max_queue_size.min(512))?;
    for (variable, size) in [(&queue_variable, max_queue_size), (&batch_variable, max_export_batch_size)] {
        if size == 0 {
            return Err(ConfigError::new(variable, "expected a number above 0"));
        }
        // The SDK allocates the whole queue at the start.
        if size > MAX_QUEUE_SIZE {
            return Err(ConfigError::new(variable, format!("expected at most {MAX_QUEUE_SIZE}")));
        }
    }
    if max_export_batch_size > max_queue_size {
        let problem = format!("{max_export_batch_size} is more than {queue_variable}, {max_queue_size}");
        return Err(ConfigError::new(&batch_variable, problem));
    }
    Ok(BatchConfig {
        schedule_delay: env.milliseconds(&[&variable("SCHEDULE_DELAY")], delay)?,
        export_timeout: env.timeout(&[&variable("EXPORT_TIMEOUT")], 30_000)?,
        max_queue_size,
        max_export_batch_size,
    })
}

#[cfg(test)]
mod tests;
