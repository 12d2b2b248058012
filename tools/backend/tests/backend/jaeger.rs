//! Whole response documents of Jaeger's query API.

use crate::{Fixture, MILLISECOND, NOON, assert_answer, attribute, envelope, refusal, span, text, trace_id};
use anyhow::Result;
use http::Method;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList, any_value::Value},
    resource::v1::Resource,
    trace::v1::{
        ResourceSpans, ScopeSpans, Span, Status,
        span::{Event, Link, SpanKind},
        status::StatusCode,
    },
};
use prost::Message;
use serde_json::json;

/// Returns a trace of two spans, in which every field of OTLP is used.
fn everything() -> ExportTraceServiceRequest {
    let any = |value| AnyValue { value: Some(value) };
    let list = ArrayValue { values: vec![any(Value::StringValue("a".into())), any(Value::IntValue(1))] };
    let map = KeyValueList { values: vec![text("key", "value"), attribute("on", Value::BoolValue(true))] };
    let root = Span {
        kind: SpanKind::Server.into(),
        trace_state: "vendor=1".into(),
        flags: 1,
        start_time_unix_nano: NOON,
        end_time_unix_nano: NOON + 2 * MILLISECOND + 999,
        attributes: vec![
            text("string", "text"),
            attribute("bool", Value::BoolValue(true)),
            attribute("int", Value::IntValue(-7)),
            attribute("large int", Value::IntValue(i64::MAX)),
            attribute("double", Value::DoubleValue(1.5)),
            attribute("infinity", Value::DoubleValue(f64::INFINITY)),
            attribute("bytes", Value::BytesValue(vec![0, 255])),
            attribute("list", Value::ArrayValue(list)),
            attribute("map", Value::KvlistValue(map)),
            KeyValue { key: "empty".into(), ..KeyValue::default() },
        ],
        events: vec![Event {
            time_unix_nano: NOON + 1_500,
            name: "exception".into(),
            attributes: vec![text("exception.type", "Overflow")],
            dropped_attributes_count: 0,
        }],
        status: Some(Status { code: StatusCode::Error.into(), message: "no stock".into() }),
        ..span(1, 1, 0, "buy")
    };
    let link = |trace: u128, span: u64| Link {
        trace_id: trace.to_be_bytes().into(),
        span_id: span.to_be_bytes().into(),
        ..Link::default()
    };
    let child = Span {
        kind: SpanKind::Consumer.into(),
        start_time_unix_nano: NOON + MILLISECOND,
        // The clock was set back during the span.
        end_time_unix_nano: NOON,
        links: vec![link(2, 9), Link { attributes: vec![text("to", "nowhere")], ..Link::default() }],
        status: Some(Status { code: StatusCode::Ok.into(), message: String::new() }),
        ..span(1, 2, 1, "pack")
    };
    let scope = |name: &str, version: &str| InstrumentationScope {
        name: name.into(),
        version: version.into(),
        ..InstrumentationScope::default()
    };
    let part = |resource: Resource, scope: InstrumentationScope, span| ResourceSpans {
        resource: Some(resource),
        scope_spans: vec![ScopeSpans { scope: Some(scope), spans: vec![span], ..ScopeSpans::default() }],
        ..ResourceSpans::default()
    };
    let shop = Resource {
        attributes: vec![text("service.name", "shop"), attribute("process.pid", Value::IntValue(7))],
        ..Resource::default()
    };
    ExportTraceServiceRequest {
        resource_spans: vec![
            part(Resource::default(), scope("", ""), child),
            part(shop, scope("library", "1.0"), root),
        ],
    }
}

async fn with_everything() -> Result<Fixture> {
    let fixture = Fixture::start().await?;
    assert_eq!(fixture.post(&[crate::PROTOBUF], everything().encode_to_vec()).await?.status, 200);
    Ok(fixture)
}

fn jaeger_trace() -> serde_json::Value {
    let id = trace_id(1);
    json!({
        "traceID": id,
        "spans": [
            {
                "traceID": id,
                "spanID": "0000000000000001",
                "operationName": "buy",
                "references": [],
                "startTime": 1_769_860_800_000_000_u64,
                "duration": 2000,
                "tags": [
                    { "key": "string", "type": "string", "value": "text" },
                    { "key": "bool", "type": "bool", "value": true },
                    { "key": "int", "type": "int64", "value": -7 },
                    { "key": "large int", "type": "int64", "value": "9223372036854775807" },
                    { "key": "double", "type": "float64", "value": 1.5 },
                    { "key": "infinity", "type": "float64", "value": "inf" },
                    { "key": "bytes", "type": "binary", "value": "AP8=" },
                    { "key": "list", "type": "string", "value": "[\"a\",1]" },
                    { "key": "map", "type": "string", "value": "{\"key\":\"value\",\"on\":true}" },
                    { "key": "empty", "type": "string", "value": "" },
                    { "key": "span.kind", "type": "string", "value": "server" },
                    { "key": "otel.status_code", "type": "string", "value": "ERROR" },
                    { "key": "error", "type": "bool", "value": true },
                    { "key": "otel.status_description", "type": "string", "value": "no stock" },
                    { "key": "otel.scope.name", "type": "string", "value": "library" },
                    { "key": "otel.scope.version", "type": "string", "value": "1.0" },
                    { "key": "w3c.tracestate", "type": "string", "value": "vendor=1" },
                ],
                "logs": [{
                    "timestamp": 1_769_860_800_000_001_u64,
                    "fields": [
                        { "key": "event", "type": "string", "value": "exception" },
                        { "key": "exception.type", "type": "string", "value": "Overflow" },
                    ],
                }],
                "processID": "p1",
                "warnings": null,
            },
            {
                "traceID": id,
                "spanID": "0000000000000002",
                "operationName": "pack",
                "references": [
                    { "refType": "CHILD_OF", "traceID": id, "spanID": "0000000000000001" },
                    { "refType": "FOLLOWS_FROM", "traceID": trace_id(2), "spanID": "0000000000000009" },
                ],
                "startTime": 1_769_860_800_001_000_u64,
                "duration": 0,
                "tags": [
                    { "key": "span.kind", "type": "string", "value": "consumer" },
                    { "key": "otel.status_code", "type": "string", "value": "OK" },
                ],
                "logs": [],
                "processID": "p2",
                "warnings": null,
            },
        ],
        "processes": {
            "p1": {
                "serviceName": "shop",
                "tags": [{ "key": "process.pid", "type": "int64", "value": 7 }],
            },
            "p2": { "serviceName": "OTLPResourceNoServiceName", "tags": [] },
        },
        "warnings": null,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_is_the_document_that_jaeger_answers_with() -> Result<()> {
    let fixture = with_everything().await?;
    let expected = envelope(json!([jaeger_trace()]));
    for path in [
        format!("/api/traces/{}", trace_id(1)),
        "/api/traces/1".to_owned(),
        "/api/traces/01?raw=true&prettyPrint=true".to_owned(),
        "/api/traces?traceID=1&traceID=01".to_owned(),
        "/api/traces?service=shop".to_owned(),
    ] {
        assert_answer(&fixture.get(&path).await?, 200, &expected);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_to_the_parent_is_the_only_reference_to_it() -> Result<()> {
    let fixture = Fixture::start().await?;
    let link = |trace: u128, span: u64| Link {
        trace_id: trace.to_be_bytes().into(),
        span_id: span.to_be_bytes().into(),
        ..Link::default()
    };
    let both = Span { links: vec![link(2, 1), link(1, 1)], ..span(1, 2, 1, "consume") };
    fixture.export("shop", [both]).await?;
    let trace = fixture.get(&format!("/api/traces/{}", trace_id(1))).await?.json();
    let reference = |id| json!({ "refType": "FOLLOWS_FROM", "traceID": id, "spanID": "0000000000000001" });
    let expected = json!([reference(trace_id(2)), reference(trace_id(1))]);
    assert_eq!(trace["data"][0]["spans"][0]["references"], expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn services_and_operations_are_listed() -> Result<()> {
    let fixture = Fixture::start().await?;
    assert_answer(&fixture.get("/api/services").await?, 200, &envelope(json!([])));

    let kind = |span: Span, kind: SpanKind| Span { kind: kind.into(), ..span };
    let shop = [
        kind(span(1, 1, 0, "buy"), SpanKind::Server),
        kind(span(2, 1, 0, "buy"), SpanKind::Server),
        kind(span(3, 1, 0, "buy"), SpanKind::Client),
        span(4, 1, 0, "local"),
    ];
    fixture.export("shop", shop).await?;
    fixture.export("a/b ü", [span(1, 2, 1, "other")]).await?;

    assert_answer(&fixture.get("/api/services").await?, 200, &envelope(json!(["a/b ü", "shop"])));
    for (service, names) in
        [("shop", json!(["buy", "local"])), ("a%2Fb%20%C3%BC", json!(["other"])), ("nobody", json!([]))]
    {
        let answer = fixture.get(&format!("/api/services/{service}/operations")).await?;
        assert_answer(&answer, 200, &envelope(names));
    }
    let buy_client = json!({ "name": "buy", "spanKind": "client" });
    let buy_server = json!({ "name": "buy", "spanKind": "server" });
    let local = json!({ "name": "local", "spanKind": "internal" });
    let all = json!([buy_client, buy_server, local]);
    for (query, operations) in [
        ("service=shop", all.clone()),
        ("service=shop&spanKind=", all),
        ("service=shop&spanKind=server", json!([buy_server])),
        ("service=shop&spanKind=internal", json!([local])),
        ("service=shop&spanKind=producer", json!([])),
        ("service=nobody", json!([])),
    ] {
        let answer = fixture.get(&format!("/api/operations?{query}")).await?;
        assert_answer(&answer, 200, &envelope(operations));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_between_services_are_dependencies() -> Result<()> {
    let fixture = Fixture::start().await?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let milliseconds = u64::try_from(now.as_millis())?;
    let at = |span: Span, time: u64| Span { start_time_unix_nano: time * MILLISECOND, ..span };
    let two_days_ago = milliseconds - 2 * 24 * 3600 * 1000;
    fixture
        .export("web", [at(span(1, 1, 0, "a"), milliseconds), at(span(2, 1, 0, "a"), two_days_ago)])
        .await?;
    let shop = [
        at(span(1, 2, 1, "b"), milliseconds),
        at(span(1, 3, 2, "inside"), milliseconds),
        at(span(1, 4, 1, "b"), milliseconds),
        at(span(1, 5, 99, "of a parent that is not there"), milliseconds),
        at(span(2, 2, 1, "b"), two_days_ago),
    ];
    fixture.export("shop", shop).await?;
    fixture.export("bank", [at(span(1, 6, 2, "c"), milliseconds)]).await?;

    let shop_bank = json!({ "parent": "shop", "child": "bank", "callCount": 1 });
    let web_shop = |calls: u64| json!({ "parent": "web", "child": "shop", "callCount": calls });
    for (query, expected) in [
        (String::new(), json!([shop_bank, web_shop(2)])),
        (format!("endTs={milliseconds}&lookback=86400000"), json!([shop_bank, web_shop(2)])),
        (format!("endTs={milliseconds}&lookback=604800000"), json!([shop_bank, web_shop(3)])),
        (format!("endTs={two_days_ago}&lookback=0"), json!([web_shop(1)])),
        (format!("endTs={}", two_days_ago - 1), json!([])),
    ] {
        let answer = fixture.get(&format!("/api/dependencies?{query}")).await?;
        assert_answer(&answer, 200, &envelope(expected));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_the_archive_are_refused_as_jaeger_does_without_their_storage() -> Result<()> {
    let fixture = Fixture::start().await?;
    let disabled = refusal(501, "metrics querying is currently disabled");
    for metric in ["latencies", "calls", "errors", "minstep"] {
        assert_answer(&fixture.get(&format!("/api/metrics/{metric}?service=a")).await?, 501, &disabled);
    }
    let url = format!("http://{}/api/archive/1", fixture.backend.addresses().query);
    let answer = fixture.client.send(Method::POST, &url, &[], "").await?;
    assert_answer(&answer, 501, &refusal(501, "archive span storage was not configured"));
    let url = url.replace("archive", "traces");
    assert_eq!(fixture.client.send(Method::POST, &url, &[], "").await?.status, 405);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_listed_once_however_often_it_exports() -> Result<()> {
    let fixture = Fixture::start().await?;
    for id in 1..=20 {
        fixture.export(if id % 2 == 0 { "even" } else { "odd" }, [span(1, id, id - 1, "step")]).await?;
    }
    let trace = fixture.get("/api/traces/1").await?.json()["data"][0].take();
    assert_eq!(trace["processes"].as_object().unwrap().len(), 2);
    assert_eq!(trace["spans"].as_array().unwrap().len(), 20);
    for (i, span) in trace["spans"].as_array().unwrap().iter().enumerate() {
        let name = &trace["processes"][span["processID"].as_str().unwrap()]["serviceName"];
        assert_eq!(name, if i % 2 == 1 { "even" } else { "odd" });
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_of_ten_thousand_spans_is_answered_whole() -> Result<()> {
    let fixture = Fixture::start().await?;
    fixture.export("shop", (1..=10_000).map(|id| span(1, id, id - 1, "step"))).await?;
    let answer = fixture.get("/api/traces/1").await?;
    assert_eq!(answer.json()["data"][0]["spans"].as_array().unwrap().len(), 10_000);
    Ok(())
}
