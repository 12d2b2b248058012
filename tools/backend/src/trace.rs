//! Spans as they were received, and a function that draws a trace as indented text.

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{self as otlp, ResourceSpans, span::SpanKind, status::StatusCode},
};
use std::{collections::BTreeMap, fmt::Write};

/// A span, with fields from its resource and scope.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Span {
    /// The trace id as 32 hex digits.
    pub trace_id: String,
    /// The span id as 16 hex digits.
    pub span_id: String,
    /// The parent's span id, or empty for a root span.
    pub parent_span_id: String,
    /// The `service.name` of the span's resource.
    pub service: String,
    /// The span's name.
    pub name: String,
    /// `SERVER`, `CLIENT`, `INTERNAL`, `PRODUCER` or `CONSUMER`.
    pub kind: &'static str,
    /// `UNSET`, `OK` or `ERROR`.
    pub status: &'static str,
    /// The description of an error status, or empty.
    pub status_message: String,
    /// The start in nanoseconds since 1970.
    pub start: u64,
    /// The end in nanoseconds since 1970.
    pub end: u64,
    /// The span's own attributes, as text.
    pub attributes: BTreeMap<String, String>,
    /// The attributes of the span's resource (the process that made the span), as text.
    pub resource: BTreeMap<String, String>,
    /// The name and the attributes of each event.
    pub events: Vec<(String, BTreeMap<String, String>)>,
    /// The trace id and the span id of each link.
    pub links: Vec<(String, String)>,
    /// The W3C trace flags, and the bits that say whether the parent is remote.
    pub flags: u32,
    /// The W3C tracestate.
    pub trace_state: String,
    /// The name of the span's instrumentation scope.
    pub scope: String,
}

impl Span {
    /// Converts a span from OTLP, with its resource and its scope.
    pub fn new(span: &otlp::Span, resource: &Resource, scope: &InstrumentationScope) -> Self {
        let resource = attributes(&resource.attributes);
        let status = span.status.clone().unwrap_or_default();
        Self {
            trace_id: hex(&span.trace_id),
            span_id: hex(&span.span_id),
            parent_span_id: hex(&span.parent_span_id),
            service: resource.get("service.name").cloned().unwrap_or_default(),
            name: span.name.clone(),
            kind: match span.kind() {
                SpanKind::Unspecified => "UNSPECIFIED",
                SpanKind::Internal => "INTERNAL",
                SpanKind::Server => "SERVER",
                SpanKind::Client => "CLIENT",
                SpanKind::Producer => "PRODUCER",
                SpanKind::Consumer => "CONSUMER",
            },
            status: match status.code() {
                StatusCode::Unset => "UNSET",
                StatusCode::Ok => "OK",
                StatusCode::Error => "ERROR",
            },
            status_message: status.message,
            start: span.start_time_unix_nano,
            end: span.end_time_unix_nano,
            attributes: attributes(&span.attributes),
            resource,
            events: span.events.iter().map(|e| (e.name.clone(), attributes(&e.attributes))).collect(),
            links: span.links.iter().map(|l| (hex(&l.trace_id), hex(&l.span_id))).collect(),
            flags: span.flags,
            trace_state: span.trace_state.clone(),
            scope: scope.name.clone(),
        }
    }
}

/// Returns the spans of one `ResourceSpans` of an OTLP request.
pub fn spans(resource_spans: &ResourceSpans) -> Vec<Span> {
    let resource = resource_spans.resource.clone().unwrap_or_default();
    let mut spans = Vec::new();
    for scope_spans in &resource_spans.scope_spans {
        let scope = scope_spans.scope.clone().unwrap_or_default();
        spans.extend(scope_spans.spans.iter().map(|span| Span::new(span, &resource, &scope)));
    }
    spans
}

/// Draws spans as a tree, one per line: indentation, service, name, kind, and the error if there is one.
///
/// Siblings are ordered by their start. A span whose parent is not among the spans is drawn as a root. Such a
/// span is marked `(parent missing)`, unless its parent is the span `known_parent` of another process.
pub fn tree(spans: &[Span], known_parent: &str) -> String {
    fn draw(out: &mut String, spans: &[Span], span: &Span, depth: usize, orphan: bool) {
        let Span { service, name, kind, .. } = span;
        let _ = write!(out, "{:indent$}{service} {name} {kind}", "", indent = depth * 2);
        if span.status == "ERROR" {
            let _ = write!(out, " ERROR");
        }
        if let Some(error) = span.attributes.get("error.type") {
            let _ = write!(out, " error.type={error}");
        }
        if orphan {
            let _ = write!(out, " (parent missing)");
        }
        out.push('\n');
        let mut children: Vec<_> =
            spans.iter().filter(|child| child.parent_span_id == span.span_id).collect();
        children.sort_by_key(|child| child.start);
        for child in children {
            draw(out, spans, child, depth + 1, false);
        }
    }
    let is_root = |span: &&Span| !spans.iter().any(|parent| parent.span_id == span.parent_span_id);
    let mut roots: Vec<_> = spans.iter().filter(is_root).collect();
    roots.sort_by_key(|span| span.start);
    let mut out = String::new();
    for root in roots {
        let orphan = !root.parent_span_id.is_empty() && root.parent_span_id != known_parent;
        draw(&mut out, spans, root, 0, orphan);
    }
    out
}

/// Removes the indentation that all lines share, and blank lines, so that a tree can be indented in a test's
/// source code.
pub fn dedent(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let indent = lines.iter().map(|line| line.len() - line.trim_start().len()).min().unwrap_or(0);
    lines.iter().map(|line| format!("{}\n", line[indent..].trim_end())).collect()
}

pub(crate) fn attributes(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    attributes.iter().map(|kv| (kv.key.clone(), kv.value.as_ref().map(text).unwrap_or_default())).collect()
}

pub(crate) fn text(value: &AnyValue) -> String {
    match &value.value {
        Some(Value::StringValue(v)) => v.clone(),
        Some(Value::BoolValue(v)) => v.to_string(),
        Some(Value::IntValue(v)) => v.to_string(),
        Some(Value::DoubleValue(v)) => v.to_string(),
        other => format!("{other:?}"),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
