//! The broker as spans and metrics describe it.

use crate::{metrics, redaction::without_long_numbers, scope::layers_meter, semconv};
use lapin::{message::Delivery, uri::AMQPUri};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram},
};
use std::{
    fmt, slice,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};
use uuid::Uuid;

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
        let meter = layers_meter();
        let messages = |name| meter.u64_counter(name).with_unit("{message}").build();
        Self {
            operation: metrics::duration_histogram(&meter, "messaging.client.operation.duration"),
            process: metrics::duration_histogram(&meter, "messaging.process.duration"),
            sent: messages("messaging.client.sent.messages"),
            consumed: messages("messaging.client.consumed.messages"),
        }
    }
}

/// Distinguishes this process from other instances of its service.
static INSTANCE: LazyLock<String> = LazyLock::new(|| Uuid::new_v4().simple().to_string().split_off(24));

impl Broker {
    /// Describes a broker with one host. `client_id` is the connection's name on the broker. Spans add some
    /// digits to the name, because all instances of a service have the same name there.
    pub fn new(uri: &AMQPUri, client_id: &'static str) -> Self {
        Self::of_hosts(slice::from_ref(uri), Arc::default(), client_id)
    }

    /// Describes a broker with one or more hosts. `current` is the index of the connected host. An index
    /// beyond the end of the list counts from the first host again.
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
        // There is room for the attributes of a span.
        let mut labels = Vec::with_capacity(16);
        labels.extend([
            KeyValue::new(semconv::MESSAGING_SYSTEM, "rabbitmq"),
            KeyValue::new(semconv::MESSAGING_OPERATION_NAME, operation),
            KeyValue::new(semconv::MESSAGING_DESTINATION_NAME, destination),
            KeyValue::new(semconv::SERVER_ADDRESS, address.to_owned()),
            KeyValue::new(semconv::SERVER_PORT, port),
        ]);
        labels.extend(error.map(|error| KeyValue::new(semconv::ERROR_TYPE, error)));
        labels
    }

    /// Returns the attributes of a PRODUCER span.
    pub fn producer_attributes(&self, exchange: &str, routing_key: &str, message_id: &str) -> Vec<KeyValue> {
        let mut attributes = self.attributes("send", destination_name(&[exchange, routing_key]), routing_key);
        attributes.push(KeyValue::new(semconv::MESSAGING_MESSAGE_ID, message_id.to_owned()));
        attributes
    }

    /// Returns the attributes that are added to a PRODUCER span after its message was sent.
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
        source: &'static str,
        message_id: &str,
    ) -> Vec<KeyValue> {
        let (exchange, routing_key) = (delivery.exchange.as_str(), delivery.routing_key.as_str());
        let destination = destination_name(&[exchange, routing_key, queue]);
        let mut attributes = self.attributes("process", destination, routing_key);
        let delivery_tag = delivery.delivery_tag.cast_signed();
        attributes.push(KeyValue::new(semconv::MESSAGING_RABBITMQ_DELIVERY_TAG, delivery_tag));
        attributes.push(KeyValue::new(semconv::TRACE_CONTEXT_SOURCE, source));
        attributes.push(KeyValue::new(semconv::MESSAGING_MESSAGE_ID, message_id.to_owned()));
        if let Some(id) = delivery.properties.correlation_id() {
            let id: String = without_long_numbers(id.as_str());
            attributes.push(KeyValue::new(semconv::MESSAGING_CONVERSATION_ID, id));
        }
        attributes
    }

    fn attributes(&self, operation: &'static str, destination: String, routing_key: &str) -> Vec<KeyValue> {
        let mut attributes = self.labels(operation, destination, None);
        attributes.push(KeyValue::new(semconv::MESSAGING_OPERATION_TYPE, operation));
        attributes.push(KeyValue::new(semconv::MESSAGING_CLIENT_ID, self.client_id.clone()));
        if !routing_key.is_empty() {
            attributes.push(KeyValue::new(semconv::MESSAGING_RABBITMQ_ROUTING_KEY, routing_key.to_owned()));
        }
        attributes
    }
}

/// Joins the parts to `{exchange}:{routing key}`, followed by `:{queue}` for a consumer. Empty and repeated
/// parts are left out. If nothing remains, the name is that of the default exchange (RabbitMQ spans,
/// `messaging.destination.name`).
pub(super) fn destination_name(parts: &[&str]) -> String {
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
