//! Checks exported spans, metrics and log records against OpenTelemetry's semantic conventions and against
//! the tables in `docs/conventions.md`.
//!
//! `registry.json` is an extract of version 1.45 of the conventions' registry. It has the attributes and the
//! metrics that this project exports, and the attributes of its kinds of spans. It has no deprecated names,
//! so the check reports deprecated names as unknown.

use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
        trace::v1::ExportTraceServiceRequest,
    },
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    metrics::v1::{self as metrics, metric::Data},
    resource::v1::Resource,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

const PAGE: &str = include_str!("../../../docs/conventions.md");

/// The bounds of a histogram of durations, in seconds.
const SECONDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

static CONVENTIONS: LazyLock<Conventions> = LazyLock::new(Conventions::load);

/// The registry, extended by the tables of `docs/conventions.md`.
#[derive(Deserialize)]
struct Conventions {
    attributes: BTreeMap<String, Attribute>,
    metrics: BTreeMap<String, Metric>,
    /// For each kind of span, the requirement level of each attribute, such as `required`.
    spans: BTreeMap<String, BTreeMap<String, String>>,
    /// The kinds of spans that `docs/conventions.md` lists.
    #[serde(skip)]
    ours: Vec<SpanRow>,
    /// The attributes of each event of a span.
    #[serde(skip)]
    events: BTreeMap<&'static str, BTreeSet<&'static str>>,
    /// The attributes of the resource.
    #[serde(skip)]
    resource: BTreeSet<&'static str>,
}

#[derive(Deserialize)]
struct Attribute {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Deserialize)]
struct Metric {
    attributes: BTreeMap<String, String>,
    instrument: String,
    unit: String,
}

/// A row of the table of spans in `docs/conventions.md`.
struct SpanRow {
    what: &'static str,
    kind: &'static str,
    names: Vec<&'static str>,
    always: BTreeSet<&'static str>,
    sometimes: BTreeSet<&'static str>,
}

/// Returns the part of `docs/conventions.md` below this heading.
fn section(heading: &str) -> &'static str {
    let start = PAGE.find(&format!("\n## {heading}\n")).expect("the page has this heading");
    let section = &PAGE[start + 4..];
    section.split("\n## ").next().unwrap_or_default()
}

/// Returns the rows of the table in this section, without the table's head.
fn rows(heading: &str) -> impl Iterator<Item = Vec<&'static str>> {
    let lines = section(heading).lines().filter(|line| line.starts_with('|')).skip(2);
    lines.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

fn in_backticks(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.split('`').skip(1).step_by(2)
}

impl Conventions {
    fn load() -> Self {
        let mut all: Self =
            serde_json::from_str(include_str!("conventions/registry.json")).expect("the registry is JSON");
        for row in rows("Names of our own").chain(rows("Log records")) {
            let attribute = Attribute { kind: row[1].to_owned(), values: Vec::new() };
            all.attributes.insert(row[0].trim_matches('`').to_owned(), attribute);
        }
        for row in rows("Metrics") {
            let required = in_backticks(row[3]).map(|name| (name.to_owned(), "required".to_owned()));
            let [name, instrument, unit] =
                [row[0], row[1], row[2]].map(|cell| cell.trim_matches('`').to_owned());
            all.metrics.insert(name, Metric { attributes: required.collect(), instrument, unit });
        }
        all.events = rows("Events of spans")
            .map(|row| (row[0].trim_matches('`'), in_backticks(row[1]).collect()))
            .collect();
        all.ours = rows("Spans")
            .map(|row| SpanRow {
                what: row[0],
                kind: row[1],
                names: in_backticks(row[2]).collect(),
                always: in_backticks(row[3]).collect(),
                sometimes: in_backticks(row[4]).collect(),
            })
            .collect();
        all.resource = in_backticks(section("Resource")).filter(|name| name.contains('.')).collect();
        all
    }

    /// Checks the name, the type and the value of each attribute. If `allowed` is empty, any known name is
    /// allowed.
    fn attributes(&self, attributes: &[KeyValue], allowed: &[&BTreeSet<&str>], said: &mut Vec<String>) {
        let mut names = BTreeSet::new();
        for KeyValue { key, value, .. } in attributes {
            if !names.insert(key) {
                said.push(format!("{key} occurs twice"));
            }
            if !is_well_formed(key) {
                said.push(format!("{key} has no namespace, or is not in lower case"));
            }
            let Some(known) = self.attributes.get(key) else {
                said.push(format!("{key} is unknown"));
                continue;
            };
            if !allowed.is_empty() && !allowed.iter().any(|names| names.contains(&**key)) {
                said.push(format!("{key} is not allowed here"));
            }
            let value = value.as_ref().and_then(|value| value.value.as_ref());
            let kind = match value {
                Some(Value::StringValue(_)) => "string",
                Some(Value::IntValue(_)) => "int",
                Some(Value::BoolValue(_)) => "boolean",
                Some(Value::DoubleValue(_)) => "double",
                _ => "another type",
            };
            if kind != known.kind {
                said.push(format!("{key} is of type {kind} instead of {}", known.kind));
            }
            // Any text can be the type of an error.
            if let Some(Value::StringValue(text)) = value
                && key != "error.type"
                && !known.values.is_empty()
                && !known.values.contains(text)
            {
                said.push(format!("{key} has the unknown value {text}"));
            }
        }
    }
}

/// Returns whether a name has a namespace and is in lower case, such as `error.type`.
fn is_well_formed(name: &str) -> bool {
    let is_word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_lowercase())
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    name.contains('.') && name.split('.').all(is_word)
}

fn find<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a AnyValue> {
    attributes.iter().find(|kv| kv.key == key)?.value.as_ref()
}

/// Returns the text of an attribute, or an empty text if the attribute is missing or has another type.
fn text<'a>(attributes: &'a [KeyValue], key: &str) -> &'a str {
    match find(attributes, key).and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text,
        _ => "",
    }
}

/// Checks the spans of a request, and returns a sentence for each fault.
pub fn of_traces(request: &ExportTraceServiceRequest) -> Vec<String> {
    let mut faults = Vec::new();
    for spans in &request.resource_spans {
        faults.extend(of_resource(spans.resource.as_ref(), &spans.schema_url));
        for scope in &spans.scope_spans {
            faults.extend(of_scope(scope.scope.as_ref(), &scope.schema_url));
            for span in &scope.spans {
                let at = format!("span {} {:?}", span.name, span.kind());
                faults.extend(of_span(span).into_iter().map(|fault| format!("{at}: {fault}")));
            }
        }
    }
    faults
}

/// Checks the data points of a request, and returns a sentence for each fault.
pub fn of_metrics(request: &ExportMetricsServiceRequest) -> Vec<String> {
    let mut faults = Vec::new();
    for metrics in &request.resource_metrics {
        faults.extend(of_resource(metrics.resource.as_ref(), &metrics.schema_url));
        for scope in &metrics.scope_metrics {
            faults.extend(of_scope(scope.scope.as_ref(), &scope.schema_url));
            for metric in &scope.metrics {
                let faults_of_metric = of_metric(metric);
                faults.extend(faults_of_metric.into_iter().map(|fault| format!("{}: {fault}", metric.name)));
            }
        }
    }
    faults
}

/// Checks the log records of a request, and returns a sentence for each fault.
pub fn of_logs(request: &ExportLogsServiceRequest) -> Vec<String> {
    let mut faults = Vec::new();
    for logs in &request.resource_logs {
        faults.extend(of_resource(logs.resource.as_ref(), &logs.schema_url));
        for record in logs.scope_logs.iter().flat_map(|scope| &scope.log_records) {
            let mut said = Vec::new();
            CONVENTIONS.attributes(&record.attributes, &[], &mut said);
            if !record.event_name.is_empty() {
                said.push(format!("the conventions have no event {}", record.event_name));
            }
            if record.severity_number == 0 || record.body.is_none() {
                said.push("it has no severity or no body".to_owned());
            }
            let at = match record.body.as_ref().and_then(|body| body.value.as_ref()) {
                Some(Value::StringValue(body)) => format!("log record {body:?}"),
                _ => "log record".to_owned(),
            };
            faults.extend(said.into_iter().map(|fault| format!("{at}: {fault}")));
        }
    }
    faults
}

fn of_resource(resource: Option<&Resource>, schema_url: &str) -> Vec<String> {
    let attributes = resource.map_or(&[][..], |resource| &resource.attributes);
    let mut said = Vec::new();
    CONVENTIONS.attributes(attributes, &[&CONVENTIONS.resource], &mut said);
    let missing = CONVENTIONS.resource.iter().filter(|name| find(attributes, name).is_none());
    said.extend(missing.map(|name| format!("{name} is missing")));
    if schema_url.is_empty() {
        said.push("it has no schema URL".to_owned());
    }
    let service = text(attributes, "service.name");
    said.into_iter().map(|fault| format!("resource of {service}: {fault}")).collect()
}

fn of_scope(scope: Option<&InstrumentationScope>, schema_url: &str) -> Option<String> {
    let (name, version) = scope.map_or(("", ""), |scope| (&scope.name, &scope.version));
    let is_complete = !name.is_empty() && !version.is_empty() && !schema_url.is_empty();
    (!is_complete).then(|| format!("scope {name}: it needs a name, a version and a schema URL"))
}

fn kind_of(span: &Span) -> &'static str {
    let has = |prefix| span.attributes.iter().any(|kv| kv.key.starts_with(prefix));
    match span.kind() {
        SpanKind::Server if has("http.") => "HTTP server",
        SpanKind::Server => "gRPC server",
        SpanKind::Client => "gRPC client",
        SpanKind::Producer => "RabbitMQ send",
        SpanKind::Consumer => "RabbitMQ process",
        SpanKind::Internal | SpanKind::Unspecified => "local",
    }
}

fn of_span(span: &Span) -> Vec<String> {
    let mut said = Vec::new();
    let what = kind_of(span);
    let Some(row) = CONVENTIONS.ours.iter().find(|row| row.what == what) else {
        return vec!["docs/conventions.md has no such span".to_owned()];
    };
    CONVENTIONS.attributes(&span.attributes, &[&row.always, &row.sometimes], &mut said);
    let required = CONVENTIONS.spans.get(what).into_iter().flatten();
    let required = required.filter(|(_, level)| *level == "required").map(|(name, _)| name.as_str());
    let required: BTreeSet<&str> = required.chain(row.always.iter().copied()).collect();
    let missing = required.iter().filter(|name| find(&span.attributes, name).is_none());
    said.extend(missing.map(|name| format!("{name} is missing")));

    let of = |key| text(&span.attributes, key);
    let has = |key| find(&span.attributes, key).is_some();
    let mut must = |holds: bool, rule: &str| {
        if !holds {
            said.push(rule.to_owned());
        }
    };
    let status = span.status.clone().unwrap_or_default();
    let is_error = status.code() == StatusCode::Error;
    let error = of("error.type");
    must(is_error != error.is_empty(), "error.type must be present if and only if the status is an error");
    must(
        error.is_empty() || !status.message.eq_ignore_ascii_case(error),
        "the description of the error repeats error.type",
    );
    must(!has("server.port") || has("server.address"), "server.port is present without server.address");
    must(
        has("http.request.method_original") == (of("http.request.method") == "_OTHER"),
        "http.request.method_original must be present if and only if the method is _OTHER",
    );
    must(
        has("rpc.method_original") == (of("rpc.method") == "_OTHER"),
        "rpc.method_original must be present if and only if the method is _OTHER",
    );
    let known_methods = &CONVENTIONS.attributes["http.request.method"].values;
    let original = of("http.request.method_original");
    must(!known_methods.iter().any(|known| known == original), "a known method is reported as _OTHER");

    let is_named = match what {
        "HTTP server" => {
            let method = if has("http.request.method_original") { "HTTP" } else { of("http.request.method") };
            span.name == format!("{method} {}", of("http.route")).trim_end()
        }
        "gRPC server" if of("rpc.method") == "_OTHER" => span.name == "grpc",
        "gRPC server" | "gRPC client" => span.name == of("rpc.method"),
        _ => row.names.contains(&span.name.as_str()),
    };
    must(is_named, "the name does not fit the kind of the span");

    let rpc_status = of("rpc.status_code");
    let has_peer = has("network.peer.address");
    let has_own_error = !error.is_empty() && error != rpc_status;
    match what {
        "HTTP server" => {
            let was_answered = has("http.response.status_code");
            must(was_answered || is_error, "a span without an error must have http.response.status_code");
        }
        "gRPC server" => {
            let faults =
                ["UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"];
            must(is_error == faults.contains(&rpc_status), "the status does not fit rpc.status_code");
            must(!has_own_error, "error.type of a gRPC server span must be rpc.status_code");
        }
        "gRPC client" => {
            must(is_error == (rpc_status != "OK"), "the status does not fit rpc.status_code");
            must(!has_own_error || !has_peer, "network.peer.* is present, but no peer was contacted");
        }
        "RabbitMQ send" => {
            let (name, kind) = (of("messaging.operation.name"), of("messaging.operation.type"));
            must((name, kind) == ("send", "send"), "the operation must be send");
            let is_spooled = of("throughline.publish.outcome") == "spooled";
            must(
                !(is_spooled || is_error) || !has_peer,
                "network.peer.* is present, but no peer was contacted",
            );
        }
        "RabbitMQ process" => {
            let (name, kind) = (of("messaging.operation.name"), of("messaging.operation.type"));
            must((name, kind) == ("process", "process"), "the operation must be process");
        }
        _ => {}
    }
    must(format!("{:?}", span.kind()).eq_ignore_ascii_case(row.kind), "the span has the wrong kind");

    for event in &span.events {
        let at = format!("event {}", event.name);
        let mut of_event = Vec::new();
        match CONVENTIONS.events.get(event.name.as_str()) {
            Some(names) => {
                CONVENTIONS.attributes(&event.attributes, &[names], &mut of_event);
                let missing = names.iter().filter(|name| find(&event.attributes, name).is_none());
                of_event.extend(missing.map(|name| format!("{name} is missing")));
            }
            None => of_event.push("docs/conventions.md has no such event".to_owned()),
        }
        said.extend(of_event.into_iter().map(|fault| format!("{at}: {fault}")));
    }
    said
}

fn of_metric(metric: &metrics::Metric) -> Vec<String> {
    let Some(known) = CONVENTIONS.metrics.get(&metric.name) else {
        return vec!["the metric is unknown".to_owned()];
    };
    let numbers = |points: &[metrics::NumberDataPoint]| -> Vec<Vec<KeyValue>> {
        points.iter().map(|point| point.attributes.clone()).collect()
    };
    let mut said = Vec::new();
    let (instrument, points) = match &metric.data {
        Some(Data::Sum(sum)) => {
            (if sum.is_monotonic { "counter" } else { "updowncounter" }, numbers(&sum.data_points))
        }
        Some(Data::Gauge(gauge)) => ("gauge", numbers(&gauge.data_points)),
        Some(Data::Histogram(histogram)) => {
            let is_ours = metric.name.starts_with("throughline.");
            let mut bounds = histogram.data_points.iter().map(|point| &point.explicit_bounds);
            if !is_ours && metric.unit == "s" && bounds.any(|bounds| *bounds != SECONDS) {
                said.push("its buckets are not those of the conventions".to_owned());
            }
            ("histogram", histogram.data_points.iter().map(|point| point.attributes.clone()).collect())
        }
        _ => ("another instrument", Vec::new()),
    };
    if instrument != known.instrument || metric.unit != known.unit {
        let Metric { instrument: known, unit, .. } = known;
        said.push(format!("it is a {instrument} in {:?} instead of a {known} in {unit:?}", metric.unit));
    }
    let names = known.attributes.keys().map(String::as_str).collect();
    for attributes in points {
        CONVENTIONS.attributes(&attributes, &[&names], &mut said);
        let required = known.attributes.iter().filter(|(_, level)| *level == "required");
        let missing = required.filter(|(name, _)| find(&attributes, name).is_none());
        said.extend(missing.map(|(name, _)| format!("{name} is missing")));
    }
    said
}

/// Returns the kinds of spans, the attributes and the events that `docs/conventions.md` lists, but that occur
/// in none of these spans. A table that lists too much is as wrong as a table that lists too little.
pub fn unseen(spans: &[crate::trace::Span]) -> Vec<String> {
    let mut unseen = Vec::new();
    for row in &CONVENTIONS.ours {
        let of_kind = |span: &&crate::trace::Span| {
            let is_http = span.attributes.contains_key("http.request.method");
            span.kind == row.kind && is_http == row.always.contains("http.request.method")
        };
        let of_kind: Vec<_> = spans.iter().filter(of_kind).collect();
        if of_kind.is_empty() {
            unseen.push(row.what.to_owned());
        }
        let names = row.always.iter().chain(&row.sometimes);
        let names = names.filter(|name| !of_kind.iter().any(|span| span.attributes.contains_key(**name)));
        unseen.extend(names.map(|name| format!("{name} of {}", row.what)));
    }
    let events: BTreeSet<&str> =
        spans.iter().flat_map(|span| &span.events).map(|(name, _)| name.as_str()).collect();
    unseen.extend(
        CONVENTIONS.events.keys().filter(|name| !events.contains(*name)).map(|name| format!("event {name}")),
    );
    unseen
}
