//! The three services export to the backend, and a login's tree is read from Jaeger's API.

use anyhow::Result;
use backend::Backend;
use harness::{
    client::Client,
    poll,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
    trace::{self, Span},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::InstrumentationScope,
    resource::v1::Resource,
    trace::v1::{self as otlp, span::SpanKind},
};
use serde_json::Value;
use std::time::Duration;

/// Returns the tree of a trace from a response of Jaeger's first API.
fn tree_of_jaeger(answer: &Value) -> Option<String> {
    let trace = answer["data"].get(0)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let spans = trace["spans"].as_array()?.iter().map(|span| {
        let kind = span["tags"].as_array().and_then(|tags| tags.iter().find(|tag| tag["key"] == "span.kind"));
        let kind = kind.map(|tag| format!("SPAN_KIND_{}", text(&tag["value"]).to_uppercase()));
        let kind = kind.and_then(|kind| SpanKind::from_str_name(&kind)).unwrap_or_default();
        let plain = otlp::Span {
            name: text(&span["operationName"]),
            kind: kind.into(),
            start_time_unix_nano: span["startTime"].as_u64().unwrap_or_default() * 1000,
            ..otlp::Span::default()
        };
        let process = &trace["processes"][span["processID"].as_str().unwrap_or_default()];
        // A reference to a span of the same trace is the parent, whatever the type of the reference.
        let references = span["references"].as_array();
        let parent = references.and_then(|all| all.iter().find(|of| of["traceID"] == trace["traceID"]));
        Span {
            span_id: text(&span["spanID"]),
            parent_span_id: parent.map(|parent| text(&parent["spanID"])).unwrap_or_default(),
            service: text(&process["serviceName"]),
            ..Span::new(&plain, &Resource::default(), &InstrumentationScope::default())
        }
    });
    Some(trace::tree(&spans.collect::<Vec<_>>(), ""))
}

/// Returns the tree of a trace from a response of Jaeger's third API.
fn tree_of_otlp(mut answer: Value) -> Option<String> {
    let traces: ExportTraceServiceRequest = serde_json::from_value(answer["result"].take()).ok()?;
    let spans: Vec<Span> = traces.resource_spans.iter().flat_map(trace::spans).collect();
    Some(trace::tree(&spans, ""))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logins_tree_is_read_from_both_generations_of_jaegers_api() -> Result<()> {
    let backend = Backend::start().await?;
    let client = Client::new();
    let get = async |path: &str| client.get(&format!("http://{}{path}", backend.addresses().query)).await;
    let endpoint = format!("http://{}", backend.addresses().otlp_grpc);
    let stack = Stack::start(&[("*", "OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200);
    let id = answer.trace_id();

    let expected = trace::dedent(LOGIN_TREE);
    let spans =
        poll(Duration::from_secs(15), async || Some(backend.trace(&id)).filter(|spans| spans.len() == 6));
    assert_eq!(trace::tree(&spans.await.unwrap_or_else(|| backend.trace(&id)), ""), expected);
    let first = get(&format!("/api/traces/{id}")).await?.json();
    assert_eq!(tree_of_jaeger(&first).as_ref(), Some(&expected));
    let third = get(&format!("/api/v3/traces/{id}")).await?.json();
    assert_eq!(tree_of_otlp(third).as_ref(), Some(&expected));

    // With these queries, a page finds the trace and shows the rest of the system.
    let services = get("/api/services").await?.json();
    assert_eq!(services["data"], serde_json::json!(["api", "mq", "usercenter"]));
    let found = get("/api/traces?service=mq&operation=mq_consumer_msg&tag=span.kind:consumer").await?;
    assert_eq!(found.json()["data"][0]["traceID"], id);
    let calls = get("/api/dependencies").await?.json();
    let call =
        |parent: &str, child: &str| serde_json::json!({ "parent": parent, "child": child, "callCount": 1 });
    assert_eq!(calls["data"], serde_json::json!([call("api", "mq"), call("api", "usercenter")]));
    let recent = get("/api/recent").await?.json();
    assert_eq!(recent["data"][0]["rootOperation"], "POST /usercenter/v1/user/login");
    Ok(())
}
