//! Decoding, bounded by what comes out of it: an empty span takes two bytes in protobuf and three hundred
//! decoded, so that a request of the size that is allowed could otherwise become gigabytes.

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, ArrayValue, EntityRef, InstrumentationScope, KeyValue, KeyValueList},
    resource::v1::Resource,
    trace::v1::{
        ResourceSpans, ScopeSpans, Span,
        span::{Event, Link},
    },
};
use prost::Message;
use std::mem::size_of;
use tonic::Status;

/// What the messages of a request may take in memory, the texts in them aside: those are no larger than
/// the request. A hundred times of what a batch of an SDK takes.
const MAX_DECODED_BYTES: usize = 128 * 1024 * 1024;

/// As deep as prost decodes.
const MAX_DEPTH: usize = 100;

pub(super) fn protobuf(message: &[u8]) -> Result<ExportTraceServiceRequest, Status> {
    let mut budget = MAX_DECODED_BYTES;
    if !fits(message, Kind::Request, &mut budget, MAX_DEPTH) {
        return Err(too_much());
    }
    ExportTraceServiceRequest::decode(message).map_err(|error| Status::invalid_argument(error.to_string()))
}

pub(super) fn json(text: &[u8]) -> Result<ExportTraceServiceRequest, Status> {
    // Each bracket may be a message's, and any message a span: that is the largest.
    let brackets = text.iter().filter(|byte| matches!(byte, b'{' | b'[')).count();
    if brackets * size_of::<Span>() > MAX_DECODED_BYTES {
        return Err(too_much());
    }
    serde_json::from_slice(text).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn too_much() -> Status {
    Status::resource_exhausted("the request has too many spans, attributes, events or links")
}

/// A message that may be there many times, or has such in it.
#[derive(Clone, Copy)]
enum Kind {
    Request,
    ResourceSpans,
    Resource,
    EntityRef,
    ScopeSpans,
    Scope,
    Span,
    Event,
    Link,
    KeyValue,
    AnyValue,
    ArrayValue,
    KeyValueList,
    Text,
}

impl Kind {
    /// What it takes once decoded.
    fn bytes(self) -> usize {
        match self {
            Self::Request => size_of::<ExportTraceServiceRequest>(),
            Self::ResourceSpans => size_of::<ResourceSpans>(),
            Self::Resource => size_of::<Resource>(),
            Self::EntityRef => size_of::<EntityRef>(),
            Self::ScopeSpans => size_of::<ScopeSpans>(),
            Self::Scope => size_of::<InstrumentationScope>(),
            Self::Span => size_of::<Span>(),
            Self::Event => size_of::<Event>(),
            Self::Link => size_of::<Link>(),
            Self::KeyValue => size_of::<KeyValue>(),
            Self::AnyValue => size_of::<AnyValue>(),
            Self::ArrayValue => size_of::<ArrayValue>(),
            Self::KeyValueList => size_of::<KeyValueList>(),
            Self::Text => size_of::<String>(),
        }
    }

    /// The message in its field of this number.
    fn field(self, number: usize) -> Option<Self> {
        match (self, number) {
            (Self::Request, 1) => Some(Self::ResourceSpans),
            (Self::ResourceSpans, 1) => Some(Self::Resource),
            (Self::ResourceSpans, 2) => Some(Self::ScopeSpans),
            (Self::Resource, 3) => Some(Self::EntityRef),
            (Self::EntityRef, 3 | 4) => Some(Self::Text),
            (Self::ScopeSpans, 1) => Some(Self::Scope),
            (Self::ScopeSpans, 2) => Some(Self::Span),
            (Self::Span, 11) => Some(Self::Event),
            (Self::Span, 13) => Some(Self::Link),
            (Self::Resource, 1)
            | (Self::Scope, 3)
            | (Self::Span, 9)
            | (Self::Event, 3)
            | (Self::Link, 4)
            | (Self::KeyValueList, 1) => Some(Self::KeyValue),
            (Self::KeyValue, 2) | (Self::ArrayValue, 1) => Some(Self::AnyValue),
            (Self::AnyValue, 5) => Some(Self::ArrayValue),
            (Self::AnyValue, 6) => Some(Self::KeyValueList),
            _ => None,
        }
    }
}

/// Whether the messages in this one take no more than the budget, which they use up. What is malformed
/// ends the count: it is for the decoder to say so.
fn fits(mut message: &[u8], kind: Kind, budget: &mut usize, depth: usize) -> bool {
    while let Some((number, bytes)) = next_field(&mut message) {
        let Some(inner) = kind.field(number) else {
            continue;
        };
        let Some(left) = budget.checked_sub(inner.bytes()) else {
            return false;
        };
        *budget = left;
        // What is nested deeper, the decoder refuses.
        if depth > 0 && !matches!(inner, Kind::Text) && !fits(bytes, inner, budget, depth - 1) {
            return false;
        }
    }
    true
}

/// The next field that has a length: its number and its bytes.
fn next_field<'a>(message: &mut &'a [u8]) -> Option<(usize, &'a [u8])> {
    // prost's name for it is narrow: it decodes any varint.
    let varint = |message: &mut &[u8]| prost::decode_length_delimiter(message).ok();
    loop {
        let key = varint(message)?;
        let skipped = match key & 7 {
            0 => varint(message).map(|_| 0)?,
            1 => 8,
            5 => 4,
            // The beginning and the end of a group: what is between is skipped field by field.
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

    /// A field of this number with these bytes.
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
        for (name, path, message) in [
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
        ] {
            let few = nested(path, message.repeat(1000));
            assert!(protobuf(&few).is_ok(), "{name}");
            let many = nested(path, message.repeat(6_000_000));
            let status = protobuf(&many).expect_err(name);
            assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{name}");
        }
    }

    #[test]
    fn many_small_messages_in_json_are_refused_undecoded() {
        for small in ["{},", "[],"] {
            let many = |count| {
                let spans = small.repeat(count);
                format!(r#"{{"resourceSpans":[{{"scopeSpans":[{{"spans":[{spans}{{}}]}}]}}]}}"#)
            };
            assert!(json(many(1000).as_bytes()).is_ok());
            let status = json(many(1_000_000).as_bytes()).expect_err(small);
            assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        }
    }

    #[test]
    fn a_deep_message_is_refused() {
        let deep = nested(&[5, 1].repeat(5000), Vec::new());
        let status = protobuf(&nested(&[1, 2, 2, 9, 2], deep)).expect_err("deep");
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }

    proptest! {
        #[test]
        fn what_prost_decodes_is_decoded_here(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let here = protobuf(&bytes).ok();
            prop_assert_eq!(here, ExportTraceServiceRequest::decode(&bytes[..]).ok());
        }
    }
}
