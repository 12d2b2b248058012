//! Decodes requests, and limits the memory that they take once decoded. An empty span takes two bytes in
//! protobuf and three hundred once decoded, so a request of the allowed size could otherwise take gigabytes.

use super::{Export, lenient};
use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
        trace::v1::ExportTraceServiceRequest,
    },
    common::v1::{AnyValue, ArrayValue, EntityRef, InstrumentationScope, KeyValue, KeyValueList},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs},
    metrics::v1::{
        Exemplar, ExponentialHistogramDataPoint, HistogramDataPoint, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, SummaryDataPoint, summary_data_point::ValueAtQuantile,
    },
    resource::v1::Resource,
    trace::v1::{
        ResourceSpans, ScopeSpans, Span,
        span::{Event, Link},
    },
};
use std::mem::size_of;
use tonic::Status;

/// The limit on the memory of a request's decoded messages, without their texts, which can't be larger than
/// the request. The limit is a hundred times the memory of a usual batch from an SDK.
const MAX_DECODED_BYTES: usize = 128 * 1024 * 1024;

/// How deep messages may be nested, which is also prost's limit.
const MAX_DEPTH: usize = 100;

pub(super) fn protobuf<E: Export>(message: &[u8]) -> Result<E, Status> {
    let mut budget = MAX_DECODED_BYTES;
    if !fits(message, E::KIND, &mut budget, MAX_DEPTH) {
        return Err(too_much());
    }
    E::decode(message).map_err(|error| Status::invalid_argument(error.to_string()))
}

pub(super) fn json<E: Export>(text: &[u8]) -> Result<E, Status> {
    // This calculation assumes that each opening bracket begins a message of the largest type. Each comma
    // ends a value. For a moment, the tree of JSON values, which is parsed first, takes about twice as much
    // memory as calculated here.
    let count = |of: fn(&u8) -> bool| text.iter().filter(|byte| of(byte)).count();
    let largest = size_of::<Span>().max(size_of::<ExponentialHistogramDataPoint>());
    let messages = count(|byte| matches!(byte, b'{' | b'[')) * largest;
    if messages + count(|byte| *byte == b',') * size_of::<serde_json::Value>() > MAX_DECODED_BYTES {
        return Err(too_much());
    }
    lenient::from_slice(text).map_err(Status::invalid_argument)
}

fn too_much() -> Status {
    Status::resource_exhausted("the request has too many items, attributes, events, links or values")
}

/// A type of message that may be repeated, or that contains such messages.
pub(super) struct Kind {
    /// The memory of a decoded message of this type, in bytes.
    bytes: usize,
    /// The numbers of the fields that hold such messages, and the types of these messages.
    fields: &'static [(usize, &'static Kind)],
}

const fn kind<T>(fields: &'static [(usize, &'static Kind)]) -> Kind {
    Kind { bytes: size_of::<T>(), fields }
}

pub(super) static TRACES: Kind = kind::<ExportTraceServiceRequest>(&[(1, &RESOURCE_SPANS)]);
static RESOURCE_SPANS: Kind = kind::<ResourceSpans>(&[(1, &RESOURCE), (2, &SCOPE_SPANS)]);
static SCOPE_SPANS: Kind = kind::<ScopeSpans>(&[(1, &SCOPE), (2, &SPAN)]);
static SPAN: Kind = kind::<Span>(&[(9, &KEY_VALUE), (11, &EVENT), (13, &LINK)]);
static EVENT: Kind = kind::<Event>(&[(3, &KEY_VALUE)]);
static LINK: Kind = kind::<Link>(&[(4, &KEY_VALUE)]);

pub(super) static LOGS: Kind = kind::<ExportLogsServiceRequest>(&[(1, &RESOURCE_LOGS)]);
static RESOURCE_LOGS: Kind = kind::<ResourceLogs>(&[(1, &RESOURCE), (2, &SCOPE_LOGS)]);
static SCOPE_LOGS: Kind = kind::<ScopeLogs>(&[(1, &SCOPE), (2, &LOG_RECORD)]);
static LOG_RECORD: Kind = kind::<LogRecord>(&[(5, &ANY_VALUE), (6, &KEY_VALUE)]);

pub(super) static METRICS: Kind = kind::<ExportMetricsServiceRequest>(&[(1, &RESOURCE_METRICS)]);
static RESOURCE_METRICS: Kind = kind::<ResourceMetrics>(&[(1, &RESOURCE), (2, &SCOPE_METRICS)]);
static SCOPE_METRICS: Kind = kind::<ScopeMetrics>(&[(1, &SCOPE), (2, &METRIC)]);
static METRIC: Kind = kind::<Metric>(&[
    (5, &NUMBERS),
    (7, &NUMBERS),
    (9, &HISTOGRAM),
    (10, &EXPONENTIAL_HISTOGRAM),
    (11, &SUMMARY),
    (12, &KEY_VALUE),
]);
// A metric holds its `Gauge`, `Histogram` and so on inline, so their memory is already part of the metric's size.
// Therefore the size of each of these kinds is 0.
static NUMBERS: Kind = kind::<()>(&[(1, &NUMBER)]);
static HISTOGRAM: Kind = kind::<()>(&[(1, &HISTOGRAM_POINT)]);
static EXPONENTIAL_HISTOGRAM: Kind = kind::<()>(&[(1, &EXPONENTIAL_HISTOGRAM_POINT)]);
static SUMMARY: Kind = kind::<()>(&[(1, &SUMMARY_POINT)]);
static NUMBER: Kind = kind::<NumberDataPoint>(&[(5, &EXEMPLAR), (7, &KEY_VALUE)]);
static HISTOGRAM_POINT: Kind = kind::<HistogramDataPoint>(&[(8, &EXEMPLAR), (9, &KEY_VALUE)]);
static EXPONENTIAL_HISTOGRAM_POINT: Kind =
    kind::<ExponentialHistogramDataPoint>(&[(1, &KEY_VALUE), (11, &EXEMPLAR)]);
static SUMMARY_POINT: Kind = kind::<SummaryDataPoint>(&[(6, &QUANTILE), (7, &KEY_VALUE)]);
static QUANTILE: Kind = kind::<ValueAtQuantile>(&[]);
static EXEMPLAR: Kind = kind::<Exemplar>(&[(7, &KEY_VALUE)]);

static RESOURCE: Kind = kind::<Resource>(&[(1, &KEY_VALUE), (3, &ENTITY_REF)]);
static ENTITY_REF: Kind = kind::<EntityRef>(&[(3, &TEXT), (4, &TEXT)]);
static SCOPE: Kind = kind::<InstrumentationScope>(&[(3, &KEY_VALUE)]);
static KEY_VALUE: Kind = kind::<KeyValue>(&[(2, &ANY_VALUE)]);
static ANY_VALUE: Kind = kind::<AnyValue>(&[(5, &ARRAY_VALUE), (6, &KEY_VALUE_LIST)]);
static ARRAY_VALUE: Kind = kind::<ArrayValue>(&[(1, &ANY_VALUE)]);
static KEY_VALUE_LIST: Kind = kind::<KeyValueList>(&[(1, &KEY_VALUE)]);
static TEXT: Kind = kind::<String>(&[]);

/// Returns whether the messages inside `message` fit into the budget, and subtracts their memory from the
/// budget. The count stops at a malformed field, because the decoder will report that field.
fn fits(mut message: &[u8], kind: &Kind, budget: &mut usize, depth: usize) -> bool {
    while let Some((number, bytes)) = next_field(&mut message) {
        let Some((_, inner)) = kind.fields.iter().find(|(field, _)| *field == number) else {
            continue;
        };
        let Some(left) = budget.checked_sub(inner.bytes) else {
            return false;
        };
        *budget = left;
        // The count ends at `MAX_DEPTH`, because the decoder refuses messages that are nested deeper.
        if depth > 0 && !inner.fields.is_empty() && !fits(bytes, inner, budget, depth - 1) {
            return false;
        }
    }
    true
}

/// Returns the number and the bytes of the next length-delimited field.
fn next_field<'a>(message: &mut &'a [u8]) -> Option<(usize, &'a [u8])> {
    // prost's function decodes any varint, although its name mentions only length delimiters.
    let varint = |message: &mut &[u8]| prost::decode_length_delimiter(message).ok();
    loop {
        let key = varint(message)?;
        let skipped = match key & 7 {
            0 => varint(message).map(|_| 0)?,
            1 => 8,
            5 => 4,
            // These wire types are the start and the end of a group. The fields in between are read like all
            // other fields.
            3 | 4 => 0,
            2 => {
                let length = varint(message)?;
                let (bytes, rest) = message.split_at_checked(length)?;
                *message = rest;
                return Some((key >> 3, bytes));
            }
            _ => return None,
        };
        *message = message.get(skipped..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    /// Encodes a field of this number with these bytes.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2];
        prost::encode_length_delimiter(bytes.len(), &mut field).unwrap();
        field.extend(bytes);
        field
    }

    fn nested(numbers: &[u8], innermost: Vec<u8>) -> Vec<u8> {
        numbers.iter().rev().fold(innermost, |message, number| field(*number, &message))
    }

    #[test]
    fn many_small_messages_of_any_kind_are_refused_undecoded() {
        fn check<E: Export>(rows: &[(&str, &[u8], Vec<u8>)]) {
            for (name, path, message) in rows {
                let few = nested(path, message.repeat(1000));
                assert!(protobuf::<E>(&few).is_ok(), "{name}");
                let many = nested(path, message.repeat(6_000_000));
                let status = protobuf::<E>(&many).err().expect(name);
                assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{name}");
            }
        }
        check::<ExportTraceServiceRequest>(&[
            ("resource spans", &[][..], field(1, b"")),
            ("scope spans", &[1], field(2, b"")),
            ("spans", &[1, 2], field(2, b"")),
            ("attributes of a resource", &[1, 1], field(1, b"")),
            ("entities", &[1, 1], field(3, b"")),
            ("keys of an entity", &[1, 1, 3], field(3, b"")),
            ("attributes of a scope", &[1, 2, 1], field(3, b"")),
            ("attributes", &[1, 2, 2], field(9, b"")),
            ("events", &[1, 2, 2], field(11, b"")),
            ("links", &[1, 2, 2], field(13, b"")),
            ("attributes of an event", &[1, 2, 2, 11], field(3, b"")),
            ("attributes of a link", &[1, 2, 2, 13], field(4, b"")),
            ("values of a list", &[1, 2, 2, 9, 2, 5], field(1, b"")),
            ("values of a map", &[1, 2, 2, 9, 2, 6], field(1, b"")),
        ]);
        check::<ExportLogsServiceRequest>(&[
            ("log records", &[1, 2], field(2, b"")),
            ("attributes of a log record", &[1, 2, 2], field(6, b"")),
            ("values of a body", &[1, 2, 2, 5, 5], field(1, b"")),
        ]);
        check::<ExportMetricsServiceRequest>(&[
            ("metrics", &[1, 2], field(2, b"")),
            ("metadata", &[1, 2, 2], field(12, b"")),
            ("points of a gauge", &[1, 2, 2, 5], field(1, b"")),
            ("points of a sum", &[1, 2, 2, 7], field(1, b"")),
            ("points of a histogram", &[1, 2, 2, 9], field(1, b"")),
            ("points of an exponential histogram", &[1, 2, 2, 10], field(1, b"")),
            ("points of a summary", &[1, 2, 2, 11], field(1, b"")),
            ("attributes of a point", &[1, 2, 2, 7, 1], field(7, b"")),
            ("exemplars", &[1, 2, 2, 9, 1], field(8, b"")),
            ("quantiles", &[1, 2, 2, 11, 1], field(6, b"").repeat(2)),
        ]);
    }

    #[test]
    fn many_small_messages_in_json_are_refused_undecoded() {
        for small in ["{},", "[],"] {
            let many = |count| {
                let spans = small.repeat(count);
                format!(r#"{{"resourceSpans":[{{"scopeSpans":[{{"spans":[{spans}{{}}]}}]}}]}}"#)
            };
            assert!(json::<ExportTraceServiceRequest>(many(1000).as_bytes()).is_ok());
            let status = json::<ExportTraceServiceRequest>(many(1_000_000).as_bytes()).expect_err(small);
            assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        }
    }

    #[test]
    fn a_deep_message_is_refused() {
        let deep = nested(&[5, 1].repeat(5000), Vec::new());
        let status =
            protobuf::<ExportTraceServiceRequest>(&nested(&[1, 2, 2, 9, 2], deep)).expect_err("deep");
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }

    proptest! {
        #[test]
        fn what_prost_decodes_is_decoded_here(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(protobuf(&bytes).ok(), ExportTraceServiceRequest::decode(&bytes[..]).ok());
            prop_assert_eq!(protobuf(&bytes).ok(), ExportMetricsServiceRequest::decode(&bytes[..]).ok());
            prop_assert_eq!(protobuf(&bytes).ok(), ExportLogsServiceRequest::decode(&bytes[..]).ok());
        }
    }
}
