//! Tests the embedded trace backend from outside. The tests send OTLP, and read responses in Jaeger's format.

mod hostile;
mod ingest;
mod jaeger;
mod limits;
mod recent;
mod search;
mod signals;

use anyhow::Result;
use backend::{Addresses, Backend, Limits};
use http::Method;
use loopback::client::{Answer, Client};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span},
};
use prost::Message;
use serde_json::json;

/// 2026-01-31T12:00:00Z, in nanoseconds since 1970.
const NOON: u64 = 1_769_860_800_000_000_000;
const MILLISECOND: u64 = 1_000_000;
const PROTOBUF: (&str, &str) = ("content-type", "application/x-protobuf");
const JSON: (&str, &str) = ("content-type", "application/json");
const GZIP: (&str, &str) = ("content-encoding", "gzip");
const ZSTD: (&str, &str) = ("content-encoding", "zstd");

/// A backend and a client for it.
struct Fixture {
    backend: Backend,
    client: Client,
}

impl Fixture {
    async fn start() -> Result<Self> {
        Self::with_limits(Limits::default()).await
    }

    async fn with_limits(limits: Limits) -> Result<Self> {
        let backend = Backend::start_with(Addresses::FREE, limits).await?;
        Ok(Self { backend, client: Client::new() })
    }

    /// Sends a `GET` to the query address.
    async fn get(&self, path: &str) -> Result<Answer> {
        self.client.get(&format!("http://{}{path}", self.backend.addresses().query)).await
    }

    /// Posts a request to `/v1/traces`.
    async fn post(&self, headers: &[(&str, &str)], body: impl Into<bytes::Bytes>) -> Result<Answer> {
        let url = format!("http://{}/v1/traces", self.backend.addresses().otlp_http);
        self.client.send(Method::POST, &url, headers, body).await
    }

    /// Exports these spans of a service. The spans are stored when this function returns.
    async fn export(&self, service: &str, spans: impl IntoIterator<Item = Span>) -> Result<()> {
        let answer = self.post(&[PROTOBUF], request(service, spans).encode_to_vec()).await?;
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, &b""[..]));
        Ok(())
    }
}

/// Writes a number as a trace id, in the form that Jaeger uses.
fn trace_id(number: u128) -> String {
    format!("{number:032x}")
}

fn envelope(data: serde_json::Value) -> serde_json::Value {
    let total = data.as_array().map_or(0, Vec::len);
    json!({ "data": data, "total": total, "limit": 0, "offset": 0, "errors": null })
}

fn refusal(code: u16, msg: &str) -> serde_json::Value {
    let errors = json!([{ "code": code, "msg": msg }]);
    json!({ "data": null, "total": 0, "limit": 0, "offset": 0, "errors": errors })
}

fn assert_answer(answer: &Answer, status: u16, body: &serde_json::Value) {
    assert_eq!((answer.status.as_u16(), answer.header("content-type")), (status, "application/json"));
    assert_eq!(&answer.json(), body);
}

/// Returns the trace ids in a response as numbers, in the order of the response.
fn numbers(answer: &Answer) -> Vec<u128> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let json = answer.json();
    let traces = json["data"].as_array().expect("a list");
    let ids = traces.iter().map(|trace| trace["traceID"].as_str().expect("a text"));
    ids.map(|id| u128::from_str_radix(id, 16).expect("digits")).collect()
}

/// Returns a span that starts at noon and lasts a millisecond. Parent 0 means that the span is a root.
fn span(trace: u128, id: u64, parent: u64, name: &str) -> Span {
    Span {
        trace_id: trace.to_be_bytes().into(),
        span_id: id.to_be_bytes().into(),
        parent_span_id: if parent == 0 { Vec::new() } else { parent.to_be_bytes().into() },
        name: name.to_owned(),
        start_time_unix_nano: NOON,
        end_time_unix_nano: NOON + MILLISECOND,
        ..Span::default()
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.to_owned()))
}

fn request(service: &str, spans: impl IntoIterator<Item = Span>) -> ExportTraceServiceRequest {
    let scope_spans = ScopeSpans {
        scope: Some(InstrumentationScope { name: "library".to_owned(), ..InstrumentationScope::default() }),
        spans: spans.into_iter().collect(),
        ..ScopeSpans::default()
    };
    let resource = Resource { attributes: vec![text("service.name", service)], ..Resource::default() };
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource),
            scope_spans: vec![scope_spans],
            ..ResourceSpans::default()
        }],
    }
}
