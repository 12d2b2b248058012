//! Spans as Zipkin v2 JSON, mapped as OpenTelemetry's specification says ("Zipkin", trace exporters).

use opentelemetry::{
    KeyValue, Value,
    trace::{SpanId, SpanKind, Status},
};
use opentelemetry_sdk::{Resource, trace::SpanData};
use serde_json::{Map, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// Appends a span as a JSON object and a comma. Strings are cut to `max_chars` characters.
pub(crate) fn encode_span(buf: &mut Vec<u8>, resource: &Resource, span: &SpanData, max_chars: Option<usize>) {
    let mut tags = Map::new();
    for (key, value) in resource {
        tags.insert(key.to_string(), json!(value.as_str()));
    }
    for kv in &span.attributes {
        tags.insert(kv.key.to_string(), json!(text(&kv.value, max_chars)));
    }
    tags.insert("otel.scope.name".to_owned(), json!(span.instrumentation_scope.name()));
    if let Some(version) = span.instrumentation_scope.version() {
        tags.insert("otel.scope.version".to_owned(), json!(version));
    }
    for (name, count) in [
        ("otel.dropped_attributes_count", span.dropped_attributes_count),
        ("otel.dropped_events_count", span.events.dropped_count),
        ("otel.dropped_links_count", span.links.dropped_count),
    ] {
        if count > 0 {
            tags.insert(name.to_owned(), json!(count.to_string()));
        }
    }
    match &span.status {
        Status::Unset => {}
        Status::Ok => drop(tags.insert("otel.status_code".to_owned(), json!("OK"))),
        Status::Error { description } => {
            tags.insert("otel.status_code".to_owned(), json!("ERROR"));
            tags.insert("error".to_owned(), json!(description));
        }
    }
    let annotations = span.events.iter().map(|event| {
        let attributes: Map<_, _> = event
            .attributes
            .iter()
            .map(|kv| (kv.key.to_string(), json!(text(&kv.value, max_chars))))
            .collect();
        let value = match attributes.is_empty() {
            true => event.name.to_string(),
            false => format!("\"{}\": {}", event.name, json!(attributes)),
        };
        json!({ "timestamp": microseconds(event.timestamp), "value": value })
    });
    let duration = span.end_time.duration_since(span.start_time).unwrap_or_default();
    let service_name = resource.get(&"service.name".into()).map(|name| name.to_string());
    let mut object = json!({
        "traceId": span.span_context.trace_id().to_string(),
        "id": span.span_context.span_id().to_string(),
        "name": span.name,
        "timestamp": microseconds(span.start_time),
        // Zipkin reads 0 as unknown.
        "duration": duration.as_micros().max(1) as u64,
        "localEndpoint": { "serviceName": service_name },
        "annotations": annotations.collect::<Vec<_>>(),
        "tags": tags,
    });
    if span.parent_span_id != SpanId::INVALID {
        object["parentId"] = json!(span.parent_span_id.to_string());
    }
    if let Some(kind) = kind(&span.span_kind) {
        object["kind"] = json!(kind);
    }
    // On a server's span `server.address` is the service itself.
    let has_peer = matches!(span.span_kind, SpanKind::Client | SpanKind::Producer | SpanKind::Consumer);
    if let Some(remote) = remote_endpoint(&span.attributes).filter(|_| has_peer) {
        object["remoteEndpoint"] = json!({ "serviceName": remote });
    }
    buf.extend_from_slice(object.to_string().as_bytes());
    buf.push(b',');
}

/// A list of spans. Each part is what [`encode_span`] wrote, with a comma at its end.
pub(crate) fn encode_request<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut buf = vec![b'['];
    parts.for_each(|part| buf.extend_from_slice(part));
    match buf.last_mut() {
        Some(comma @ b',') => *comma = b']',
        _ => buf.push(b']'),
    }
    buf
}

fn kind(kind: &SpanKind) -> Option<&'static str> {
    match kind {
        SpanKind::Client => Some("CLIENT"),
        SpanKind::Server => Some("SERVER"),
        SpanKind::Producer => Some("PRODUCER"),
        SpanKind::Consumer => Some("CONSUMER"),
        SpanKind::Internal => None,
    }
}

fn remote_endpoint(attributes: &[KeyValue]) -> Option<String> {
    let find = |key: &str| attributes.iter().find(|kv| kv.key.as_str() == key);
    find("peer.service").or_else(|| find("server.address")).map(|kv| kv.value.to_string())
}

fn text(value: &Value, max_chars: Option<usize>) -> String {
    match (value, max_chars) {
        (Value::String(text), Some(max)) => text.as_str().chars().take(max).collect(),
        // Elements of lists that are too long are rare, and cut elsewhere ([`super::otlp`]).
        _ => value.as_str().into_owned(),
    }
}

fn microseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::{
        InstrumentationScope,
        trace::{Event, SpanContext, TraceFlags, TraceId, TraceState},
    };
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};
    use serde_json::Value as Json;
    use std::time::Duration;

    fn encode(change: impl Fn(&mut SpanData)) -> Json {
        let resource = Resource::builder_empty().with_attribute(KeyValue::new("service.name", "api")).build();
        let start = UNIX_EPOCH + Duration::from_micros(1_472_470_996_199_000);
        let context =
            SpanContext::new(TraceId::from(1), SpanId::from(2), TraceFlags::SAMPLED, false, TraceState::NONE);
        let mut span = SpanData {
            span_context: context,
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Client,
            name: "get \"user\"".into(),
            start_time: start,
            end_time: start + Duration::from_millis(207),
            attributes: vec![KeyValue::new("server.address", "db"), KeyValue::new("n", 7)],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("scope").build(),
        };
        change(&mut span);
        let mut buf = Vec::new();
        encode_span(&mut buf, &resource, &span, Some(10));
        encode_span(&mut buf, &resource, &span, Some(10));
        let list: Json = serde_json::from_slice(&encode_request([&buf[..]].into_iter())).unwrap();
        assert_eq!(list[0], list[1]);
        list[0].clone()
    }

    #[test]
    fn a_span_has_the_members_that_zipkin_knows() {
        let expected = json!({
            "traceId": "00000000000000000000000000000001",
            "id": "0000000000000002",
            "name": "get \"user\"",
            "kind": "CLIENT",
            "timestamp": 1_472_470_996_199_000_u64,
            "duration": 207_000,
            "localEndpoint": { "serviceName": "api" },
            "remoteEndpoint": { "serviceName": "db" },
            "annotations": [],
            "tags": { "server.address": "db", "n": "7", "service.name": "api", "otel.scope.name": "scope" },
        });
        assert_eq!(encode(|_| {}), expected);
    }

    #[test]
    fn an_internal_span_has_no_kind() {
        assert_eq!(encode(|span| span.span_kind = SpanKind::Internal)["kind"], Json::Null);
    }

    #[test]
    fn errors_parents_and_events_are_told() {
        let span = encode(|span| {
            span.parent_span_id = SpanId::from(3);
            span.status = Status::error("because");
            let attributes = vec![KeyValue::new("k", "longer than ten")];
            span.events.events.push(Event::new("retry", span.start_time, attributes, 0));
        });
        assert_eq!(span["parentId"], "0000000000000003");
        assert_eq!(span["tags"]["error"], "because");
        assert_eq!(span["tags"]["otel.status_code"], "ERROR");
        assert_eq!(span["annotations"][0]["value"], "\"retry\": {\"k\":\"longer tha\"}");
    }

    #[test]
    fn no_spans_are_an_empty_list() {
        assert_eq!(encode_request(std::iter::empty()), b"[]");
    }
}
