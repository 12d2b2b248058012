//! AMQP: the parts that hand-written producer and consumer spans need.
//!
//! There is no layer here, because lapin has no place for one, and only a service's code knows where a
//! message is sent or processed. So the services open the spans by hand: `send_msg_mq` in
//! `api/src/publisher.rs`, and `mq_consumer_msg` in `mq/src/attempt.rs`. This file has the carrier
//! (message headers), the relation between the two spans, and their attributes (semantic conventions 1.45,
//! RabbitMQ).

mod broker;

pub use broker::Broker;

use lapin::types::{AMQPValue, FieldTable};
use opentelemetry::{
    Context,
    baggage::{BaggageExt, KeyValueMetadata},
    propagation::{Extractor, Injector},
    trace::{Link, SpanBuilder, SpanKind, TraceContextExt},
};
use std::str::FromStr;

/// AMQP message headers, as a carrier that a context is written to.
pub struct HeadersMut<'a>(pub &'a mut FieldTable);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        self.0.insert(key.into(), AMQPValue::LongString(value.into()));
    }
}

/// AMQP message headers, as a carrier that a context is read from. Names are compared without regard to case.
pub struct Headers<'a>(pub &'a FieldTable);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.get_all(key)?.first().copied()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.inner().keys().map(|name| name.as_str()).collect()
    }

    fn get_all(&self, key: &str) -> Option<Vec<&str>> {
        let same_name = self.0.inner().iter().filter(|(name, _)| name.as_str().eq_ignore_ascii_case(key));
        let values: Vec<&str> = same_name.flat_map(|(_, value)| strings(value)).collect();
        (!values.is_empty()).then_some(values)
    }
}

/// Returns the strings in a header value. A value that is not a string is malformed in every format, but it
/// must not look absent, so it becomes U+FFFD.
fn strings(value: &AMQPValue) -> Vec<&str> {
    fn utf8(value: &[u8]) -> &str {
        std::str::from_utf8(value).unwrap_or("\u{fffd}")
    }
    match value {
        AMQPValue::LongString(value) => vec![utf8(value.as_bytes())],
        // Clients send this type for Go's `[]byte`, Python's `bytes` and Java's `byte[]`.
        AMQPValue::ByteArray(value) => vec![utf8(value.as_slice())],
        AMQPValue::ShortString(value) => vec![value.as_str()],
        AMQPValue::FieldArray(values) => values.as_slice().iter().flat_map(strings).collect(),
        AMQPValue::Void => Vec::new(),
        _ => vec!["\u{fffd}"],
    }
}

/// Reads the producer's context from the headers, or else from the body. Also returns where it was found:
/// `headers`, `body` or `none`.
pub fn extract(headers: Option<&FieldTable>, body: &dyn Extractor) -> (Context, &'static str) {
    let continues_a_trace = |cx: &Context| cx.span().span_context().is_valid();
    let from_headers = headers.map(|headers| crate::extract(&Headers(headers))).unwrap_or_default();
    if continues_a_trace(&from_headers) {
        return (from_headers, "headers");
    }
    let from_body = crate::extract(body);
    if continues_a_trace(&from_body) {
        return (from_body, "body");
    }
    // There is no trace, but the headers may hold baggage.
    (from_headers, "none")
}

/// How a consumer span relates to the producer span.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Relation {
    /// The consumer span is a child of the producer span, in the same trace.
    #[default]
    Parent,
    /// The consumer span begins a new trace, with a link to the producer span.
    Link,
    /// The consumer span is a child of the producer span, and also has a link to it.
    Both,
}

impl FromStr for Relation {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, &'static str> {
        match name {
            "parent" => Ok(Self::Parent),
            "link" => Ok(Self::Link),
            "both" => Ok(Self::Both),
            _ => Err("expected parent, link or both"),
        }
    }
}

impl Relation {
    /// Makes a CONSUMER span for a message with the context `producer`. Returns the span's builder and its
    /// parent context, which has the message's baggage for every relation.
    pub fn consumer_span(self, name: &'static str, producer: Context) -> (SpanBuilder, Context) {
        let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Consumer);
        let target = producer.span().span_context().clone();
        if self == Self::Parent || !target.is_valid() {
            return (builder, producer);
        }
        let builder = builder.with_links(vec![Link::with_context(target)]);
        match self {
            Self::Link => (builder, with_baggage_only(&producer)),
            Self::Parent | Self::Both => (builder, producer),
        }
    }
}

/// Returns a context with the baggage of `cx` and no parent span. An invalid parent would be wrong, because
/// the samplers treat it as a parent that is not sampled.
fn with_baggage_only(cx: &Context) -> Context {
    let members = cx.baggage().iter();
    Context::new().with_baggage(
        members.map(|(key, (value, metadata))| {
            KeyValueMetadata::new(key.clone(), value.clone(), metadata.clone())
        }),
    )
}

#[cfg(test)]
mod tests;
