//! Spans as OTLP protobuf: `opentelemetry/proto/trace/v1/trace.proto`, version 1.

use opentelemetry::{
    Array, InstrumentationScope, KeyValue, Value,
    trace::{SpanContext, SpanId, SpanKind, Status},
};
use opentelemetry_sdk::{Resource, trace::SpanData};
use std::time::{SystemTime, UNIX_EPOCH};

/// Appends a `Span`, as a field of `ScopeSpans`. Strings are cut to `max_chars` characters.
pub(crate) fn encode_span(buf: &mut Vec<u8>, span: &SpanData, max_chars: Option<usize>) {
    message(buf, 2, |buf| {
        let context = &span.span_context;
        bytes(buf, 1, &context.trace_id().to_bytes());
        bytes(buf, 2, &context.span_id().to_bytes());
        bytes(buf, 3, context.trace_state().header().as_bytes());
        if span.parent_span_id != SpanId::INVALID {
            bytes(buf, 4, &span.parent_span_id.to_bytes());
        }
        bytes(buf, 5, span.name.as_bytes());
        uint(buf, 6, kind(&span.span_kind));
        fixed64(buf, 7, nanoseconds(span.start_time));
        fixed64(buf, 8, nanoseconds(span.end_time));
        attributes(buf, 9, &span.attributes, max_chars);
        uint(buf, 10, span.dropped_attributes_count.into());
        for event in span.events.iter() {
            message(buf, 11, |buf| {
                fixed64(buf, 1, nanoseconds(event.timestamp));
                bytes(buf, 2, event.name.as_bytes());
                attributes(buf, 3, &event.attributes, max_chars);
                uint(buf, 4, event.dropped_attributes_count.into());
            });
        }
        uint(buf, 12, span.events.dropped_count.into());
        for link in span.links.iter() {
            message(buf, 13, |buf| {
                bytes(buf, 1, &link.span_context.trace_id().to_bytes());
                bytes(buf, 2, &link.span_context.span_id().to_bytes());
                bytes(buf, 3, link.span_context.trace_state().header().as_bytes());
                attributes(buf, 4, &link.attributes, max_chars);
                uint(buf, 5, link.dropped_attributes_count.into());
                fixed32(buf, 6, flags(&link.span_context, link.span_context.is_remote()));
            });
        }
        uint(buf, 14, span.links.dropped_count.into());
        message(buf, 15, |buf| match &span.status {
            Status::Unset => {}
            Status::Ok => uint(buf, 3, 1),
            Status::Error { description } => {
                bytes(buf, 2, description.as_bytes());
                uint(buf, 3, 2);
            }
        });
        fixed32(buf, 16, flags(context, span.parent_span_is_remote));
    });
}

/// An `ExportTraceServiceRequest` of one resource. Each group holds the spans of one scope, as
/// [`encode_span`] left them.
pub(crate) fn encode_request(resource: &Resource, groups: &[(InstrumentationScope, Vec<u8>)]) -> Vec<u8> {
    let mut buf = Vec::with_capacity(groups.iter().map(|(_, spans)| spans.len() + 256).sum::<usize>() + 1024);
    message(&mut buf, 1, |buf| {
        message(buf, 1, |buf| {
            for (key, value) in resource {
                attribute(buf, 1, key.as_str(), value, None);
            }
        });
        for (scope, spans) in groups {
            message(buf, 2, |buf| {
                message(buf, 1, |buf| {
                    bytes(buf, 1, scope.name().as_bytes());
                    bytes(buf, 2, scope.version().unwrap_or_default().as_bytes());
                    for kv in scope.attributes() {
                        attribute(buf, 3, kv.key.as_str(), &kv.value, None);
                    }
                });
                buf.extend_from_slice(spans);
                bytes(buf, 3, scope.schema_url().unwrap_or_default().as_bytes());
            });
        }
        bytes(buf, 3, resource.schema_url().unwrap_or_default().as_bytes());
    });
    buf
}

fn kind(kind: &SpanKind) -> u64 {
    match kind {
        SpanKind::Internal => 1,
        SpanKind::Server => 2,
        SpanKind::Client => 3,
        SpanKind::Producer => 4,
        SpanKind::Consumer => 5,
    }
}

/// The W3C flags, and in bits 8 and 9 whether the parent (of a span) or the target (of a link) is known
/// to be remote or not.
fn flags(context: &SpanContext, is_remote: bool) -> u32 {
    const HAS_IS_REMOTE: u32 = 0x100;
    const IS_REMOTE: u32 = 0x200;

    let remote = if is_remote { HAS_IS_REMOTE | IS_REMOTE } else { HAS_IS_REMOTE };
    u32::from(context.trace_flags().to_u8()) | remote
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

fn attributes(buf: &mut Vec<u8>, field: u64, attributes: &[KeyValue], max_chars: Option<usize>) {
    for kv in attributes {
        attribute(buf, field, kv.key.as_str(), &kv.value, max_chars);
    }
}

fn attribute(buf: &mut Vec<u8>, field: u64, key: &str, value: &Value, max_chars: Option<usize>) {
    message(buf, field, |buf| {
        bytes(buf, 1, key.as_bytes());
        message(buf, 2, |buf| any_value(buf, value, max_chars));
    });
}

fn any_value(buf: &mut Vec<u8>, value: &Value, max_chars: Option<usize>) {
    match value {
        Value::Bool(v) => bool_value(buf, *v),
        Value::I64(v) => int_value(buf, *v),
        Value::F64(v) => double_value(buf, *v),
        Value::String(v) => string_value(buf, v.as_str(), max_chars),
        Value::Array(array) => message(buf, 5, |buf| match array {
            Array::Bool(all) => all.iter().for_each(|v| message(buf, 1, |buf| bool_value(buf, *v))),
            Array::I64(all) => all.iter().for_each(|v| message(buf, 1, |buf| int_value(buf, *v))),
            Array::F64(all) => all.iter().for_each(|v| message(buf, 1, |buf| double_value(buf, *v))),
            Array::String(all) => {
                all.iter().for_each(|v| message(buf, 1, |buf| string_value(buf, v.as_str(), max_chars)));
            }
            // The enum may grow; a kind not known here is shown as text rather than lost.
            other => message(buf, 1, |buf| string_value(buf, &other.to_string(), max_chars)),
        }),
        other => string_value(buf, &other.to_string(), max_chars),
    }
}

// The members of AnyValue's `oneof` are written even when they are zero: which one is set is the type.

fn string_value(buf: &mut Vec<u8>, value: &str, max_chars: Option<usize>) {
    let cut = max_chars.and_then(|max| value.char_indices().nth(max)).map_or(value.len(), |(end, _)| end);
    length_delimited(buf, 1, &value.as_bytes()[..cut]);
}

fn bool_value(buf: &mut Vec<u8>, value: bool) {
    tag(buf, 2, VARINT);
    varint(buf, value.into());
}

fn int_value(buf: &mut Vec<u8>, value: i64) {
    tag(buf, 3, VARINT);
    varint(buf, value.cast_unsigned());
}

fn double_value(buf: &mut Vec<u8>, value: f64) {
    tag(buf, 4, FIXED64);
    buf.extend_from_slice(&value.to_le_bytes());
}

// Protocol Buffers, "Encoding": <https://protobuf.dev/programming-guides/encoding/>.
// Fields of proto3 that have their default value are not written.

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
const FIXED32: u64 = 5;

fn tag(buf: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(buf, field << 3 | wire_type);
}

fn varint(buf: &mut Vec<u8>, value: u64) {
    buf.extend(varint_bytes(value));
}

/// Seven bits a byte, the lowest first; the high bit says that more follow.
fn varint_bytes(value: u64) -> impl Iterator<Item = u8> {
    let mut rest = Some(value);
    std::iter::from_fn(move || {
        let value = rest?;
        rest = Some(value >> 7).filter(|&rest| rest != 0);
        let more = if rest.is_some() { 0x80 } else { 0 };
        Some((value & 0x7f) as u8 | more)
    })
}

fn uint(buf: &mut Vec<u8>, field: u64, value: u64) {
    if value != 0 {
        tag(buf, field, VARINT);
        varint(buf, value);
    }
}

fn fixed32(buf: &mut Vec<u8>, field: u64, value: u32) {
    if value != 0 {
        tag(buf, field, FIXED32);
        buf.extend_from_slice(&value.to_le_bytes());
    }
}

fn fixed64(buf: &mut Vec<u8>, field: u64, value: u64) {
    if value != 0 {
        tag(buf, field, FIXED64);
        buf.extend_from_slice(&value.to_le_bytes());
    }
}

fn bytes(buf: &mut Vec<u8>, field: u64, value: &[u8]) {
    if !value.is_empty() {
        length_delimited(buf, field, value);
    }
}

fn length_delimited(buf: &mut Vec<u8>, field: u64, value: &[u8]) {
    tag(buf, field, LENGTH_DELIMITED);
    varint(buf, value.len() as u64);
    buf.extend_from_slice(value);
}

/// A nested message. Its length is known only once it is written: one byte is left for it, which is
/// mostly enough; else the content moves up.
fn message(buf: &mut Vec<u8>, field: u64, write: impl FnOnce(&mut Vec<u8>)) {
    tag(buf, field, LENGTH_DELIMITED);
    let length_at = buf.len();
    buf.push(0);
    write(buf);
    let length = (buf.len() - length_at - 1) as u64;
    if length < 0x80 {
        buf[length_at] = length as u8;
    } else {
        buf.splice(length_at..=length_at, varint_bytes(length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{Event, Link, TraceFlags, TraceId, TraceState};
    use opentelemetry_proto::{
        tonic::{collector::trace::v1::ExportTraceServiceRequest, trace::v1::Span},
        transform::{
            common::tonic::ResourceAttributesWithSchema, trace::tonic::group_spans_by_resource_and_scope,
        },
    };
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};
    use proptest::prelude::*;
    use prost::Message;
    use std::time::Duration;

    fn span(name: String, attributes: Vec<KeyValue>) -> SpanData {
        let trace_state = TraceState::from_key_value([("vendor", "a")]).unwrap();
        let context =
            SpanContext::new(TraceId::from(1), SpanId::from(2), TraceFlags::SAMPLED, false, trace_state);
        let mut events = SpanEvents::default();
        events.events.push(Event::new("event", UNIX_EPOCH + Duration::from_nanos(7), attributes.clone(), 3));
        events.dropped_count = 4;
        let mut links = SpanLinks::default();
        links.links.push(Link::new(context.clone(), attributes.clone(), 5));
        links.dropped_count = 6;
        SpanData {
            span_context: context,
            parent_span_id: SpanId::from(3),
            parent_span_is_remote: true,
            span_kind: SpanKind::Consumer,
            name: name.into(),
            start_time: UNIX_EPOCH + Duration::from_nanos(1_234_567_890_123_456_789),
            end_time: UNIX_EPOCH + Duration::from_nanos(1_234_567_890_223_456_789),
            attributes,
            dropped_attributes_count: 300,
            events,
            links,
            status: Status::error("because"),
            instrumentation_scope: InstrumentationScope::builder("scope")
                .with_version("1")
                .with_schema_url("https://example.com/schema")
                .with_attributes([KeyValue::new("a", 1)])
                .build(),
        }
    }

    fn values() -> Vec<KeyValue> {
        vec![
            KeyValue::new("string", "v"),
            KeyValue::new("empty", ""),
            KeyValue::new("true", true),
            KeyValue::new("false", false),
            KeyValue::new("zero", 0),
            KeyValue::new("negative", -1),
            KeyValue::new("double", 0.5),
            KeyValue::new("strings", Value::Array(Array::String(vec!["a".into(), "".into()]))),
            KeyValue::new("ints", Value::Array(Array::I64(vec![0, i64::MIN, i64::MAX]))),
            KeyValue::new("bools", Value::Array(Array::Bool(vec![true, false]))),
            KeyValue::new("doubles", Value::Array(Array::F64(vec![0.0, -1.5]))),
            KeyValue::new("none", Value::Array(Array::I64(vec![]))),
        ]
    }

    fn encoded(spans: &[SpanData]) -> ExportTraceServiceRequest {
        let resource = Resource::builder_empty().with_attribute(KeyValue::new("service.name", "s")).build();
        let mut buf = Vec::new();
        spans.iter().for_each(|span| encode_span(&mut buf, span, None));
        let request = encode_request(&resource, &[(spans[0].instrumentation_scope.clone(), buf)]);
        ExportTraceServiceRequest::decode(request.as_slice()).unwrap()
    }

    /// The same by the conversion of the OpenTelemetry project.
    fn reference(spans: &[SpanData]) -> ExportTraceServiceRequest {
        let resource = Resource::builder_empty().with_attribute(KeyValue::new("service.name", "s")).build();
        let resource = ResourceAttributesWithSchema::from(&resource);
        ExportTraceServiceRequest {
            resource_spans: group_spans_by_resource_and_scope(spans.to_vec(), &resource),
        }
    }

    #[test]
    fn every_field_is_encoded_as_the_reference_encodes_it() {
        let mut root = span("root".into(), vec![]);
        root.parent_span_id = SpanId::INVALID;
        root.parent_span_is_remote = false;
        root.status = Status::Ok;
        let mut unset = span(String::new(), vec![]);
        unset.status = Status::Unset;
        unset.span_kind = SpanKind::Internal;
        let spans = [span("child".into(), values()), root, unset];
        assert_eq!(encoded(&spans), reference(&spans));
    }

    #[test]
    fn lengths_around_a_byte_are_right() {
        for length in [0, 1, 100, 126, 127, 128, 129, 16_383, 16_384, 3_000_000] {
            let spans = [span("n".repeat(length), vec![KeyValue::new("k", "v".repeat(length))])];
            assert_eq!(encoded(&spans), reference(&spans), "{length}");
        }
    }

    #[test]
    fn long_strings_are_cut_between_characters() {
        let long = span("ééé".into(), vec![KeyValue::new("k", "ééé"), KeyValue::new("short", "é")]);
        let mut buf = Vec::new();
        encode_span(&mut buf, &long, Some(2));
        // Behind the tag and the length of two bytes is the span itself.
        let decoded = Span::decode(&buf[3..]).unwrap();
        let text = |i: usize| format!("{:?}", decoded.attributes[i].value);
        assert!(text(0).contains("\"éé\"") && text(1).contains("\"é\""), "{decoded:?}");
        assert_eq!(decoded.name, "ééé");
    }

    proptest! {
        #[test]
        fn any_span_is_encoded_as_the_reference_encodes_it(
            name in ".{0,200}",
            attributes in proptest::collection::vec((".{0,20}", ".{0,200}", any::<i64>()), 0..5),
        ) {
            let attributes = attributes.into_iter().flat_map(|(key, text, number)| {
                [KeyValue::new(key.clone(), text), KeyValue::new(key, number)]
            });
            let spans = [span(name, attributes.collect())];
            prop_assert_eq!(encoded(&spans), reference(&spans));
        }
    }
}
