//! A message, and how it changes when it is dead-lettered.

use super::exception::{Exception, Outcome};
use amq_protocol::{
    frame::WriteContext,
    protocol::{BasicProperties, basic::gen_properties, basic::parse_properties},
    types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString},
};
use bytes::Bytes;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const X_DEATH: &str = "x-death";

/// A message as it was published.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The exchange that the message was published to.
    pub exchange: ShortString,
    /// The routing key that the message was published with.
    pub routing_key: ShortString,
    /// The properties as received, flags first. The broker passes them on unchanged.
    pub properties: Vec<u8>,
    /// The body.
    pub body: Bytes,
    /// How long the message may wait in a queue, from its property `expiration`.
    pub expiration: Option<Duration>,
}

/// Why a message is dead-lettered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A consumer rejected the message without requeueing it.
    Rejected,
    /// The message waited too long.
    Expired,
    /// The queue had reached its maximum length.
    MaxLen,
    /// The message was requeued more often than its quorum queue allows.
    DeliveryLimit,
}

impl Reason {
    /// Returns the reason as written in `x-death`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Expired => "expired",
            Self::MaxLen => "maxlen",
            Self::DeliveryLimit => "delivery_limit",
        }
    }
}

impl Message {
    /// Returns how many bytes of memory the message takes in a queue.
    pub fn size(&self) -> usize {
        const OF_ITSELF: usize = 256;
        OF_ITSELF + self.properties.len() + self.body.len()
    }

    /// Returns whether the message survives [`Broker::crash`](super::Broker::crash) in a durable queue, which
    /// needs delivery mode 2.
    pub fn is_persistent(&self) -> bool {
        let properties = parse_properties(&self.properties[..]);
        properties.is_ok_and(|(_, properties)| *properties.delivery_mode() == Some(2))
    }

    /// Returns the message as its queue passes it to the dead-letter exchange. The header `x-death` records
    /// this dead-lettering. The property `expiration` is removed, because otherwise the message would expire
    /// again in the next queue. Returns `None` if the new properties cannot be encoded, or are too long for a
    /// frame.
    pub fn after_death(
        &self,
        reason: Reason,
        queue: &str,
        to: &ShortString,
        key: Option<&ShortString>,
    ) -> Option<Self> {
        /// The bound leaves room for the rest of the frame.
        const LONGEST: usize = super::frames::FRAME_MAX - 64;

        let (_, properties) = parse_properties(&self.properties[..]).ok()?;
        let headers = self.headers_after_death(reason, queue, &properties)?;
        let properties = without_expiration(&properties).with_headers(headers);
        let (properties, _) = gen_properties(&properties)(WriteContext::from(Vec::new())).ok()?.into_inner();
        (properties.len() <= LONGEST).then(|| Self {
            exchange: to.clone(),
            routing_key: key.unwrap_or(&self.routing_key).clone(),
            properties,
            body: self.body.clone(),
            expiration: None,
        })
    }

    /// Returns the queues that this dead letter has passed through since a consumer last rejected it. If the
    /// message entered one of these queues again, it would cycle for ever.
    pub fn queues_gone_through(&self) -> Vec<LongString> {
        let Ok((_, properties)) = parse_properties(&self.properties[..]) else {
            return Vec::new();
        };
        let deaths = properties.headers().as_ref().map(deaths).unwrap_or_default();
        let by_itself = deaths
            .iter()
            .take_while(|death| text(death, "reason") != Some(Reason::Rejected.as_str().as_bytes()));
        by_itself.filter_map(|death| text(death, "queue").map(LongString::from)).collect()
    }

    /// Adds this dead-lettering to the headers. `x-death` has one entry for each pair of queue and reason,
    /// with the latest entry first. For AMQP 0-9-1 clients, RabbitMQ 4 writes the same headers, and also
    /// `x-last-death-*`.
    fn headers_after_death(
        &self,
        reason: Reason,
        queue: &str,
        properties: &BasicProperties,
    ) -> Option<FieldTable> {
        let mut headers = properties.headers().clone().unwrap_or_default();
        let mut deaths = deaths(&headers);
        let same = |death: &FieldTable| {
            text(death, "queue") == Some(queue.as_bytes())
                && text(death, "reason") == Some(reason.as_str().as_bytes())
        };
        let death = match deaths.iter().position(same) {
            Some(before) => {
                let mut death = deaths.remove(before);
                let count = match death.inner().get("count") {
                    Some(AMQPValue::LongLongInt(count)) => count.saturating_add(1),
                    _ => 1,
                };
                death.insert("count".into(), AMQPValue::LongLongInt(count));
                death
            }
            None => self.death(reason, queue, properties)?,
        };
        if !headers.contains_key(X_DEATH) {
            headers.insert("x-first-death-reason".into(), string(reason.as_str()));
            headers.insert("x-first-death-queue".into(), string(queue));
            headers.insert("x-first-death-exchange".into(), string(self.exchange.as_str()));
        }
        deaths.insert(0, death);
        let deaths: Vec<_> = deaths.into_iter().map(AMQPValue::FieldTable).collect();
        headers.insert(X_DEATH.into(), AMQPValue::FieldArray(deaths.into()));
        Some(headers)
    }

    fn death(&self, reason: Reason, queue: &str, properties: &BasicProperties) -> Option<FieldTable> {
        let mut routing_keys = FieldArray::default();
        routing_keys.push(string(self.routing_key.as_str()));
        let mut death = FieldTable::default();
        death.insert("count".into(), AMQPValue::LongLongInt(1));
        death.insert("reason".into(), string(reason.as_str()));
        death.insert("queue".into(), string(queue));
        death.insert("exchange".into(), string(self.exchange.as_str()));
        death.insert("routing-keys".into(), AMQPValue::FieldArray(routing_keys));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        death.insert("time".into(), AMQPValue::Timestamp(now));
        if let Some(expiration) = properties.expiration() {
            death.insert("original-expiration".into(), string(expiration.as_str()));
        }
        Some(death)
    }
}

/// Parses the property `expiration`, which is milliseconds in decimal digits.
pub fn expiration(properties: &BasicProperties) -> Outcome<Option<Duration>> {
    let Some(text) = properties.expiration() else {
        return Ok(None);
    };
    // A number with a sign is refused, and so is a number that RabbitMQ's timers don't accept.
    let is_number = text.as_str().bytes().all(|byte| byte.is_ascii_digit());
    match text.as_str().parse::<u32>() {
        Ok(milliseconds) if is_number => Ok(Some(Duration::from_millis(milliseconds.into()))),
        _ => Err(Exception::precondition_failed(format!("invalid expiration '{text}'"))),
    }
}

fn deaths(headers: &FieldTable) -> Vec<FieldTable> {
    let Some(AMQPValue::FieldArray(deaths)) = headers.inner().get(X_DEATH) else {
        return Vec::new();
    };
    let tables = deaths.as_slice().iter().filter_map(|death| match death {
        AMQPValue::FieldTable(death) => Some(death.clone()),
        _ => None,
    });
    tables.collect()
}

fn text<'a>(death: &'a FieldTable, name: &str) -> Option<&'a [u8]> {
    match death.inner().get(name) {
        Some(AMQPValue::LongString(text)) => Some(text.as_bytes()),
        _ => None,
    }
}

fn string(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Copies all properties except `expiration`, because `BasicProperties` cannot unset a property.
fn without_expiration(properties: &BasicProperties) -> BasicProperties {
    let mut kept = BasicProperties::default();
    for (value, set) in [
        (properties.content_type(), BasicProperties::with_content_type as fn(_, _) -> _),
        (properties.content_encoding(), BasicProperties::with_content_encoding),
        (properties.correlation_id(), BasicProperties::with_correlation_id),
        (properties.reply_to(), BasicProperties::with_reply_to),
        (properties.message_id(), BasicProperties::with_message_id),
        (properties.kind(), BasicProperties::with_type),
        (properties.user_id(), BasicProperties::with_user_id),
        (properties.app_id(), BasicProperties::with_app_id),
        (properties.cluster_id(), BasicProperties::with_cluster_id),
    ] {
        if let Some(value) = value {
            kept = set(kept, value.clone());
        }
    }
    if let Some(mode) = *properties.delivery_mode() {
        kept = kept.with_delivery_mode(mode);
    }
    if let Some(priority) = *properties.priority() {
        kept = kept.with_priority(priority);
    }
    if let Some(timestamp) = *properties.timestamp() {
        kept = kept.with_timestamp(timestamp);
    }
    kept
}
