//! Tests which configuration results from the variables.

use super::*;
use std::ffi::OsString;

fn read(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let lookup = |name: &str| {
        let found = variables.iter().find(|(variable, _)| *variable == name);
        found.map(|(_, value)| OsString::from(value))
    };
    Config::read("api", "1.2.3", &Environment(&lookup))
}

fn otlp(variables: &[(&str, &str)]) -> OtlpConfig {
    match read(variables).unwrap().exporters.remove(0) {
        Exporter::Otlp(otlp) => otlp,
        other => panic!("{other:?}"),
    }
}

fn attribute(config: &Config, key: &'static str) -> String {
    config.resource.get(&key.into()).map(|value| value.to_string()).unwrap_or_default()
}

#[test]
fn defaults_are_those_of_the_specification() {
    let config = read(&[]).unwrap();
    assert_eq!(format!("{:?}", config.sampler), "ParentBased(AskedBy(AlwaysOn))");
    assert_eq!(config.propagators, [Propagator::TraceContext, Propagator::Baggage]);
    assert_eq!(config.limits.max_attributes_per_span, 128);
    assert_eq!(config.batch.schedule_delay, Duration::from_secs(5));
    assert_eq!(config.batch.max_export_batch_size, 512);
    assert!(!config.sdk_disabled);
    assert_eq!(otlp(&[]).endpoint, "http://127.0.0.1:4317");
}

#[test]
fn an_empty_value_is_an_unset_one() {
    let empty =
        ["OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_TRACES_SAMPLER", "RUST_LOG"].map(|v| (v, " "));
    assert!(read(&empty).is_ok());
}

#[test]
fn what_cannot_be_honoured_is_an_error_that_names_its_variable() {
    for (variable, value) in [
        ("OTEL_SDK_DISABLED", "yes"),
        ("OTEL_CONFIG_FILE", "/etc/otel.yaml"),
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("OTEL_TRACES_EXPORTER", "otlp,none"),
        ("OTEL_TRACES_EXPORTER", "otlp,,zipkin"),
        ("OTEL_PROPAGATORS", "tracecontext,xray"),
        ("OTEL_PROPAGATORS", "none,b3"),
        ("OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS", "GET,,POST"),
        ("OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS", "GET POST"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.5"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/xml"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://localhost"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:secret@collector"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "not a url"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:431700"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret%0a"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "ok=1,Content-Length=5"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "transfer-encoding=chunked"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "grpc-timeout=1n"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "-1"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "br"),
        ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "/no/such/ca.pem"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/no/such/key.pem"),
        ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "Cargo.toml"),
        ("OTEL_METRICS_EXPORTER", "statsd"),
        ("OTEL_METRICS_EXPORTER", "none,otlp"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "31557600001"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "soon"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "18446744073709551615"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "sometimes"),
        ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "base2_exponential_bucket_histogram"),
        ("OTEL_LOGS_EXPORTER", "prometheus"),
        ("OTEL_BLRP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "3000"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "1000001"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "20000"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ("OTEL_BSP_SCHEDULE_DELAY", "18446744073709551615"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "18446744073709551615"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "18446744073709551615"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "x"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team"),
        ("OTEL_RESOURCE_ATTRIBUTES", "=x"),
        ("OTEL_RESOURCE_ATTRIBUTES", "%ff=x"),
        ("OTEL_RESOURCE_ATTRIBUTES", "k=%ff"),
        ("LOG_FORMAT", "xml"),
        ("RUST_LOG", "api=loud"),
    ] {
        let error = read(&[(variable, value)]).expect_err(variable).to_string();
        assert!(error.starts_with(variable), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn a_ratio_outside_of_0_to_1_is_an_error() {
    for ratio in ["1.1", "-0.1", "NaN", "half"] {
        let variables = [("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", ratio)];
        assert!(read(&variables).is_err(), "{ratio}");
    }
}

#[test]
fn samplers_are_chosen_by_name() {
    for (name, sampler) in [
        ("always_on", "AlwaysOn"),
        ("always_off", "AlwaysOff"),
        ("traceidratio", "TraceIdRatioBased(1.0)"),
        ("parentbased_always_on", "ParentBased(AskedBy(AlwaysOn))"),
        ("parentbased_always_off", "ParentBased(AskedBy(AlwaysOff))"),
        ("parentbased_traceidratio", "ParentBased(AskedBy(TraceIdRatioBased(1.0)))"),
        ("Parentbased_Always_OFF", "ParentBased(AskedBy(AlwaysOff))"),
    ] {
        assert_eq!(format!("{:?}", read(&[("OTEL_TRACES_SAMPLER", name)]).unwrap().sampler), sampler);
    }
    let variables = [("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.25")];
    assert_eq!(format!("{:?}", read(&variables).unwrap().sampler), "TraceIdRatioBased(0.25)");
}

#[test]
#[cfg(feature = "zipkin")]
fn several_exporters_are_used_at_once_each_once() {
    let config = read(&[("OTEL_TRACES_EXPORTER", "otlp, Console,OTLP,zipkin")]).unwrap();
    assert!(matches!(config.exporters[..], [Exporter::Otlp(_), Exporter::Console, Exporter::Zipkin { .. }]));
    assert!(read(&[("OTEL_TRACES_EXPORTER", "none")]).unwrap().exporters.is_empty());
}

#[test]
fn http_endpoint_is_a_base_unless_it_is_for_traces() {
    let http = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
    assert_eq!(otlp(&[http]).endpoint, "http://127.0.0.1:4318/v1/traces");
    for (base, endpoint) in [
        ("http://c:4318/otel", "http://c:4318/otel/v1/traces"),
        ("https://c:4318/otel/", "https://c:4318/otel/v1/traces"),
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/otel?key=1", "http://c:4318/otel/v1/traces?key=1"),
    ] {
        assert_eq!(otlp(&[http, ("OTEL_EXPORTER_OTLP_ENDPOINT", base)]).endpoint, endpoint);
    }
    let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://t:4318/mine");
    assert_eq!(
        otlp(&[http, traces, ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c")]).endpoint,
        "http://t:4318/mine"
    );
}

#[test]
fn each_signal_has_its_own_path_and_its_own_variables() {
    let config = read(&[
        ("OTEL_METRICS_EXPORTER", "otlp"),
        ("OTEL_LOGS_EXPORTER", "otlp"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"),
        ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://l"),
        ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "7"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "Delta"),
    ])
    .unwrap();
    let [MetricsExporter::Otlp(metrics, Temporality::Delta)] = &config.metrics.exporters[..] else {
        panic!("{:?}", config.metrics);
    };
    assert_eq!((&*metrics.endpoint.to_string(), metrics.timeout.as_millis()), ("http://c/v1/metrics", 7));
    assert_eq!(metrics.protocol, Protocol::HttpJson);
    let [LogsExporter::Otlp(logs)] = &config.logs.exporters[..] else {
        panic!("{:?}", config.logs);
    };
    assert_eq!((logs.endpoint.to_string(), logs.protocol), ("http://l/".to_owned(), Protocol::Grpc));
}

#[test]
fn neither_metrics_nor_log_records_are_exported_unless_asked_for() {
    let config = read(&[]).unwrap();
    assert!(config.metrics.exporters.is_empty() && config.logs.exporters.is_empty());
}

#[test]
fn the_specific_variable_comes_before_the_general_one() {
    let config = otlp(&[
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "none"),
    ]);
    assert_eq!(config.timeout, Duration::MAX);
    assert_eq!(config.compression, None);
}

#[test]
fn the_service_name_has_three_sources_in_order() {
    assert_eq!(attribute(&read(&[]).unwrap(), "service.name"), "api");
    let by_resource = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=r,te%61m=a%2Cb,service.version=9");
    let config = read(&[by_resource]).unwrap();
    assert_eq!(attribute(&config, "service.name"), "r");
    assert_eq!(attribute(&config, "team"), "a,b");
    assert_eq!(attribute(&config, "service.version"), "9");
    assert_eq!(attribute(&read(&[by_resource, ("OTEL_SERVICE_NAME", "s")]).unwrap(), "service.name"), "s");
}

#[test]
fn limits_fall_back_to_the_general_ones() {
    let config =
        read(&[("OTEL_ATTRIBUTE_COUNT_LIMIT", "7"), ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "100")]).unwrap();
    assert_eq!(config.limits.max_attributes_per_span, 7);
    assert_eq!(config.value_length_limit, Some(100));
}

#[test]
fn every_limit_has_its_variable() {
    let config = read(&[
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "99"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "1"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "2"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "3"),
        ("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "4"),
        ("OTEL_LINK_ATTRIBUTE_COUNT_LIMIT", "5"),
    ]);
    let limits = config.unwrap().limits;
    assert_eq!(limits.max_attributes_per_span, 1);
    assert_eq!(limits.max_events_per_span, 2);
    assert_eq!(limits.max_links_per_span, 3);
    assert_eq!(limits.max_attributes_per_event, 4);
    assert_eq!(limits.max_attributes_per_link, 5);
}

#[test]
fn a_small_queue_has_small_batches() {
    assert_eq!(read(&[("OTEL_BSP_MAX_QUEUE_SIZE", "100")]).unwrap().batch.max_export_batch_size, 100);
}

#[test]
fn metrics_are_served_where_prometheus_is_told_to_look() {
    let metrics = |variables: &[(&str, &str)]| match read(variables).unwrap().metrics.exporters[..] {
        [MetricsExporter::Prometheus(address)] => Some(address.to_string()),
        _ => None,
    };
    assert_eq!(metrics(&[("OTEL_EXPORTER_PROMETHEUS_PORT", "1")]), None);
    assert_eq!(metrics(&[("OTEL_METRICS_EXPORTER", "prometheus")]).unwrap(), "127.0.0.1:9464");
    let elsewhere = [
        ("OTEL_METRICS_EXPORTER", "prometheus"),
        ("OTEL_EXPORTER_PROMETHEUS_HOST", "::"),
        ("OTEL_EXPORTER_PROMETHEUS_PORT", "1"),
    ];
    assert_eq!(metrics(&elsewhere).unwrap(), "[::]:1");
    for (variable, value) in
        [("OTEL_EXPORTER_PROMETHEUS_HOST", "example.com"), ("OTEL_EXPORTER_PROMETHEUS_PORT", "65536")]
    {
        let error = read(&[(variable, value), ("OTEL_METRICS_EXPORTER", "prometheus")]).unwrap_err();
        assert!(error.to_string().starts_with(variable), "{error}");
    }
}
