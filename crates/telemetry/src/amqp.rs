//! AMQP: the parts that hand-written producer and consumer spans need.
//!
//! There is no layer here, because lapin has no place for one, and only a service's code knows where a
//! message is sent or processed. So the services open the spans by hand: `send_msg_mq` in
//! `api/src/publisher.rs`, and `mq_consumer_msg` in `mq/src/attempt.rs`. This file has the carrier
//! (message headers), the relation between the two spans, and their attributes (semantic conventions 1.45,
//! RabbitMQ).

use crate::{metrics, redaction::without_long_numbers, semconv};
use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use opentelemetry::{
    Context, KeyValue,
    baggage::{BaggageExt, KeyValueMetadata},
    metrics::{Counter, Histogram},
    propagation::{Extractor, Injector},
    trace::{Link, SpanBuilder, SpanKind, TraceContextExt},
};
use std::{
    fmt, slice,
    str::FromStr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};
use uuid::Uuid;

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
        // This is how some clients send a byte string: Go a `[]byte`, Python `bytes`, Java a `byte[]`.
        AMQPValue::ByteArray(value) => vec![utf8(value.as_slice())],
        AMQPValue::ShortString(value) => vec![value.as_str()],
        AMQPValue::FieldArray(values) => values.as_slice().iter().flat_map(strings).collect(),
        AMQPValue::Void => Vec::new(),
        _ => vec!["\u{fffd}"],
    }
}

/// Where a message's trace context was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContextSource {
    /// In the AMQP headers, which are read first.
    Headers,
    /// In the body.
    Body,
    /// In neither, or it was malformed.
    None,
}

impl ContextSource {
    fn as_str(self) -> &'static str {
        match self {
            Self::Headers => "headers",
            Self::Body => "body",
            Self::None => "none",
        }
    }
}

/// Reads the producer's context from the headers, or else from the body.
pub fn extract(headers: Option<&FieldTable>, body: &dyn Extractor) -> (Context, ContextSource) {
    let continues_a_trace = |cx: &Context| cx.span().span_context().is_valid();
    let from_headers = headers.map(|headers| crate::extract(&Headers(headers))).unwrap_or_default();
    if continues_a_trace(&from_headers) {
        return (from_headers, ContextSource::Headers);
    }
    let from_body = crate::extract(body);
    if continues_a_trace(&from_body) {
        return (from_body, ContextSource::Body);
    }
    // There is no trace, but the headers may hold baggage.
    (from_headers, ContextSource::None)
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
    type Err = UnknownRelation;

    fn from_str(name: &str) -> Result<Self, UnknownRelation> {
        match name {
            "parent" => Ok(Self::Parent),
            "link" => Ok(Self::Link),
            "both" => Ok(Self::Both),
            _ => Err(UnknownRelation),
        }
    }
}

/// The error for a name that is not the name of a [`Relation`].
#[derive(Debug, thiserror::Error)]
#[error("expected parent, link or both")]
pub struct UnknownRelation;

impl Relation {
    /// Makes a CONSUMER span for a message with the context `producer`. Returns the span's builder and its
    /// parent context, which has the message's baggage whatever the relation.
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

/// Returns a context with the baggage of `cx` and no parent span. An invalid parent is no substitute, because
/// the samplers treat it as a parent that is not sampled.
fn with_baggage_only(cx: &Context) -> Context {
    let members = cx.baggage().iter();
    Context::new().with_baggage(
        members.map(|(key, (value, metadata))| {
            KeyValueMetadata::new(key.clone(), value.clone(), metadata.clone())
        }),
    )
}

/// Describes the broker in spans and metrics.
#[derive(Debug, Clone)]
pub struct Broker {
    /// The name or address of each host, and its port.
    hosts: Vec<(String, i64)>,
    current: Arc<AtomicUsize>,
    client_id: String,
    metrics: Option<Metrics>,
}

/// The metrics `messaging.*` of semantic conventions 1.45.
#[derive(Debug, Clone)]
struct Metrics {
    operation: Histogram<f64>,
    process: Histogram<f64>,
    sent: Counter<u64>,
    consumed: Counter<u64>,
}

impl Metrics {
    fn new() -> Self {
        let meter = metrics::meter();
        let messages = |name| meter.u64_counter(name).with_unit("{message}").build();
        Self {
            operation: metrics::duration_histogram(&meter, "messaging.client.operation.duration"),
            process: metrics::duration_histogram(&meter, "messaging.process.duration"),
            sent: messages("messaging.client.sent.messages"),
            consumed: messages("messaging.client.consumed.messages"),
        }
    }
}

/// Tells this process from other instances of its service.
static INSTANCE: LazyLock<String> = LazyLock::new(|| Uuid::new_v4().simple().to_string().split_off(24));

impl Broker {
    /// `client_id` is the name that the connection has on the broker. Spans add some digits to it, because several
    /// instances of a service have the same name there.
    pub fn new(uri: &AMQPUri, client_id: &'static str) -> Self {
        Self::of_hosts(slice::from_ref(uri), Arc::default(), client_id)
    }

    /// Describes a broker of several hosts, at least one. `current` is the number of the host that is connected
    /// to, and may count beyond the end of the list.
    pub fn of_hosts(hosts: &[AMQPUri], current: Arc<AtomicUsize>, client_id: &'static str) -> Self {
        let host = |uri: &AMQPUri| (uri.authority.host.clone(), uri.authority.port.into());
        Self {
            hosts: hosts.iter().map(host).collect(),
            current,
            client_id: format!("{client_id}-{}", *INSTANCE),
            metrics: metrics::are_exported().then(Metrics::new),
        }
    }

    fn host(&self) -> (&str, i64) {
        let (address, port) = &self.hosts[self.current.load(Relaxed) % self.hosts.len()];
        (address, *port)
    }

    /// Counts messages that were sent to the broker together at `started`, and records how long it took until
    /// the last of them was confirmed. If they failed, `error` is their `error.type`.
    pub fn sent(
        &self,
        (exchange, routing_key): (&str, &str),
        messages: u64,
        started: Instant,
        error: Option<&'static str>,
    ) {
        if let Some(metrics) = &self.metrics {
            let attributes = self.labels("send", destination_name(&[exchange, routing_key]), error);
            metrics.sent.add(messages, &attributes);
            let operation_type = KeyValue::new(semconv::MESSAGING_OPERATION_TYPE, "send");
            let attributes = [&attributes[..], &[operation_type]].concat();
            metrics.operation.record(started.elapsed().as_secs_f64(), &attributes);
        }
    }

    /// Counts a delivery from `queue` whose processing began at `started` and ends now. If it failed, `error`
    /// is its `error.type`.
    pub fn processed(&self, queue: &str, started: Instant, error: Option<&'static str>) {
        if let Some(metrics) = &self.metrics {
            // The exchange and the routing key are left out, because a producer can choose new ones for each
            // message.
            let attributes = self.labels("process", queue.to_owned(), error);
            metrics.consumed.add(1, &attributes);
            metrics.process.record(started.elapsed().as_secs_f64(), &attributes);
        }
    }

    fn labels(
        &self,
        operation: &'static str,
        destination: String,
        error: Option<&'static str>,
    ) -> Vec<KeyValue> {
        let (address, port) = self.host();
        let mut labels = vec![
            KeyValue::new(semconv::MESSAGING_SYSTEM, "rabbitmq"),
            KeyValue::new(semconv::MESSAGING_OPERATION_NAME, operation),
            KeyValue::new(semconv::MESSAGING_DESTINATION_NAME, destination),
            KeyValue::new(semconv::SERVER_ADDRESS, address.to_owned()),
            KeyValue::new(semconv::SERVER_PORT, port),
        ];
        labels.extend(error.map(|error| KeyValue::new(semconv::ERROR_TYPE, error)));
        labels
    }

    /// Returns the attributes of a PRODUCER span.
    pub fn producer_attributes(&self, exchange: &str, routing_key: &str, message_id: &str) -> Vec<KeyValue> {
        let mut attributes =
            self.attributes("send", &destination_name(&[exchange, routing_key]), routing_key);
        attributes.push(KeyValue::new(semconv::MESSAGING_MESSAGE_ID, message_id.to_owned()));
        attributes
    }

    /// Returns the attributes that a PRODUCER span has in addition once its message was sent.
    pub fn peer_attributes(&self) -> Vec<KeyValue> {
        let (address, port) = self.host();
        crate::peer(address, port)
    }

    /// Returns the attributes of a CONSUMER span. `message_id` is the message's own id, or the id that
    /// replaces it.
    pub fn consumer_attributes(
        &self,
        delivery: &Delivery,
        queue: &str,
        source: ContextSource,
        message_id: &str,
    ) -> Vec<KeyValue> {
        let (exchange, routing_key) = (delivery.exchange.as_str(), delivery.routing_key.as_str());
        let destination = destination_name(&[exchange, routing_key, queue]);
        let mut attributes = self.attributes("process", &destination, routing_key);
        let delivery_tag = delivery.delivery_tag.cast_signed();
        attributes.push(KeyValue::new(semconv::MESSAGING_RABBITMQ_DELIVERY_TAG, delivery_tag));
        attributes.push(KeyValue::new(semconv::TRACE_CONTEXT_SOURCE, source.as_str()));
        attributes.push(KeyValue::new(semconv::MESSAGING_MESSAGE_ID, message_id.to_owned()));
        if let Some(id) = delivery.properties.correlation_id() {
            let id: String = without_long_numbers(id.as_str());
            attributes.push(KeyValue::new(semconv::MESSAGING_CONVERSATION_ID, id));
        }
        attributes
    }

    fn attributes(&self, operation: &'static str, destination: &str, routing_key: &str) -> Vec<KeyValue> {
        let (address, port) = self.host();
        let mut attributes = Vec::with_capacity(16);
        attributes.extend([
            KeyValue::new(semconv::MESSAGING_SYSTEM, "rabbitmq"),
            KeyValue::new(semconv::MESSAGING_OPERATION_NAME, operation),
            KeyValue::new(semconv::MESSAGING_OPERATION_TYPE, operation),
            KeyValue::new(semconv::MESSAGING_DESTINATION_NAME, destination.to_owned()),
            KeyValue::new(semconv::MESSAGING_CLIENT_ID, self.client_id.clone()),
            KeyValue::new(semconv::SERVER_ADDRESS, address.to_owned()),
            KeyValue::new(semconv::SERVER_PORT, port),
        ]);
        if !routing_key.is_empty() {
            attributes.push(KeyValue::new(semconv::MESSAGING_RABBITMQ_ROUTING_KEY, routing_key.to_owned()));
        }
        attributes
    }
}

/// Joins the parts to `{exchange}:{routing key}`, followed by `:{queue}` for a consumer. Empty and repeated
/// parts are left out. If nothing remains, the name is that of the default exchange (RabbitMQ spans,
/// `messaging.destination.name`).
fn destination_name(parts: &[&str]) -> String {
    let mut kept: Vec<&str> = Vec::with_capacity(parts.len());
    for part in parts {
        if !part.is_empty() && !kept.contains(part) {
            kept.push(part);
        }
    }
    if kept.is_empty() { "amq.default".to_owned() } else { kept.join(":") }
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (address, port) = self.host();
        write!(f, "{address}:{port}")
    }
}

#[cfg(test)]
mod tests;
