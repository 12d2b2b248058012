//! Reads the properties of a message, and makes the properties with which the message is published again: to
//! a retry queue, to the dead-letter queue, or back to the main queue.

use amqp::properties::{PERSISTENT, fit, header, integer};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use proto::headers::{ATTEMPT, DEAD_LETTER_ATTEMPTS, DEAD_LETTER_REASON, PUBLISHED_AT, TIME_IN_SPOOL};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Returns the number of this attempt, counted from 1. The header may hold anything, because every publisher
/// can write it.
pub fn attempt(properties: &BasicProperties) -> u32 {
    let attempt = header(properties, ATTEMPT).and_then(integer).unwrap_or(1);
    u32::try_from(attempt.max(1)).unwrap_or(u32::MAX)
}

/// Returns how many attempts a dead letter has had.
pub fn dead_letter_attempts(properties: &BasicProperties) -> Option<i64> {
    header(properties, DEAD_LETTER_ATTEMPTS).and_then(integer)
}

/// Returns why a message became a dead letter.
pub fn dead_letter_reason(properties: &BasicProperties) -> Option<String> {
    match header(properties, DEAD_LETTER_REASON)? {
        AMQPValue::LongString(reason) => Some(reason.to_string()),
        _ => None,
    }
}

/// Returns when the message was last published. A time beyond the year 9999 counts as absent. So does 0,
/// which clients send for a time that they don't know.
pub fn published_at(properties: &BasicProperties) -> Option<SystemTime> {
    let milliseconds =
        header(properties, PUBLISHED_AT).and_then(integer).and_then(|ms| u64::try_from(ms).ok());
    let since_1970 = match milliseconds {
        Some(milliseconds) => Duration::from_millis(milliseconds),
        None => Duration::from_secs((*properties.timestamp())?),
    };
    const YEAR_10000: Duration = Duration::from_secs(253_402_300_800);
    (!since_1970.is_zero() && since_1970 < YEAR_10000).then(|| UNIX_EPOCH + since_1970)
}

/// Returns how long the login was in api's spool before it was published, in milliseconds.
pub fn time_in_spool(properties: &BasicProperties) -> Option<i64> {
    header(properties, TIME_IN_SPOOL).and_then(integer).filter(|milliseconds| *milliseconds >= 0)
}

/// Makes the properties with which a message is published again. They are the message's own properties and
/// `headers`, without those that the broker would act on:
///
/// - `expiration`, because a dead letter must stay. RabbitMQ also removes `expiration` from its dead letters.
/// - `user-id`, because the broker refuses any user except that of the connection.
/// - the headers `CC` and `BCC`, because they would send each copy to more queues.
///
/// If there is no room for all headers in a frame of `frame_max` bytes, the longest of the message's own
/// headers are left out, and another header says so.
pub fn again<'a>(
    original: &BasicProperties,
    message_id: &str,
    headers: impl IntoIterator<Item = (&'a str, AMQPValue)>,
    frame_max: usize,
) -> BasicProperties {
    /// The room for what the broker adds to `x-death` when the message has waited in a retry queue.
    const X_DEATH: usize = 2048;

    let mut kept = BasicProperties::default();
    for (value, set) in [
        (original.content_type(), BasicProperties::with_content_type as fn(_, _) -> _),
        (original.content_encoding(), BasicProperties::with_content_encoding),
        (original.correlation_id(), BasicProperties::with_correlation_id),
        (original.reply_to(), BasicProperties::with_reply_to),
        (original.kind(), BasicProperties::with_type),
        (original.app_id(), BasicProperties::with_app_id),
        (original.cluster_id(), BasicProperties::with_cluster_id),
    ] {
        if let Some(value) = value {
            kept = set(kept, value.clone());
        }
    }
    if let Some(priority) = *original.priority() {
        kept = kept.with_priority(priority);
    }
    if let Some(timestamp) = *original.timestamp() {
        kept = kept.with_timestamp(timestamp);
    }
    let mut added: Vec<_> = headers.into_iter().collect();
    added.push((PUBLISHED_AT, now()));
    let kept = kept.with_delivery_mode(PERSISTENT).with_message_id(message_id.into());
    fit(kept.with_headers(own_headers(original, &added)), &added, frame_max.saturating_sub(X_DEATH))
}

/// Returns the headers of `original` that are kept in addition to those in `added`.
fn own_headers(original: &BasicProperties, added: &[(&str, AMQPValue)]) -> FieldTable {
    // The header in which a quorum queue counts the deliveries of a message. It is left out, because the copy
    // is a new message.
    const DELIVERY_COUNT: &str = "x-delivery-count";
    const LEFT_OUT: [&str; 6] =
        ["CC", "BCC", DELIVERY_COUNT, ATTEMPT, DEAD_LETTER_REASON, DEAD_LETTER_ATTEMPTS];

    let had = original.headers().iter().flat_map(FieldTable::inner);
    // Case is ignored, because a trace header that occurs twice, even in different case, counts as malformed.
    let is_replaced = |name: &str| added.iter().any(|(added, _)| added.eq_ignore_ascii_case(name));
    let kept = had.filter(|(name, _)| !LEFT_OUT.contains(&name.as_str()) && !is_replaced(name.as_str()));
    let kept: BTreeMap<ShortString, AMQPValue> =
        kept.map(|(name, value)| (name.clone(), value.clone())).collect();
    kept.into()
}

fn now() -> AMQPValue {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    AMQPValue::LongLongInt(i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_header(name: &str, value: AMQPValue) -> BasicProperties {
        let mut headers = FieldTable::default();
        headers.insert(name.into(), value);
        BasicProperties::default().with_headers(headers)
    }

    #[test]
    fn an_attempt_that_is_no_count_is_the_first() {
        assert_eq!(attempt(&BasicProperties::default()), 1);
        for (value, expected) in [
            (AMQPValue::LongInt(3), 3),
            (AMQPValue::LongInt(-3), 1),
            (AMQPValue::LongLongInt(i64::MAX), u32::MAX),
            (AMQPValue::LongLongInt(i64::MIN), 1),
            (AMQPValue::LongString("3".into()), 1),
            (AMQPValue::Void, 1),
        ] {
            assert_eq!(attempt(&with_header(ATTEMPT, value.clone())), expected, "{value:?}");
        }
    }

    #[test]
    fn the_time_of_publishing_is_in_the_header_or_else_in_the_property() {
        let property = BasicProperties::default().with_timestamp(7);
        assert_eq!(published_at(&property), Some(UNIX_EPOCH + Duration::from_secs(7)));
        let both = with_header(PUBLISHED_AT, AMQPValue::LongLongInt(7_500)).with_timestamp(7);
        assert_eq!(published_at(&both), Some(UNIX_EPOCH + Duration::from_millis(7_500)));
        assert_eq!(published_at(&BasicProperties::default()), None);
        assert_eq!(published_at(&with_header(PUBLISHED_AT, AMQPValue::LongLongInt(-1))), None);
        assert_eq!(published_at(&BasicProperties::default().with_timestamp(u64::MAX)), None);
        // The year 10000.
        assert_eq!(published_at(&BasicProperties::default().with_timestamp(253_402_300_800)), None);
        assert_eq!(published_at(&BasicProperties::default().with_timestamp(0)), None);
        assert_eq!(
            published_at(&with_header(PUBLISHED_AT, AMQPValue::LongLongInt(0)).with_timestamp(7)),
            None
        );
    }

    #[test]
    fn published_again_it_has_all_that_it_had_but_what_the_broker_acts_upon() {
        let original = with_header("x-mine", AMQPValue::LongInt(7))
            .with_content_type("a".into())
            .with_content_encoding("b".into())
            .with_correlation_id("c".into())
            .with_reply_to("d".into())
            .with_type("e".into())
            .with_app_id("f".into())
            .with_cluster_id("g".into())
            .with_priority(5)
            .with_timestamp(6);
        let mut headers = original.headers().clone().unwrap();
        headers.insert("CC".into(), AMQPValue::Void);
        headers.insert(ATTEMPT.into(), AMQPValue::LongInt(2));
        let acted_upon = original
            .clone()
            .with_headers(headers)
            .with_expiration("1000".into())
            .with_user_id("somebody".into());

        let copy = again(&acted_upon, "id", [], 4096);
        let headers = copy.headers().clone().unwrap();
        assert!(headers.contains_key(PUBLISHED_AT));
        assert_eq!(headers.inner().len(), 2, "{headers:?}");
        assert_eq!(headers.inner()["x-mine"], AMQPValue::LongInt(7));
        let expected = original.with_delivery_mode(2).with_message_id("id".into()).with_headers(headers);
        assert_eq!(copy, expected);
    }
}
