//! Reading the properties of a message that anybody may have written.

use lapin::{BasicProperties, types::AMQPValue};

/// Delivery mode "persistent" (AMQP 0-9-1, class `basic`): the message survives a restart of the broker.
pub const PERSISTENT: u8 = 2;

/// Stands for properties that can't be read (long string: the properties as bytes, or empty if they are very
/// long). [`inbound`](crate::inbound) puts this header in place of all others.
pub const UNREADABLE: &str = "x-unreadable-properties";

/// The header of this name.
pub fn header<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a AMQPValue> {
    properties.headers().as_ref()?.inner().get(name)
}

/// A whole number, whichever of AMQP's types the language of the client made of it.
pub fn integer(value: &AMQPValue) -> Option<i64> {
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
