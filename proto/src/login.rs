//! The login message, which `api` publishes after a login, and `mq` consumes.
//!
//! The body of the message keeps the shape of the Go original, trace context included, so that Go services
//! built on that original can read our messages, and we can read theirs:
//!
//! ```json
//! {"Carrier":{"Traceparent":["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"]},"Msg":"13800138000"}
//! ```
//!
//! We write exactly this form, but [`LoginMessage::from_json`] also reads other forms.

use opentelemetry::propagation::{Extractor, Injector};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, fmt};

/// A mobile number: 7 to 15 digits. It is personal data, so spans, logs and errors never hold it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct MobileNumber(String);

/// The error for a text that is not a mobile number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a mobile number must be 7 to 15 digits")]
pub struct NotAMobileNumber;

impl TryFrom<String> for MobileNumber {
    type Error = NotAMobileNumber;

    fn try_from(text: String) -> Result<Self, NotAMobileNumber> {
        let is_one = (7..=15).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        if is_one { Ok(Self(text)) } else { Err(NotAMobileNumber) }
    }
}

impl MobileNumber {
    /// Returns the digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Hides the digits, so that a value that holds a mobile number can be logged.
impl fmt::Debug for MobileNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MobileNumber(…)")
    }
}

/// A login that happened, with the trace context of its producer span.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct LoginMessage {
    /// Where the trace context travels inside the body.
    pub carrier: HeaderCarrier,
    /// The mobile number of the user who logged in.
    pub msg: MobileNumber,
}

/// Why a body is not a login message. The text quotes nothing from the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct LoginMessageError {
    /// A short name of bounded cardinality, for `error.type` and the dead-letter header.
    pub reason: &'static str,
    /// A sentence for the span and the log.
    pub text: &'static str,
}

impl LoginMessage {
    /// Encodes the body to publish. `Carrier` is always an object, because a null crashes the Go side.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings can always be encoded as JSON")
    }

    /// Reads the carrier and the mobile number of a body, as tolerantly as is safe.
    ///
    /// Accepts member names that begin with an upper-case or lower-case letter, header names in any case, a
    /// bare string instead of an array, a missing or null carrier, and unknown members. A malformed carrier
    /// counts as an empty one, because it must never keep the message from being processed. The carrier is
    /// returned even if the message is unreadable, so that the failure appears in the right trace.
    pub fn from_json(body: &[u8]) -> (HeaderCarrier, Result<MobileNumber, LoginMessageError>) {
        let error = |reason, text| Err(LoginMessageError { reason, text });
        let Ok(Value::Object(members)) = serde_json::from_slice(body) else {
            return (HeaderCarrier::default(), error("not_a_json_object", "the body is not a JSON object"));
        };
        let member = |name: &str, lower: &str| members.get(name).or_else(|| members.get(lower));

        let carrier = HeaderCarrier::from_json(member("Carrier", "carrier"));
        let mobile = match member("Msg", "msg") {
            Some(Value::String(msg)) => MobileNumber::try_from(msg.clone()).or_else(|_| {
                error("not_a_mobile_number", "the member Msg is not a mobile number of 7 to 15 digits")
            }),
            Some(Value::Null) | None => error("no_msg", "the body has no member Msg"),
            Some(_) => error("msg_not_a_string", "the member Msg is not a string"),
        };
        (carrier, mobile)
    }
}

/// Go's `propagation.HeaderCarrier`, that is `http.Header`: canonical header names, each with a list of
/// values. The headers are written sorted by name, as in Go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HeaderCarrier(BTreeMap<String, Vec<String>>);

impl HeaderCarrier {
    fn from_json(carrier: Option<&Value>) -> Self {
        let Some(Value::Object(headers)) = carrier else {
            return Self::default();
        };
        let values = |value: &Value| match value {
            Value::String(one) => vec![one.clone()],
            Value::Array(many) => many.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        };
        Self(headers.iter().map(|(name, value)| (name.clone(), values(value))).collect())
    }
}

impl Injector for HeaderCarrier {
    fn set(&mut self, key: &str, value: String) {
        self.0.insert(canonical_header_name(key), vec![value]);
    }
}

impl Extractor for HeaderCarrier {
    fn get(&self, key: &str) -> Option<&str> {
        self.get_all(key)?.first().copied()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    /// Returns the values of all names that equal `key` if case is ignored, so that a propagator notices a
    /// duplicate.
    fn get_all(&self, key: &str) -> Option<Vec<&str>> {
        let same_name = self.0.iter().filter(|(name, _)| name.eq_ignore_ascii_case(key));
        let values: Vec<&str> = same_name.flat_map(|(_, values)| values).map(String::as_str).collect();
        (!values.is_empty()).then_some(values)
    }
}

/// Returns the form in which Go stores a header name: the first letter, and each letter after `-`, in upper
/// case.
///
/// Source: Go's `textproto.CanonicalMIMEHeaderKey`.
fn canonical_header_name(name: &str) -> String {
    let mut at_start = true;
    name.chars()
        .map(|c| {
            let canonical = if at_start { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
            at_start = c == '-';
            canonical
        })
        .collect()
}

#[cfg(test)]
mod tests;
