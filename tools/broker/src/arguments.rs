//! The arguments of a queue's declaration.

use super::exception::{Exception, Outcome};
use amq_protocol::types::{AMQPValue, FieldTable, ShortString};
use std::time::Duration;

/// The type of a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QueueType {
    /// The queue requeues a message without a limit.
    #[default]
    Classic,
    /// The queue counts how often each message is requeued, and can keep dead letters until another queue has
    /// accepted them. The queue is not replicated here, because there is only one node.
    Quorum,
}

/// What the broker does when a queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// The oldest message is removed.
    DropHead,
    /// The new message is refused, and a publisher in confirm mode gets a nack.
    RejectPublish,
}

/// The arguments that this broker supports. If a queue is declared again, these arguments must be the same.
/// Like RabbitMQ, the broker ignores all other arguments.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Arguments {
    /// `x-queue-type`: the type of the queue.
    pub queue_type: QueueType,
    /// `x-delivery-limit`, for a quorum queue: how often a message may be requeued.
    pub delivery_limit: Option<usize>,
    /// `x-dead-letter-strategy`, for a quorum queue: whether the strategy is `at-least-once`.
    pub at_least_once: bool,
    /// `x-message-ttl`: how long a message may wait.
    pub message_ttl: Option<Duration>,
    /// `x-expires`: how long the queue may be unused.
    pub expires: Option<Duration>,
    /// `x-dead-letter-exchange`: the exchange that dead letters are published to.
    pub dead_letter_exchange: Option<ShortString>,
    /// `x-dead-letter-routing-key`: the routing key of dead letters. If it is not set, dead letters keep
    /// their own routing keys.
    pub dead_letter_routing_key: Option<ShortString>,
    /// `x-max-length`: how many messages may wait.
    pub max_length: Option<usize>,
    /// `x-overflow`: what the broker does when the queue is full.
    pub overflow: Option<Overflow>,
}

impl Arguments {
    /// Parses the arguments of a declaration of `queue`.
    pub fn parse(queue: &str, table: &FieldTable) -> Outcome<Self> {
        let invalid = |name: &str| {
            Exception::precondition_failed(format!("invalid arg '{name}' for queue '{queue}' in vhost '/'"))
        };
        let number = |name: &str| match table.inner().get(name) {
            None => Ok(None),
            // RabbitMQ's timers accept at most 32 bits.
            Some(value) => {
                integer(value).and_then(|n| u32::try_from(n).ok()).map(Some).ok_or_else(|| invalid(name))
            }
        };
        let milliseconds = |name: &str| Ok(number(name)?.map(|n| Duration::from_millis(n.into())));
        let string = |name: &str| match table.inner().get(name) {
            None => Ok(None),
            Some(value) => string(value).map(Some).ok_or_else(|| invalid(name)),
        };

        let queue_type = match string("x-queue-type")?.as_ref().map(ShortString::as_str) {
            None | Some("classic") => QueueType::Classic,
            Some("quorum") => QueueType::Quorum,
            Some(other) => return Err(Exception::not_implemented(format!("queues of type '{other}'"))),
        };
        let at_least_once = match string("x-dead-letter-strategy")?.as_ref().map(ShortString::as_str) {
            None | Some("at-most-once") => false,
            Some("at-least-once") => true,
            Some(_) => return Err(invalid("x-dead-letter-strategy")),
        };
        if table.contains_key("x-max-priority") {
            return Err(Exception::not_implemented("priorities"));
        }
        if table.contains_key("x-max-length-bytes") {
            return Err(Exception::not_implemented("a maximum length in bytes"));
        }
        if table.inner().get("x-single-active-consumer") == Some(&AMQPValue::Boolean(true)) {
            return Err(Exception::not_implemented("single active consumers"));
        }
        let overflow = match string("x-overflow")?.as_ref().map(ShortString::as_str) {
            None => None,
            Some("drop-head") => Some(Overflow::DropHead),
            Some("reject-publish") => Some(Overflow::RejectPublish),
            Some("reject-publish-dlx") => return Err(Exception::not_implemented("reject-publish-dlx")),
            Some(_) => return Err(invalid("x-overflow")),
        };
        let arguments = Self {
            queue_type,
            delivery_limit: number("x-delivery-limit")?.map(|n| n as usize),
            at_least_once,
            message_ttl: milliseconds("x-message-ttl")?,
            expires: milliseconds("x-expires")?,
            dead_letter_exchange: string("x-dead-letter-exchange")?,
            dead_letter_routing_key: string("x-dead-letter-routing-key")?,
            max_length: number("x-max-length")?.map(|n| n as usize),
            overflow,
        };
        if arguments.expires == Some(Duration::ZERO) {
            return Err(invalid("x-expires"));
        }
        if arguments.dead_letter_routing_key.is_some() && arguments.dead_letter_exchange.is_none() {
            return Err(invalid("x-dead-letter-routing-key"));
        }
        Ok(arguments)
    }

    /// Returns how many times a message may be requeued, or `None` if there is no limit. A quorum queue
    /// without `x-delivery-limit` has RabbitMQ 4's default limit.
    pub fn most_returns(&self) -> Option<usize> {
        const DEFAULT: usize = 20;
        (self.queue_type == QueueType::Quorum).then(|| self.delivery_limit.unwrap_or(DEFAULT))
    }

    /// Returns whether the queue keeps a dead letter until another queue has accepted it. As in RabbitMQ,
    /// this needs the strategy `at-least-once`, and a quorum queue that refuses new messages when it is full.
    pub fn keeps_dead_letters(&self) -> bool {
        self.queue_type == QueueType::Quorum
            && self.at_least_once
            && self.overflow == Some(Overflow::RejectPublish)
    }

    /// Returns the name of the first argument in which `other` differs.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("x-queue-type", self.queue_type == other.queue_type),
            ("x-delivery-limit", self.delivery_limit == other.delivery_limit),
            ("x-dead-letter-strategy", self.at_least_once == other.at_least_once),
            ("x-message-ttl", self.message_ttl == other.message_ttl),
            ("x-expires", self.expires == other.expires),
            ("x-dead-letter-exchange", self.dead_letter_exchange == other.dead_letter_exchange),
            ("x-dead-letter-routing-key", self.dead_letter_routing_key == other.dead_letter_routing_key),
            ("x-max-length", self.max_length == other.max_length),
            ("x-overflow", self.overflow == other.overflow),
        ]
        .into_iter()
        .find_map(|(name, is_same)| (!is_same).then_some(name))
    }
}

fn integer(value: &AMQPValue) -> Option<i64> {
    match *value {
        AMQPValue::ShortShortInt(n) => Some(n.into()),
        AMQPValue::ShortShortUInt(n) => Some(n.into()),
        AMQPValue::ShortInt(n) => Some(n.into()),
        AMQPValue::ShortUInt(n) => Some(n.into()),
        AMQPValue::LongInt(n) => Some(n.into()),
        AMQPValue::LongUInt(n) => Some(n.into()),
        AMQPValue::LongLongInt(n) => Some(n),
        _ => None,
    }
}

/// Returns the value as a short string, or `None` if the value is not a string, is not UTF-8, or is longer
/// than 255 bytes.
pub fn string(value: &AMQPValue) -> Option<ShortString> {
    match value {
        AMQPValue::LongString(text) => ShortString::try_new(std::str::from_utf8(text.as_bytes()).ok()?).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, value: AMQPValue) -> Outcome<Arguments> {
        let mut table = FieldTable::default();
        table.insert(name.into(), value);
        Arguments::parse("q", &table)
    }

    #[test]
    fn what_can_not_be_is_refused_and_what_is_not_known_ignored() {
        for (name, value, code) in [
            ("x-message-ttl", AMQPValue::LongInt(-1), 406),
            ("x-message-ttl", AMQPValue::LongString("1000".into()), 406),
            ("x-message-ttl", AMQPValue::LongLongInt(i64::MAX), 406),
            ("x-expires", AMQPValue::LongInt(0), 406),
            ("x-dead-letter-exchange", AMQPValue::LongString("x".repeat(256).into()), 406),
            ("x-dead-letter-exchange", AMQPValue::LongString(b"\xff"[..].into()), 406),
            ("x-dead-letter-routing-key", AMQPValue::LongString("without exchange".into()), 406),
            ("x-overflow", AMQPValue::LongString("spill".into()), 406),
            ("x-queue-type", AMQPValue::LongString("stream".into()), 540),
            ("x-dead-letter-strategy", AMQPValue::LongString("twice".into()), 406),
            ("x-max-priority", AMQPValue::LongInt(10), 540),
            ("x-max-length-bytes", AMQPValue::LongInt(10), 540),
            ("x-overflow", AMQPValue::LongString("reject-publish-dlx".into()), 540),
            ("x-single-active-consumer", AMQPValue::Boolean(true), 540),
        ] {
            let refused = parse(name, value.clone()).expect_err(name);
            assert_eq!(refused.code(), code, "{name} {value:?}");
        }
        assert_eq!(parse("x-else", AMQPValue::Void), Ok(Arguments::default()));
        assert_eq!(parse("x-queue-type", AMQPValue::LongString("classic".into())), Ok(Arguments::default()));
    }

    #[test]
    fn an_integer_of_any_width_is_the_same_argument() {
        let short = parse("x-message-ttl", AMQPValue::ShortShortInt(100)).expect("short");
        let long = parse("x-message-ttl", AMQPValue::LongLongInt(100)).expect("long");
        assert_eq!(short.difference(&long), None);
        assert_eq!(short.difference(&Arguments::default()), Some("x-message-ttl"));
    }
}
