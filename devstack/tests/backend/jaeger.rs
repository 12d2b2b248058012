//! Jaeger's query API, both generations: documents as a whole, and every parameter of a search.

use crate::{Fixture, MILLISECOND, NOON, attribute, numbers, span, text, trace_id};
use anyhow::Result;
use devstack::client::Answer;
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
use std::collections::BTreeSet;

/// A trace of two spans with one of everything that OTLP has.
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
        // The clock was set back.
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
async fn in_the_third_api_a_trace_is_what_was_exported() -> Result<()> {
    let fixture = with_everything().await?;
    let span = |id: u64, name: &str, kind: u8, parent: &str, start: &str, end: &str| {
        json!({
            "traceId": trace_id(1), "spanId": format!("{id:016x}"), "parentSpanId": parent, "traceState": "",
            "flags": 0, "name": name, "kind": kind, "startTimeUnixNano": start, "endTimeUnixNano": end,
            "attributes": [], "droppedAttributesCount": 0, "events": [], "droppedEventsCount": 0,
            "links": [], "droppedLinksCount": 0, "status": null,
        })
    };
    let mut buy = span(1, "buy", 2, "", "1769860800000000000", "1769860800002000999");
    buy["traceState"] = "vendor=1".into();
    buy["flags"] = 1.into();
    buy["attributes"] = json!([
        { "key": "string", "value": { "stringValue": "text" } },
        { "key": "bool", "value": { "boolValue": true } },
        { "key": "int", "value": { "intValue": "-7" } },
        { "key": "large int", "value": { "intValue": "9223372036854775807" } },
        { "key": "double", "value": { "doubleValue": 1.5 } },
        { "key": "infinity", "value": { "doubleValue": null } },
        { "key": "bytes", "value": { "bytesValue": "AP8=" } },
        { "key": "list", "value": { "arrayValue": { "values": [{ "stringValue": "a" }, { "intValue": "1" }] } } },
        { "key": "map", "value": { "kvlistValue": { "values": [
            { "key": "key", "value": { "stringValue": "value" } },
            { "key": "on", "value": { "boolValue": true } },
        ] } } },
        { "key": "empty", "value": null },
    ]);
    buy["events"] = json!([{
        "timeUnixNano": "1769860800000001500", "name": "exception", "droppedAttributesCount": 0,
        "attributes": [{ "key": "exception.type", "value": { "stringValue": "Overflow" } }],
    }]);
    buy["status"] = json!({ "code": 2, "message": "no stock" });
    let mut pack = span(2, "pack", 5, "0000000000000001", "1769860800001000000", "1769860800000000000");
    pack["status"] = json!({ "code": 1, "message": "" });
    pack["links"] = json!([
        {
            "traceId": trace_id(2), "spanId": "0000000000000009", "traceState": "", "flags": 0,
            "attributes": [], "droppedAttributesCount": 0,
        },
        {
            "traceId": "", "spanId": "", "traceState": "", "flags": 0, "droppedAttributesCount": 0,
            "attributes": [{ "key": "to", "value": { "stringValue": "nowhere" } }],
        },
    ]);
    let part = |attributes, scope: (&str, &str), span| {
        json!({
            "resource": { "attributes": attributes, "droppedAttributesCount": 0, "entityRefs": [] },
            "scopeSpans": [{
                "scope": {
                    "name": scope.0, "version": scope.1, "attributes": [], "droppedAttributesCount": 0,
                },
                "spans": [span],
                "schemaUrl": "",
            }],
            "schemaUrl": "",
        })
    };
    let shop = json!([
        { "key": "service.name", "value": { "stringValue": "shop" } },
        { "key": "process.pid", "value": { "intValue": "7" } },
    ]);
    let parts = [part(shop, ("library", "1.0"), buy), part(json!([]), ("", ""), pack)];
    let expected = json!({ "result": { "resourceSpans": parts } });
    for path in ["/api/v3/traces/1".to_owned(), "/api/v3/traces?query.service_name=shop".to_owned()] {
        assert_answer(&fixture.get(&path).await?, 200, &expected);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn services_and_operations_are_listed_by_both() -> Result<()> {
    let fixture = Fixture::start().await?;
    assert_answer(&fixture.get("/api/services").await?, 200, &envelope(json!([])));
    assert_answer(&fixture.get("/api/v3/services").await?, 200, &json!({ "services": [] }));

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
    assert_answer(&fixture.get("/api/v3/services").await?, 200, &json!({ "services": ["a/b ü", "shop"] }));
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
        assert_answer(
            &fixture.get(&format!("/api/operations?{query}")).await?,
            200,
            &envelope(operations.clone()),
        );
        for query in [query.to_owned(), query.replace("spanKind", "span_kind")] {
            let answer = fixture.get(&format!("/api/v3/operations?{query}")).await?;
            assert_answer(&answer, 200, &json!({ "operations": operations }));
        }
    }
    Ok(())
}

/// Three traces of `shop`, a second apart, and one of `bank`; each is named by its number.
async fn searchable() -> Result<Fixture> {
    let fixture = Fixture::start().await?;
    let second = 1000 * MILLISECOND;
    let at = |trace: u64, duration: u64, name: &str| Span {
        start_time_unix_nano: NOON + trace * second,
        end_time_unix_nano: NOON + trace * second + duration,
        ..span(trace.into(), 1, 0, name)
    };
    fixture
        .export(
            "shop",
            [
                Span {
                    attributes: vec![
                        text("user", "ann"),
                        attribute("n", Value::IntValue(3)),
                        text("url", "a:b"),
                    ],
                    ..at(1, MILLISECOND, "buy")
                },
                Span {
                    attributes: vec![text("user", "bob"), attribute("n", Value::IntValue(3))],
                    status: Some(Status { code: StatusCode::Error.into(), message: String::new() }),
                    ..at(2, 20 * MILLISECOND, "buy")
                },
                Span {
                    kind: SpanKind::Server.into(),
                    attributes: vec![attribute("ratio", Value::DoubleValue(0.5))],
                    events: vec![Event { name: "cache miss".into(), ..Event::default() }],
                    ..at(3, 300 * MILLISECOND, "look")
                },
            ],
        )
        .await?;
    let bank =
        [Span { span_id: vec![2; 8], attributes: vec![text("user", "eve")], ..at(1, MILLISECOND, "pay") }];
    fixture.export("bank", bank).await?;
    Ok(fixture)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_finds_the_latest_traces_with_a_span_that_fulfils_everything() -> Result<()> {
    let fixture = searchable().await?;
    // Microseconds of the traces' starts.
    let (one, two, three) = (1_769_860_801_000_000_u64, 1_769_860_802_000_000_u64, 1_769_860_803_000_000_u64);
    for (query, expected) in [
        ("service=shop", &[3, 2, 1][..]),
        ("service=bank", &[1]),
        ("service=nobody", &[]),
        ("service=shop&limit=2", &[3, 2]),
        ("service=shop&limit=4000000000", &[3, 2, 1]),
        ("service=shop&operation=buy", &[2, 1]),
        ("service=shop&operation=buy&limit=1", &[2]),
        ("service=shop&operation=pay", &[]),
        ("service=shop&tags=%7B%22user%22%3A%22ann%22%7D", &[1]),
        // Of another span of the same trace.
        ("service=shop&tags=%7B%22user%22%3A%22eve%22%7D", &[]),
        ("service=shop&tags=%7B%22n%22%3A%223%22%7D", &[2, 1]),
        ("service=shop&tags=%7B%22n%22%3A%223%22%2C%22user%22%3A%22bob%22%7D", &[2]),
        ("service=shop&tags=%7B%7D", &[3, 2, 1]),
        ("service=shop&tags=", &[3, 2, 1]),
        ("service=shop&tag=user:ann", &[1]),
        ("service=shop&tag=n:3&tag=user:bob", &[2]),
        ("service=shop&tag=url:a:b", &[1]),
        ("service=shop&tag=ratio:0.50", &[3]),
        ("service=shop&tag=error:true", &[2]),
        ("service=shop&tag=error:false", &[]),
        ("service=shop&tag=otel.status_code:ERROR", &[2]),
        ("service=shop&tag=span.kind:server", &[3]),
        ("service=shop&tag=otel.scope.name:library", &[3, 2, 1]),
        ("service=shop&tag=event:cache+miss", &[3]),
        ("service=shop&minDuration=20ms", &[3, 2]),
        ("service=shop&minDuration=20.001ms", &[3]),
        ("service=shop&maxDuration=20ms", &[2, 1]),
        ("service=shop&minDuration=2ms&maxDuration=0.1s", &[2]),
        ("service=shop&minDuration=1h", &[]),
        (&format!("service=shop&start={two}"), &[3, 2]),
        (&format!("service=shop&end={two}"), &[2, 1]),
        (&format!("service=shop&start={two}&end={two}"), &[2]),
        (&format!("service=shop&start={three}&end={one}"), &[]),
        (&format!("service=shop&end={three}&lookback=1s"), &[3, 2]),
        (&format!("service=shop&end={three}&lookback=2d"), &[3, 2, 1]),
        (&format!("service=shop&end={three}&lookback=custom"), &[3, 2, 1]),
        (&format!("service=shop&start={one}&end={three}&lookback=1s"), &[3, 2, 1]),
        ("traceID=2&traceID=1", &[1, 2]),
        ("traceID=2&service=bank&operation=nothing", &[2]),
    ] {
        let answer = fixture.get(&format!("/api/traces?{query}")).await?;
        assert_eq!(numbers(&answer), expected, "{query}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_by_the_third_api_finds_the_same() -> Result<()> {
    let fixture = searchable().await?;
    let shop = "query.serviceName=shop";
    assert_eq!(
        traces_of(&fixture.get("/api/v3/traces?query.service_name=shop").await?),
        [1, 2, 3].into_iter().collect()
    );
    for (query, older, expected) in [
        ("query.searchDepth=1", "query.search_depth=1", &[3][..]),
        ("query.operationName=buy", "query.operation_name=buy", &[2, 1]),
        ("query.durationMin=20ms", "query.duration_min=20ms", &[3, 2]),
        ("query.durationMax=20ms", "query.duration_max=20ms", &[2, 1]),
    ] {
        for query in [query, older] {
            let answer = fixture.get(&format!("/api/v3/traces?{shop}&{query}")).await?;
            assert_eq!(traces_of(&answer), expected.iter().copied().collect(), "{query}");
        }
    }
    for (query, expected) in [
        ("query.startTimeMin=2026-01-31T12:00:02Z", &[3, 2][..]),
        ("query.start_time_min=2026-01-31T12:00:02.000000000Z", &[3, 2]),
        ("query.startTimeMin=2026-01-31T14:00:02%2B02:00", &[3, 2]),
        ("query.startTimeMax=2026-01-31T12:00:01.999999999Z", &[1]),
        ("query.start_time_min=2026-01-31T12:00:02Z&query.start_time_max=2026-01-31T12:00:02Z", &[2]),
        ("query.num_traces=2", &[3, 2]),
        // Unlike the first API, it does not ask for a service.
        ("query.attributes=%7B%22user%22%3A%22eve%22%7D", &[1]),
    ] {
        let answer = fixture.get(&format!("/api/v3/traces?{query}")).await?;
        assert_eq!(traces_of(&answer), expected.iter().copied().collect(), "{query}");
    }
    Ok(())
}

/// The numbers of the traces in an answer of the third API.
fn traces_of(answer: &Answer) -> BTreeSet<u128> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let result = answer.json()["result"].take();
    let request: ExportTraceServiceRequest = serde_json::from_value(result).expect("OTLP");
    let scopes = request.resource_spans.into_iter().flat_map(|part| part.scope_spans);
    let spans = scopes.flat_map(|scope| scope.spans);
    spans.map(|span| u128::from_be_bytes(span.trace_id.try_into().expect("16 bytes"))).collect()
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
async fn what_is_missing_is_404_and_what_is_malformed_is_400() -> Result<()> {
    let fixture = searchable().await?;
    assert_answer(&fixture.get("/api/traces/f00").await?, 404, &refusal(404, "trace not found"));
    let digits = "a trace id has 1 to 32 hexadecimal digits";
    for id in ["xyz", "-1", "%20", "%ff", &"1".repeat(33)] {
        let answer = fixture.get(&format!("/api/traces/{id}")).await?;
        assert_eq!(answer.status, 400, "{id}");
    }
    assert_answer(&fixture.get("/api/traces/xyz").await?, 400, &refusal(400, digits));
    assert_answer(&fixture.get("/api/nothing/there").await?, 404, &refusal(404, "there is no such API"));

    // Some of those asked for by id: those that there are, and an error for each that is not.
    let answer = fixture.get("/api/traces?traceID=1&traceID=f00").await?;
    assert_eq!(numbers(&answer), [1]);
    let errors = json!([{ "msg": "trace not found", "traceID": trace_id(0xf00) }]);
    assert_eq!(answer.json()["errors"], errors);

    for (query, why) in [
        ("", "parameter 'service' is required"),
        ("service=", "parameter 'service' is required"),
        ("traceID=g", "cannot parse traceID param: a trace id has 1 to 32 hexadecimal digits"),
        ("service=shop&limit=0", "unable to parse param 'limit': a number above zero is wanted"),
        ("service=shop&limit=-1", "unable to parse param 'limit': a number above zero is wanted"),
        ("service=shop&limit=x", "unable to parse param 'limit': a number above zero is wanted"),
        ("service=shop&start=yesterday", "unable to parse param 'start': 'yesterday' is not a number"),
        (
            "service=shop&start=99999999999999999999",
            "unable to parse param 'start': '99999999999999999999' is not a number",
        ),
        ("service=shop&end=-1", "unable to parse param 'end': '-1' is not a number"),
        (
            "service=shop&minDuration=5",
            "unable to parse param 'minDuration': '5' is not a duration such as 1.5s or 100ms",
        ),
        (
            "service=shop&maxDuration=-5s",
            "unable to parse param 'maxDuration': '-5s' is not a duration such as 1.5s or 100ms",
        ),
        ("service=shop&minDuration=2s&maxDuration=1s", "'maxDuration' should be greater than 'minDuration'"),
        ("service=shop&tag=user", "malformed 'tag' parameter, expecting key:value, received: user"),
        (
            "service=shop&tags=%7B",
            "malformed 'tags' parameter, cannot unmarshal JSON: EOF while parsing an object at line 1 column 1",
        ),
    ] {
        assert_answer(&fixture.get(&format!("/api/traces?{query}")).await?, 400, &refusal(400, why));
    }
    for path in [
        "/api/operations",
        "/api/dependencies?endTs=x",
        "/api/dependencies?lookback=1h",
        "/api/recent?traceID=x",
    ] {
        assert_eq!(fixture.get(path).await?.status, 400, "{path}");
    }

    let error = |code: u16, message: &str| json!({ "error": { "httpCode": code, "message": message } });
    for (path, code, message) in [
        ("traces/f00", 404, "No traces found"),
        ("traces?query.serviceName=nobody", 404, "No traces found"),
        ("nothing", 404, "there is no such API"),
        ("traces/x", 400, "malformed parameter trace_id: a trace id has 1 to 32 hexadecimal digits"),
        ("operations", 400, "parameter 'service' is required"),
        (
            "traces?query.startTimeMin=noon",
            400,
            "unable to parse param 'query.startTimeMin': 'noon' is not a time such as 2026-01-31T12:00:00.5Z",
        ),
    ] {
        assert_answer(&fixture.get(&format!("/api/v3/{path}")).await?, code, &error(code, message));
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
    let answer = fixture.get("/api/v3/traces/1").await?;
    let parts = &answer.json()["result"]["resourceSpans"];
    assert_eq!(parts.as_array().unwrap().len(), 1);
    assert_eq!(parts[0]["scopeSpans"][0]["spans"].as_array().unwrap().len(), 10_000);
    Ok(())
}
