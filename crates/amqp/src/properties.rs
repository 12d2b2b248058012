//! Reads the properties of a message, which anybody may have written, and makes them fit into a frame.

use crate::content_header::{CONTENT_HEAD, FRAME_HEAD};
use amq_protocol::{
    frame::WriteContext,
    protocol::basic::gen_properties,
    types::{FieldTable, generation::gen_value},
};
use lapin::{BasicProperties, types::AMQPValue};
use std::collections::BTreeMap;

/// Delivery mode "persistent" (AMQP 0-9-1, class `basic`): the message survives a restart of the broker.
pub const PERSISTENT: u8 = 2;

/// The header that replaces properties that can't be read. Its value is a long string with the bytes of the
/// properties, or an empty string if they are very long. [`inbound`](crate::inbound) puts this header in
/// place of all the producer's headers.
pub const UNREADABLE: &str = "x-unreadable-properties";

/// The header (boolean) that says that a message's longest headers are missing, because they would not have
/// fitted into a frame.
pub const HEADERS_LEFT_OUT: &str = "x-headers-left-out";

/// The header (long-long-int) that says how many bytes the whole body had, if only the start of the body was
/// passed on ([`Server::with_longest_body`](crate::Server::with_longest_body)).
pub const BODY_CUT: &str = "x-body-cut-from";

/// Adds headers to `properties`. If the content header is then too long for a frame of `frame_max` bytes, the
/// longest of the other headers are left out, and [`HEADERS_LEFT_OUT`] says so. Without headers, properties
/// fit into any frame, because AMQP allows no `frame_max` below 4096.
pub fn fit(properties: BasicProperties, added: &[(&str, AMQPValue)], frame_max: usize) -> BasicProperties {
    let headers_of = |properties: &BasicProperties| {
        properties.headers().as_ref().map(FieldTable::inner).cloned().unwrap_or_default()
    };
    let properties = if added.is_empty() {
        properties
    } else {
        let mut headers = headers_of(&properties);
        headers.extend(added.iter().map(|(name, value)| ((*name).into(), value.clone())));
        properties.with_headers(headers.into())
    };
    let room = frame_max.saturating_sub(FRAME_HEAD + CONTENT_HEAD + 1);
    let mut excess = encoded(&properties).len().saturating_sub(room);
    if excess == 0 {
        return properties;
    }
    let is_added = |name: &str| added.iter().any(|(added, _)| *added == name);
    let (kept, mut others): (Vec<_>, Vec<_>) =
        headers_of(&properties).into_iter().partition(|(name, _)| is_added(name.as_str()));
    others.sort_by_cached_key(|(name, value)| size(name.as_str(), value));
    let mark = (HEADERS_LEFT_OUT.into(), AMQPValue::Boolean(true));
    excess += size(HEADERS_LEFT_OUT, &mark.1);
    while excess > 0
        && let Some((name, value)) = others.pop()
    {
        excess = excess.saturating_sub(size(name.as_str(), &value));
    }
    let headers: BTreeMap<_, _> = others.into_iter().chain(kept).chain([mark]).collect();
    properties.with_headers(headers.into())
}

/// Encodes properties as in a content header.
pub fn encoded(properties: &BasicProperties) -> Vec<u8> {
    let written = gen_properties(properties)(WriteContext::from(Vec::new()));
    written.map(|written| written.write).unwrap_or_default()
}

/// Returns how many bytes a header takes in a table.
fn size(name: &str, value: &AMQPValue) -> usize {
    let written = gen_value(value)(WriteContext::from(Vec::new()));
    1 + name.len() + written.map_or(0, |written| written.write.len())
}

/// Returns the header with this name.
pub fn header<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a AMQPValue> {
    properties.headers().as_ref()?.inner().get(name)
}

/// Returns a whole number of any of AMQP's integer types, because clients in different languages use
/// different types.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::btree_map, prelude::*};

    const FRAME: usize = 4096;

    fn with(headers: &[(&str, usize)]) -> BasicProperties {
        let mut table = FieldTable::default();
        for (name, length) in headers {
            table.insert((*name).into(), AMQPValue::LongString("x".repeat(*length).into()));
        }
        BasicProperties::default().with_message_id("id".into()).with_headers(table)
    }

    fn names(properties: &BasicProperties) -> Vec<String> {
        properties.headers().clone().unwrap_or_default().inner().keys().map(ToString::to_string).collect()
    }

    #[test]
    fn what_fits_is_left_as_it_is_and_one_byte_more_costs_the_longest_header() {
        let just = FRAME - encoded(&with(&[("baggage", 0), ("traceparent", 55)])).len() - 20;
        let fits = with(&[("baggage", just), ("traceparent", 55)]);
        assert_eq!(fit(fits.clone(), &[], FRAME), fits);
        let cut = fit(with(&[("baggage", just + 1), ("traceparent", 55)]), &[], FRAME);
        assert_eq!(names(&cut), ["traceparent", HEADERS_LEFT_OUT]);
        assert_eq!(cut.message_id().as_ref().unwrap().as_str(), "id");
    }

    #[test]
    fn what_is_added_stays_though_it_is_the_longest() {
        let reason = AMQPValue::LongString("x".repeat(3000).into());
        let cut = fit(with(&[("a", 500), ("b", 900)]), &[("reason", reason)], FRAME);
        assert_eq!(names(&cut), ["a", "reason", HEADERS_LEFT_OUT]);
    }

    proptest! {
        #[test]
        fn the_result_fits_into_a_frame(headers in btree_map("[a-z]{1,100}", 0..3000usize, 0..100)) {
            let headers: Vec<_> = headers.iter().map(|(name, length)| (name.as_str(), *length)).collect();
            let properties = fit(with(&headers), &[("x-attempt", AMQPValue::LongInt(2))], FRAME);
            prop_assert!(20 + encoded(&properties).len() <= FRAME);
            prop_assert!(header(&properties, "x-attempt").is_some());
        }
    }
}
