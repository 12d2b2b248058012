//! Every parameter of a search in Jaeger's query API, and the searches that are refused.

use crate::{Fixture, MILLISECOND, NOON, assert_answer, attribute, numbers, refusal, span, text, trace_id};
use anyhow::Result;
use opentelemetry_proto::tonic::{
    common::v1::any_value::Value,
    trace::v1::{
        Span, Status,
        span::{Event, SpanKind},
        status::StatusCode,
    },
};
use serde_json::json;

/// Starts a backend with the traces 1, 2 and 3, which begin one second apart. Each trace has a span of
/// `shop`, and trace 1 also has a span of `bank`.
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
    // The starts of the traces, in microseconds since 1970.
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
        // This tag belongs to another span of the same trace.
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

    // The response has the traces that exist, and an error for each id without a trace.
    let answer = fixture.get("/api/traces?traceID=1&traceID=f00").await?;
    assert_eq!(numbers(&answer), [1]);
    let errors = json!([{ "msg": "trace not found", "traceID": trace_id(0xf00) }]);
    assert_eq!(answer.json()["errors"], errors);

    for (query, why) in [
        ("", "parameter 'service' is required"),
        ("service=", "parameter 'service' is required"),
        ("traceID=g", "cannot parse traceID param: a trace id has 1 to 32 hexadecimal digits"),
        ("service=shop&limit=0", "unable to parse param 'limit': a number above zero is required"),
        ("service=shop&limit=-1", "unable to parse param 'limit': a number above zero is required"),
        ("service=shop&limit=x", "unable to parse param 'limit': a number above zero is required"),
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
    Ok(())
}
