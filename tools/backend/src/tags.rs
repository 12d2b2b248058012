//! Converts OTLP's attributes to Jaeger's typed tags. Some fields of OTLP's spans also become tags.

use super::spans::{DecodedSpan, StoredSpan};
use base64::{Engine, prelude::BASE64_STANDARD};
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value},
    trace::v1::{span, span::SpanKind, status::StatusCode},
};
use serde::Serialize;
use std::borrow::Cow;

/// The largest integer that JavaScript holds exactly.
const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// A tag in the form of Jaeger's JSON.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Tag<'a> {
    pub key: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    value: Value<'a>,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(untagged)]
enum Value<'a> {
    Text(Cow<'a, str>),
    Bool(bool),
    Integer(i64),
    Float(f64),
}

/// Returns the tags of the span's attributes, then the tags of data that OTLP does not keep in attributes.
pub(super) fn of_span<'a>(DecodedSpan { stored, span }: &'a DecodedSpan<'_>) -> Vec<Tag<'a>> {
    let scope = &stored.scope;
    let status = span.status.as_ref();
    let code = status.map_or(StatusCode::Unset, |status| status.code());
    let mut tags = of_attributes(&span.attributes);
    tags.extend(kind(stored.kind).map(|kind| Tag::text("span.kind", kind)));
    match code {
        StatusCode::Unset => {}
        StatusCode::Ok => tags.push(Tag::text("otel.status_code", "OK")),
        StatusCode::Error => {
            tags.push(Tag::text("otel.status_code", "ERROR"));
            tags.push(Tag { key: "error", kind: "bool", value: Value::Bool(true) });
        }
    }
    for (key, text) in [
        ("otel.status_description", status.map_or("", |status| &status.message)),
        ("otel.scope.name", &scope.name),
        ("otel.scope.version", &scope.version),
        ("w3c.tracestate", &span.trace_state),
    ] {
        if !text.is_empty() {
            tags.push(Tag::text(key, text));
        }
    }
    tags
}

/// Returns the resource's attributes without the service's name.
pub(super) fn of_process(stored: &StoredSpan) -> Vec<Tag<'_>> {
    let mut tags = of_attributes(&stored.resource.resource.attributes);
    tags.retain(|tag| tag.key != "service.name");
    tags
}

/// Returns the fields of a Jaeger log: the event's name and its attributes.
pub(super) fn of_event(event: &span::Event) -> Vec<Tag<'_>> {
    let mut fields = Vec::with_capacity(1 + event.attributes.len());
    if !event.name.is_empty() {
        fields.push(Tag::text("event", &event.name));
    }
    fields.extend(event.attributes.iter().map(Tag::new));
    fields
}

/// Returns the span kind in lower case, or `None` if it is unspecified.
pub(super) fn kind(kind: SpanKind) -> Option<&'static str> {
    match kind {
        SpanKind::Unspecified => None,
        SpanKind::Internal => Some("internal"),
        SpanKind::Server => Some("server"),
        SpanKind::Client => Some("client"),
        SpanKind::Producer => Some("producer"),
        SpanKind::Consumer => Some("consumer"),
    }
}

pub(super) fn of_attributes(attributes: &[KeyValue]) -> Vec<Tag<'_>> {
    attributes.iter().map(Tag::new).collect()
}

impl<'a> Tag<'a> {
    pub fn new(attribute: &'a KeyValue) -> Self {
        let value = attribute.value.as_ref().and_then(|value| value.value.as_ref());
        let (kind, value) = match value {
            Some(any_value::Value::StringValue(text)) => ("string", Value::Text(text.into())),
            Some(any_value::Value::BoolValue(truth)) => ("bool", Value::Bool(*truth)),
            // JavaScript would round such a number, so it is sent as a string.
            Some(any_value::Value::IntValue(number)) if number.unsigned_abs() > MAX_SAFE_INTEGER => {
                ("int64", Value::Text(number.to_string().into()))
            }
            Some(any_value::Value::IntValue(number)) => ("int64", Value::Integer(*number)),
            Some(any_value::Value::DoubleValue(number)) if number.is_finite() => {
                ("float64", Value::Float(*number))
            }
            // JSON has no NaN and no infinities.
            Some(any_value::Value::DoubleValue(number)) => {
                ("float64", Value::Text(number.to_string().into()))
            }
            Some(any_value::Value::BytesValue(bytes)) => {
                ("binary", Value::Text(BASE64_STANDARD.encode(bytes).into()))
            }
            // Jaeger has no lists and no maps, so lists and maps are sent as JSON in a string.
            Some(any_value::Value::ArrayValue(_) | any_value::Value::KvlistValue(_)) => {
                ("string", Value::Text(json(attribute.value.as_ref()).to_string().into()))
            }
            Some(any_value::Value::StringValueStrindex(_)) | None => ("string", Value::Text("".into())),
        };
        Self { key: &attribute.key, kind, value }
    }

    fn text(key: &'a str, text: &'a str) -> Self {
        Self { key, kind: "string", value: Value::Text(text.into()) }
    }

    /// Returns whether the tag's value, written as text, equals `text`.
    pub fn is(&self, text: &str) -> bool {
        match &self.value {
            Value::Text(value) => value == text,
            Value::Bool(value) => text == if *value { "true" } else { "false" },
            Value::Integer(value) => text.parse() == Ok(*value),
            Value::Float(value) => text.parse() == Ok(*value),
        }
    }
}

fn json(value: Option<&AnyValue>) -> serde_json::Value {
    use serde_json::Value as Json;

    match value.and_then(|value| value.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => text.as_str().into(),
        Some(any_value::Value::BoolValue(truth)) => (*truth).into(),
        Some(any_value::Value::IntValue(number)) => (*number).into(),
        Some(any_value::Value::DoubleValue(number)) => (*number).into(),
        Some(any_value::Value::BytesValue(bytes)) => BASE64_STANDARD.encode(bytes).into(),
        Some(any_value::Value::ArrayValue(list)) => {
            list.values.iter().map(|value| json(Some(value))).collect()
        }
        Some(any_value::Value::KvlistValue(list)) => {
            list.values.iter().map(|entry| (entry.key.clone(), json(entry.value.as_ref()))).collect()
        }
        Some(any_value::Value::StringValueStrindex(_)) | None => Json::Null,
    }
}
