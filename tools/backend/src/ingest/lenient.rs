//! Reads OTLP's JSON in all forms that proto3's JSON mapping allows. The serde derivation of the generated
//! messages accepts only one form of each value, so all other forms are first converted to this form.
//!
//! A member's name and its JSON type decide how its value is converted, because members with the same name
//! and the same JSON type also need the same conversion. A malformed value is left unchanged, so that the
//! derivation refuses it.

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
    prelude::BASE64_STANDARD,
};
use serde::{
    Deserializer,
    de::{
        DeserializeOwned, IntoDeserializer, Visitor,
        value::{MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};
use serde_json::{Error, Value};

/// Members with floating-point numbers, which may be written as strings: `"1.5"`, `"NaN"`, `"-Infinity"`.
const DOUBLES: [&str; 8] =
    ["doubleValue", "asDouble", "sum", "min", "max", "explicitBounds", "zeroThreshold", "quantile"];

/// Members with integers, which may be written as strings, with an exponent, or with a fraction of zeros:
/// `"7"`, `7e0`, `7.0`.
const INTEGERS: [&str; 20] = [
    "intValue",
    "asInt",
    "timeUnixNano",
    "startTimeUnixNano",
    "endTimeUnixNano",
    "observedTimeUnixNano",
    "count",
    "zeroCount",
    "bucketCounts",
    "flags",
    "kind",
    "code",
    "severityNumber",
    "aggregationTemporality",
    "scale",
    "offset",
    "droppedAttributesCount",
    "droppedEventsCount",
    "droppedLinksCount",
    "keyStrindex",
];

/// Members that hold messages, each with the members that the derivation requires in such a message. JSON may
/// leave out these inner members if they are empty.
const REQUIRED: [(&str, &[&str]); 7] = [
    ("arrayValue", &["values"]),
    ("kvlistValue", &["values"]),
    ("attributes", &["key"]),
    ("filteredAttributes", &["key"]),
    ("metadata", &["key"]),
    // In a list, `values` holds values instead of key-value pairs. A `key` added to such a value is ignored.
    ("values", &["key"]),
    ("entityRefs", &["schemaUrl", "type", "idKeys", "descriptionKeys"]),
];

/// Reads a message. An error names the malformed member.
pub(super) fn from_slice<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let value: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let message = Member { name: "", value: &value };
    serde_path_to_error::deserialize(message).map_err(|error| error.to_string())
}

/// A value, and the name of the member that holds it. An element of a list has the name of the list.
#[derive(Clone, Copy)]
struct Member<'a> {
    name: &'a str,
    value: &'a Value,
}

impl<'de> Deserializer<'de> for Member<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let name = self.name;
        match self.value {
            Value::String(text) if DOUBLES.contains(&name) => match text.parse() {
                Ok(number) => visitor.visit_f64(number),
                Err(_) => visitor.visit_borrowed_str(text),
            },
            Value::String(text) if INTEGERS.contains(&name) => match text.parse() {
                Ok(Value::Number(number)) => integer(&number).deserialize_any(visitor),
                _ => visitor.visit_borrowed_str(text),
            },
            Value::String(text) if name == "bytesValue" => match base64(text) {
                Some(bytes) => visitor.visit_string(BASE64_STANDARD.encode(bytes)),
                None => visitor.visit_borrowed_str(text),
            },
            Value::Number(number) if INTEGERS.contains(&name) => integer(number).deserialize_any(visitor),
            Value::Array(values) => {
                visitor.visit_seq(SeqDeserializer::new(values.iter().map(|value| Member { name, value })))
            }
            Value::Object(members) => {
                let required = REQUIRED.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, all)| all);
                let missing = required.iter().filter(|name| members.get(**name).is_none_or(Value::is_null));
                let missing = missing.map(|name| (*name, empty(name)));
                // In JSON, a member that is `null` is the same as a missing member.
                let present = members.iter().filter(|(_, value)| !value.is_null());
                let present = present.map(|(name, value)| (name.as_str(), value));
                let members = present.chain(missing).map(|(name, value)| (name, Member { name, value }));
                visitor.visit_map(MapDeserializer::new(members))
            }
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'a> IntoDeserializer<'a, Error> for Member<'a> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Returns the value that stands for a missing member with this name.
fn empty(name: &str) -> &'static Value {
    static TEXT: Value = Value::String(String::new());
    static LIST: Value = Value::Array(Vec::new());

    if matches!(name, "values" | "idKeys" | "descriptionKeys") { &LIST } else { &TEXT }
}

/// Converts a number without a fraction, such as `7e0` or `7.0`, to an integer.
fn integer(number: &serde_json::Number) -> serde_json::Number {
    match number.as_f64() {
        Some(double) if number.is_f64() && double.fract() == 0.0 && double.abs() < i64::MAX as f64 => {
            (double as i64).into()
        }
        _ => number.clone(),
    }
}

/// Decodes base64, with the standard or the URL-safe alphabet, with or without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let lenient = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    GeneralPurpose::new(&STANDARD, lenient).decode(text.replace('-', "+").replace('_', "/")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::{
        common::v1::{AnyValue, ArrayValue, KeyValue, KeyValueList, any_value},
        logs::v1::LogRecord,
        metrics::v1::{ExponentialHistogramDataPoint, HistogramDataPoint, Metric, NumberDataPoint},
        resource::v1::Resource,
        trace::v1::Span,
    };
    use serde_json::json;
    use std::fmt::Debug;

    /// Asserts that both documents are valid and mean the same.
    fn assert_same<T: DeserializeOwned + PartialEq + Debug>(this: Value, that: Value) {
        let read = |value: &Value| from_slice::<T>(value.to_string().as_bytes());
        let meant = read(&that).expect("legal");
        assert_eq!(read(&this), Ok(meant), "{this}");
    }

    fn value_of(value: Value) -> Option<any_value::Value> {
        let text = json!({ "attributes": [{ "key": "k", "value": value }] }).to_string();
        let resource: Resource = from_slice(text.as_bytes()).expect(&text);
        resource.attributes[0].value.clone()?.value
    }

    #[test]
    fn a_double_may_be_a_string() {
        for (written, meant) in [
            (json!("1.2"), 1.2),
            (json!(1), 1.0),
            (json!("-1e3"), -1000.0),
            (json!("Infinity"), f64::INFINITY),
            (json!("-Infinity"), f64::NEG_INFINITY),
        ] {
            let read = value_of(json!({ "doubleValue": written }));
            assert_eq!(read, Some(any_value::Value::DoubleValue(meant)));
        }
        let Some(any_value::Value::DoubleValue(number)) = value_of(json!({ "doubleValue": "NaN" })) else {
            panic!("a double")
        };
        assert!(number.is_nan());
        assert_same::<NumberDataPoint>(json!({ "asDouble": "1.5" }), json!({ "asDouble": 1.5 }));
        assert_same::<HistogramDataPoint>(
            json!({ "sum": "1.5", "min": "-1", "max": "2e0", "explicitBounds": ["0.5", 1] }),
            json!({ "sum": 1.5, "min": -1.0, "max": 2.0, "explicitBounds": [0.5, 1.0] }),
        );
        let point: NumberDataPoint = from_slice(br#"{"asDouble":"NaN"}"#).expect("legal");
        assert!(format!("{point:?}").contains("NaN"));
        let metric = |sum: Value| json!({ "name": "m", "histogram": { "dataPoints": [{ "sum": sum }] } });
        assert_same::<Metric>(metric(json!("2.5")), metric(json!(2.5)));
    }

    #[test]
    fn an_integer_may_be_a_string_and_have_an_exponent() {
        for written in [json!(200), json!("200"), json!(200.0), json!("2e2"), json!("200.0")] {
            let read = value_of(json!({ "intValue": written }));
            assert_eq!(read, Some(any_value::Value::IntValue(200)), "{written}");
        }
        for (written, meant) in [(json!("9223372036854775807"), i64::MAX), (json!(i64::MIN), i64::MIN)] {
            assert_eq!(value_of(json!({ "intValue": written })), Some(any_value::Value::IntValue(meant)));
        }
        assert_same::<Span>(
            json!({ "kind": "2", "flags": "257", "droppedAttributesCount": "1", "droppedEventsCount": 2.0,
                "droppedLinksCount": "3", "startTimeUnixNano": 1.7698608e18, "endTimeUnixNano": "1",
                "status": { "code": "2" } }),
            json!({ "kind": 2, "flags": 257, "droppedAttributesCount": 1, "droppedEventsCount": 2,
                "droppedLinksCount": 3, "startTimeUnixNano": 1_769_860_800_000_000_000_u64,
                "endTimeUnixNano": 1, "status": { "code": 2 } }),
        );
        assert_same::<LogRecord>(json!({ "severityNumber": "9" }), json!({ "severityNumber": 9 }));
        assert_same::<ExponentialHistogramDataPoint>(
            json!({ "count": 3.0, "zeroCount": "1", "scale": "-2", "positive": { "offset": "1",
                "bucketCounts": [1, "2"] } }),
            json!({ "count": "3", "zeroCount": 1, "scale": -2, "positive": { "offset": 1,
                "bucketCounts": ["1", 2] } }),
        );
        let sum = |value: Value| json!({ "sum": { "dataPoints": [{ "asInt": value }] } });
        assert_same::<Metric>(sum(json!(-7.0)), sum(json!("-7")));
    }

    #[test]
    fn null_is_the_same_as_nothing() {
        for member in [
            "traceId",
            "spanId",
            "parentSpanId",
            "traceState",
            "flags",
            "name",
            "kind",
            "startTimeUnixNano",
            "endTimeUnixNano",
            "attributes",
            "droppedAttributesCount",
            "events",
            "links",
            "status",
        ] {
            assert_same::<Span>(json!({ member: null }), json!({}));
        }
        assert_same::<Span>(
            json!({ "attributes": [{ "key": null, "value": null }] }),
            json!({ "attributes": [{}] }),
        );
        assert_same::<LogRecord>(
            json!({ "body": null, "severityText": null, "timeUnixNano": null }),
            json!({}),
        );
        assert_same::<Metric>(json!({ "gauge": null, "sum": { "dataPoints": null } }), json!({ "sum": {} }));
        assert_eq!(
            value_of(json!({ "stringValue": null, "intValue": 1 })),
            Some(any_value::Value::IntValue(1))
        );
    }

    #[test]
    fn what_is_empty_may_be_left_out_and_what_is_unknown_is_ignored() {
        let list = any_value::Value::ArrayValue(ArrayValue::default());
        assert_eq!(value_of(json!({ "arrayValue": {} })), Some(list));
        let map = KeyValueList { values: vec![KeyValue::default()] };
        let read = value_of(json!({ "kvlistValue": { "values": [{}] } }));
        assert_eq!(read, Some(any_value::Value::KvlistValue(map)));
        let nested = ArrayValue { values: vec![AnyValue::default()] };
        let read = value_of(json!({ "arrayValue": { "values": [{ "later": [null] }] } }));
        assert_eq!(read, Some(any_value::Value::ArrayValue(nested)));
        assert_same::<Resource>(
            json!({ "entityRefs": [{ "type": "host" }], "later": { "kind": "x" } }),
            json!({ "entityRefs": [{ "schemaUrl": "", "type": "host", "idKeys": [], "descriptionKeys": [] }] }),
        );
    }

    #[test]
    fn bytes_are_base64_of_either_alphabet_with_padding_or_without() {
        for written in ["+/8=", "+/8", "-_8=", "-_8"] {
            let read = value_of(json!({ "bytesValue": written }));
            assert_eq!(read, Some(any_value::Value::BytesValue(vec![0xfb, 0xff])), "{written}");
        }
    }

    #[test]
    fn an_error_says_which_member_is_malformed() {
        for (member, value) in [
            ("traceId", json!("xy")),
            ("name", json!(7)),
            ("kind", json!("SPAN_KIND_SERVER")),
            ("flags", json!(1.5)),
            ("flags", json!(-1)),
            ("startTimeUnixNano", json!("soon")),
            ("endTimeUnixNano", json!(-1)),
            ("events", json!({})),
            ("links", json!([null])),
            ("attributes", json!([{ "key": "k", "value": { "doubleValue": "much" } }])),
            ("attributes", json!([{ "key": "k", "value": { "bytesValue": "?" } }])),
            ("attributes", json!([{ "key": "k", "value": { "stringValue": 1 } }])),
        ] {
            let text = json!({ "spans": [{}, { member: value }] }).to_string();
            let error = from_slice::<opentelemetry_proto::tonic::trace::v1::ScopeSpans>(text.as_bytes());
            let error = error.expect_err(&text);
            assert!(error.starts_with(&format!("spans[1].{member}")), "{error}");
        }
    }
}
