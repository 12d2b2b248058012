//! A login message. In memory and in the spool, it holds its trace context and the mobile number only once.
//! The message is encoded when it is published, so a message from the spool has the same form as a message
//! that is sent directly.

use amqp::properties::PERSISTENT;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use opentelemetry::{Context, propagation::Injector};
use proto::{
    headers,
    login::{HeaderCarrier, LoginMessage, MobileNumber},
};
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use telemetry::amqp::HeadersMut;

/// A login message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    id: String,
    /// When api accepted the login, in seconds since 1970.
    #[serde(default)]
    taken_at: u64,
    /// The milliseconds to add to `taken_at`.
    #[serde(default)]
    taken_at_ms: u16,
    /// Whether the message was read from the spool.
    #[serde(skip)]
    was_spooled: bool,
    /// The trace context of the producer span.
    headers: Carrier,
    /// The mobile number of the user who logged in.
    #[serde(alias = "body", deserialize_with = "mobile")]
    mobile: MobileNumber,
}

/// Reads the mobile number. An entry that an earlier version of api wrote has the whole message body in place
/// of the number, and the number is in that body.
fn mobile<'de, D: Deserializer<'de>>(entry: D) -> Result<MobileNumber, D::Error> {
    let text = String::deserialize(entry)?;
    let (_, in_body) = LoginMessage::from_json(text.as_bytes());
    in_body.or_else(|_| MobileNumber::try_from(text)).map_err(D::Error::custom)
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Carrier(Vec<(String, String)>);

impl Injector for Carrier {
    fn set(&mut self, key: &str, value: String) {
        self.0.push((key.to_owned(), value));
    }
}

impl Message {
    /// Makes the message about a login with `mobile`, in the trace of `cx`.
    pub fn new(cx: &Context, id: String, mobile: MobileNumber) -> Self {
        let mut headers = Carrier::default();
        telemetry::inject(cx, &mut headers);
        let taken_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let taken_at_ms = taken_at.subsec_millis() as u16;
        Self { id, taken_at: taken_at.as_secs(), taken_at_ms, was_spooled: false, headers, mobile }
    }

    /// Returns the message id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns when api accepted the login.
    pub fn taken_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.taken_at) + Duration::from_millis(self.taken_at_ms.into())
    }

    /// Returns the body of the message. The trace context travels twice: in the headers for every consumer,
    /// and in the body for the Go original.
    pub fn body(&self) -> Vec<u8> {
        let mut carrier = HeaderCarrier::default();
        for (name, value) in &self.headers.0 {
            carrier.set(name, value.clone());
        }
        LoginMessage { carrier, msg: self.mobile.clone() }.to_json()
    }

    /// Returns the properties of the message, with `now` as the time of publishing.
    pub fn properties(&self, now: SystemTime) -> BasicProperties {
        let since_1970 = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let milliseconds = i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX);
        let mut headers = FieldTable::default();
        for (name, value) in &self.headers.0 {
            HeadersMut(&mut headers).set(name, value.clone());
        }
        headers.insert(headers::PUBLISHED_AT.into(), AMQPValue::LongLongInt(milliseconds));
        if self.was_spooled && self.taken_at > 0 {
            let time = now.duration_since(self.taken_at()).unwrap_or_default().as_millis();
            let time = i64::try_from(time).unwrap_or(i64::MAX);
            headers.insert(headers::TIME_IN_SPOOL.into(), AMQPValue::LongLongInt(time));
        }
        BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_message_id(self.id.as_str().into())
            .with_timestamp(since_1970.as_secs())
            .with_headers(headers)
    }

    /// Encodes the message for the spool.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers can always be encoded as JSON")
    }

    /// Decodes a message from the spool. Returns `None` if the bytes are not a message.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let message: Self = serde_json::from_slice(bytes).ok()?;
        Some(Self { was_spooled: true, ..message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    #[test]
    fn a_hand_over_says_when_it_is() {
        let mobile = MobileNumber::try_from("13800138000".to_owned()).unwrap();
        let message = Message::new(&Context::new(), "id".to_owned(), mobile);
        let properties = message.properties(UNIX_EPOCH + Duration::from_millis(1_700_000_000_123));
        assert_eq!(*properties.timestamp(), Some(1_700_000_000));
        let headers = properties.headers().clone().unwrap();
        assert_eq!(
            headers.inner()[headers::PUBLISHED_AT],
            AMQPValue::LongLongInt(1_700_000_000_123),
            "{headers:?}"
        );
    }

    #[test]
    fn an_entry_of_an_earlier_version_is_read() {
        let body = r#"{"Carrier":{"Traceparent":["00-1"],"Tracestate":["a=\"b"]},"Msg":"13800138000"}"#;
        let headers = [["traceparent", "00-1"], ["tracestate", "a=\"b"]];
        let entry = serde_json::json!({ "id": "i", "taken_at": 7, "headers": headers, "body": body });
        let message = Message::from_bytes(entry.to_string().as_bytes()).unwrap();
        assert_eq!(message.taken_at(), UNIX_EPOCH + Duration::from_secs(7));
        assert_eq!(message.body(), body.as_bytes());
        let headers = message.properties(UNIX_EPOCH).headers().clone().unwrap();
        assert_eq!(headers.inner()["tracestate"], AMQPValue::LongString("a=\"b".into()));
        assert!(Message::from_bytes(&message.to_bytes()) == Some(message));
    }

    #[test]
    fn a_message_from_the_spool_says_how_long_it_was_there() {
        let mobile = MobileNumber::try_from("13800138000".to_owned()).unwrap();
        let mut message = Message::new(&Context::new(), "id".to_owned(), mobile);
        (message.taken_at, message.taken_at_ms) = (7, 8);
        let time = |message: &Message| {
            let headers = message.properties(UNIX_EPOCH + Duration::from_millis(8_242)).headers().clone();
            headers.unwrap().inner().get(headers::TIME_IN_SPOOL).cloned()
        };
        assert_eq!(time(&message), None);
        let mut spooled = Message::from_bytes(&message.to_bytes()).unwrap();
        assert_eq!(time(&spooled), Some(AMQPValue::LongLongInt(1234)));
        // An entry of an early version does not say when api accepted the login.
        (spooled.taken_at, spooled.taken_at_ms) = (0, 0);
        assert_eq!(time(&spooled), None);
    }

    proptest! {
        #[test]
        fn what_the_spool_gives_back_is_what_it_got(
            id in ".*", mobile in "[0-9]{7,15}", headers in proptest::collection::vec((".*", ".*"), 0..4)
        ) {
            let mobile = MobileNumber::try_from(mobile).unwrap();
            let headers = Carrier(headers);
            let message = Message { id, taken_at: 7, taken_at_ms: 8, was_spooled: true, headers, mobile };
            prop_assert!(Message::from_bytes(&message.to_bytes()) == Some(message));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::from_bytes(&bytes);
        }
    }
}
