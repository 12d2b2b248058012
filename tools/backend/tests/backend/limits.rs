//! Late spans, spans that are sent twice, and the limits of the store, beyond which traces are evicted.

use crate::{Fixture, attribute, request, span, text, trace_id};
use anyhow::Result;
use backend::Limits;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceResponse, common::v1::any_value::Value, trace::v1::Span,
};
use prost::Message;

const MEGABYTE: usize = 1024 * 1024;

fn with_text(span: Span, bytes: usize) -> Span {
    Span { attributes: vec![text("padding", &"x".repeat(bytes))], ..span }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_spans_join_their_trace_and_spans_sent_again_are_stored_once() -> Result<()> {
    let fixture = Fixture::start().await?;
    // The child arrives before its root, and spans of other traces arrive in between.
    fixture.export("mq", [span(1, 2, 1, "child")]).await?;
    fixture.export("api", (10..200).map(|trace| span(trace, 1, 0, "other"))).await?;
    fixture.export("api", [span(1, 1, 0, "root")]).await?;
    // After a lost response, a client sends the export again, maybe with newer spans.
    fixture.export("mq", [span(1, 2, 1, "child"), span(1, 3, 1, "late")]).await?;

    let names: Vec<_> = fixture.backend.trace(&trace_id(1)).into_iter().map(|span| span.name).collect();
    assert_eq!(names, ["root", "child", "late"]);
    let statistics = fixture.backend.statistics();
    assert_eq!((statistics.spans, statistics.received, statistics.duplicates), (193, 194, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn when_there_are_too_many_spans_the_oldest_trace_goes() -> Result<()> {
    let fixture = Fixture::with_limits(Limits { spans: 100, bytes: 100 * MEGABYTE }).await?;
    for trace in 1..=50 {
        fixture.export("shop", [span(trace, 1, 0, "root"), span(trace, 2, 1, "child")]).await?;
    }
    assert_eq!(fixture.backend.statistics().evicted, 0);
    // A late span makes its trace larger, but not younger.
    fixture.export("shop", [span(1, 3, 1, "late")]).await?;
    assert_eq!(fixture.backend.trace(&trace_id(1)).len(), 0);
    assert_eq!(fixture.backend.trace(&trace_id(2)).len(), 2);

    fixture.export("shop", (51..=60).map(|trace| span(trace, 1, 0, "root"))).await?;
    let statistics = fixture.backend.statistics();
    assert_eq!((statistics.spans, statistics.traces, statistics.evicted), (100, 55, 11));
    assert_eq!(fixture.get(&format!("/api/traces/{}", trace_id(5))).await?.status, 404);
    assert_eq!(fixture.get(&format!("/api/traces/{}", trace_id(6))).await?.status, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn when_they_are_too_large_the_oldest_trace_goes() -> Result<()> {
    let limits = Limits { spans: 100_000, bytes: 10 * MEGABYTE };
    let fixture = Fixture::with_limits(limits).await?;
    for trace in 1..=30 {
        fixture.export("shop", [with_text(span(trace, 1, 0, "large"), MEGABYTE)]).await?;
        assert!(fixture.backend.statistics().bytes <= limits.bytes);
    }
    let statistics = fixture.backend.statistics();
    assert_eq!((statistics.spans, statistics.evicted), (9, 21));
    assert_eq!(fixture.backend.trace(&trace_id(22)).len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_a_span_brings_is_counted() -> Result<()> {
    let fixture = Fixture::start().await?;
    let padding = "x".repeat(MEGABYTE);
    let mut before = 0;
    let mut grown = |bytes: usize| {
        let grown = bytes - before;
        before = bytes;
        grown
    };
    let mut nested = Value::StringValue(padding.clone());
    for _ in 0..10 {
        let value = opentelemetry_proto::tonic::common::v1::AnyValue { value: Some(nested) };
        nested =
            Value::ArrayValue(opentelemetry_proto::tonic::common::v1::ArrayValue { values: vec![value] });
    }
    let event = opentelemetry_proto::tonic::trace::v1::span::Event {
        attributes: vec![text("padding", &padding)],
        ..Default::default()
    };
    let link = opentelemetry_proto::tonic::trace::v1::span::Link {
        attributes: vec![text("padding", &padding)],
        ..Default::default()
    };
    let plain = || span(1, 1, 0, "root");
    for (name, span) in [
        ("name", Span { name: padding.clone(), ..plain() }),
        ("tracestate", Span { trace_state: padding.clone(), ..plain() }),
        ("nested attribute", Span { attributes: vec![attribute("nested", nested)], ..plain() }),
        ("key", Span { attributes: vec![text(&padding, "value")], ..plain() }),
        ("event", Span { events: vec![event], ..plain() }),
        ("link", Span { links: vec![link], ..plain() }),
        (
            "status",
            Span {
                status: Some(opentelemetry_proto::tonic::trace::v1::Status {
                    message: padding.clone(),
                    code: 2,
                }),
                ..plain()
            },
        ),
    ]
    .into_iter()
    .enumerate()
    .map(|(i, (name, span))| (name, Span { span_id: (i as u64 + 1).to_be_bytes().into(), ..span }))
    {
        fixture.export("shop", [span]).await?;
        let grown = grown(fixture.backend.statistics().bytes);
        // The span's name is stored twice. One copy is in the encoded span, and the other is for searches.
        let expected = if name == "name" { 2 * MEGABYTE } else { MEGABYTE };
        assert!((expected..expected + 3000).contains(&grown), "{name}: {grown}");
    }
    // Data that the spans of a batch share is counted once.
    let padding = "x".repeat(20_000);
    fixture.export(&padding, (10..20).map(|id| span(1, id, 0, "child"))).await?;
    let grown = grown(fixture.backend.statistics().bytes);
    // The service's name is stored twice. One of the copies is an attribute of the resource.
    assert!((2 * 20_000..2 * 20_000 + 5000).contains(&grown), "{grown}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_every_answer_would_repeat_is_bounded() -> Result<()> {
    let fixture = Fixture::start().await?;
    let scope = |name: &str| {
        let mut request = request("shop", [span(1, 1, 0, "root")]);
        request.resource_spans[0].scope_spans[0].scope.as_mut().expect("a scope").name = name.to_owned();
        request
    };
    for (request, rejected) in [
        (request(&"x".repeat(40_000), [span(1, 1, 0, "root")]), 1),
        (request(&"x".repeat(20_000), [span(1, 2, 0, "root")]), 0),
        (scope(&"x".repeat(1025)), 1),
        (scope(&"x".repeat(1024)), 0),
    ] {
        let answer = fixture.post(&[crate::PROTOBUF], request.encode_to_vec()).await?;
        let partial = ExportTraceServiceResponse::decode(answer.body)?.partial_success;
        assert_eq!(partial.map_or(0, |partial| partial.rejected_spans), rejected);
    }
    assert_eq!(fixture.backend.trace(&trace_id(1)).len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_trace_takes_more_than_a_quarter_of_the_store() -> Result<()> {
    let fixture = Fixture::with_limits(Limits { spans: 100, bytes: 4 * MEGABYTE }).await?;
    fixture.export("shop", [span(1, 1, 0, "old")]).await?;
    let reason = "the first rejected item: its trace already takes a quarter of the store";
    for (trace, spans, rejected) in [
        (2, (1..=40).map(|id| span(2, id, 0, "one of many")).collect::<Vec<_>>(), 15),
        (3, (1..=4).map(|id| with_text(span(3, id, 0, "large"), 300_000)).collect(), 1),
        (4, vec![with_text(span(4, 1, 0, "too large"), 2 * MEGABYTE)], 1),
    ] {
        let kept = spans.len() as u64 - rejected;
        let answer = fixture.post(&[crate::PROTOBUF], request("shop", spans).encode_to_vec()).await?;
        let partial = ExportTraceServiceResponse::decode(answer.body)?.partial_success.unwrap();
        assert_eq!((partial.rejected_spans as u64, partial.error_message.as_str()), (rejected, reason));
        assert_eq!(fixture.backend.trace(&trace_id(trace)).len() as u64, kept);
    }
    assert_eq!(fixture.get("/api/traces/4").await?.status, 404);
    assert_eq!(fixture.backend.trace(&trace_id(1)).len(), 1, "evicted by a single trace");
    assert_eq!(fixture.backend.statistics().rejected, 17);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_when_it_has_as_many_spans_as_a_trace_may_have() -> Result<()> {
    let fixture = Fixture::with_limits(Limits { spans: 400, bytes: 100 * MEGABYTE }).await?;
    for trace in 1..=6 {
        fixture.export("shop", (1..=60).map(|id| span(trace, id, 0, "step"))).await?;
    }
    let answer = fixture.get("/api/traces?service=shop&limit=1000").await?;
    assert_eq!(answer.json()["data"].as_array().unwrap().len(), 2);
    Ok(())
}
