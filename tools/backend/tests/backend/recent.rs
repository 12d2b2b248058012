//! The list of the latest traces, and the events for changed traces.

use crate::{Fixture, MILLISECOND, NOON, attribute, numbers, span, text, trace_id};
use anyhow::{Context, Result, ensure};
use loopback::PATIENCE;
use opentelemetry_proto::tonic::{
    common::v1::any_value::Value,
    trace::v1::{Span, Status, span::Link, status::StatusCode},
};
use serde_json::{Value as Json, json};
use std::time::Duration;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::TcpStream,
    sync::broadcast::error::RecvError,
    time::{Instant, timeout},
};

/// A client of `/api/events`.
struct Events(Lines<BufReader<TcpStream>>);

impl Events {
    /// Connects, and returns once the backend has subscribed the client.
    async fn of(fixture: &Fixture) -> Result<Self> {
        let mut connection = TcpStream::connect(fixture.backend.addresses().query).await?;
        connection.write_all(b"GET /api/events HTTP/1.1\r\nhost: backend\r\n\r\n").await?;
        let mut lines = BufReader::new(connection).lines();
        let mut head = Vec::new();
        while let Some(line) = lines.next_line().await?.filter(|line| !line.is_empty()) {
            head.push(line.to_lowercase());
        }
        ensure!(head.first().is_some_and(|line| line.contains("200")), "{head:?}");
        ensure!(head.contains(&"content-type: text/event-stream".to_owned()), "{head:?}");
        Ok(Self(lines))
    }

    async fn next(&mut self) -> Result<Json> {
        let next = async {
            loop {
                let line = self.0.next_line().await?.context("the stream ended")?;
                if let Some(data) = line.strip_prefix("data: ") {
                    return Ok(serde_json::from_str(data)?);
                }
            }
        };
        timeout(PATIENCE, next).await?
    }
}

fn failed() -> Option<Status> {
    Some(Status { code: StatusCode::Error.into(), message: String::new() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_is_summarized_also_while_its_root_is_missing() -> Result<()> {
    let fixture = Fixture::start().await?;
    assert_eq!(fixture.get("/api/recent").await?.json()["data"], json!([]));
    let child = Span {
        start_time_unix_nano: NOON + 2 * MILLISECOND,
        end_time_unix_nano: NOON + 5 * MILLISECOND,
        status: failed(),
        ..span(1, 2, 1, "child")
    };
    fixture.export("mq", [child, Span { status: failed(), ..span(1, 3, 2, "grandchild") }]).await?;
    let mut expected = json!({
        "traceID": trace_id(1), "rootService": "mq", "rootOperation": "child", "status": "error",
        "startTime": 1_769_860_800_000_000_u64, "duration": 5000, "spans": 2, "errors": 2,
        "services": [{ "name": "mq", "spans": 2 }],
    });
    let recent = fixture.get("/api/recent").await?;
    let envelope = json!({ "data": [expected], "total": 1, "limit": 0, "offset": 0, "errors": null });
    assert_eq!(recent.json(), envelope);

    let attributes = vec![attribute("http.response.status_code", Value::IntValue(404))];
    fixture.export("api", [Span { attributes, ..span(1, 1, 0, "root") }]).await?;
    expected["rootService"] = "api".into();
    expected["rootOperation"] = "root".into();
    expected["status"] = "404".into();
    expected["spans"] = 3.into();
    expected["services"] = json!([{ "name": "api", "spans": 1 }, { "name": "mq", "spans": 2 }]);
    assert_eq!(fixture.get("/api/recent").await?.json()["data"], json!([expected]));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_traces_of_all_services_come_first_and_can_be_selected() -> Result<()> {
    let fixture = Fixture::start().await?;
    let at = |trace: u64, milliseconds: u64, name: &str| Span {
        start_time_unix_nano: NOON + trace * MILLISECOND,
        end_time_unix_nano: NOON + (trace + milliseconds) * MILLISECOND,
        attributes: vec![
            text("user", "ann"),
            attribute("n", Value::IntValue((trace % 2).try_into().unwrap())),
        ],
        ..span(trace.into(), 1, 0, name)
    };
    fixture.export("shop", [at(3, 30, "buy"), at(1, 10, "buy")]).await?;
    fixture.export("bank", [at(2, 20, "pay"), at(4, 40, "look")]).await?;
    // This span of trace 2 lasts less than a millisecond, so it does not make the trace longer.
    let short = Span {
        span_id: 2_u64.to_be_bytes().into(),
        end_time_unix_nano: NOON + 2 * MILLISECOND + 1,
        status: failed(),
        ..at(2, 0, "x")
    };
    fixture.export("bank", [short]).await?;
    for (query, expected) in [
        ("", &[4, 3, 2, 1][..]),
        ("limit=2", &[4, 3]),
        ("limit=2&offset=1", &[3, 2]),
        ("offset=4", &[]),
        ("sort=newest", &[4, 3, 2, 1]),
        ("sort=longest&service=shop", &[3, 1]),
        ("sort=longest&maxDuration=30ms&offset=1", &[2, 1]),
        ("sort=errors", &[2, 4, 3, 1]),
        ("service=shop", &[3, 1]),
        ("service=nobody", &[]),
        ("operation=buy", &[3, 1]),
        ("service=bank&operation=pay", &[2]),
        ("tags=%7B%22n%22%3A%221%22%7D", &[3, 1]),
        ("tag=user:ann&tag=n:0", &[4, 2]),
        ("minDuration=30ms", &[4, 3]),
        // The duration of the whole trace counts, and not the duration of one span.
        ("maxDuration=10ms", &[1]),
        ("minDuration=20ms&maxDuration=30ms", &[3, 2]),
        ("start=1769860800003000", &[4, 3]),
        ("traceID=2", &[2]),
        ("traceID=f00", &[]),
        ("traceID=2&service=shop", &[]),
    ] {
        assert_eq!(numbers(&fixture.get(&format!("/api/recent?{query}")).await?), expected, "{query}");
    }
    assert_eq!(fixture.get("/api/recent?limit=1&offset=1").await?.json()["total"], 4);
    for query in [
        "limit=0",
        "offset=-1",
        "sort=name",
        "minDuration=1",
        "traceID=x",
        "tags=[]",
        "minDuration=2s&maxDuration=1s",
    ] {
        assert_eq!(fixture.get(&format!("/api/recent?{query}")).await?.status, 400, "{query}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_is_told_of_a_changed_trace_once_for_many_changes() -> Result<()> {
    let fixture = Fixture::start().await?;
    let start = Instant::now();
    let mut clients = [Events::of(&fixture).await?, Events::of(&fixture).await?];
    for id in 1..=20 {
        fixture.export("shop", [span(1, id, id - 1, "step")]).await?;
    }
    for client in &mut clients {
        // A client gets at most one event about a trace every 250 ms, however often the trace changes.
        let mut told = 1;
        while client.next().await?["spans"] != 20 {
            told += 1;
        }
        assert!(told <= start.elapsed().as_millis() / 250 + 1, "{told} events");
    }
    fixture.export("shop", [span(2, 1, 0, "another")]).await?;
    for client in &mut clients {
        let mut summary = client.next().await?;
        while summary["traceID"] == json!(trace_id(1)) {
            // The last event already showed the last change of trace 1, but one more event about this trace
            // may follow.
            summary = client.next().await?;
        }
        assert_eq!(
            (&summary["traceID"], &summary["rootOperation"]),
            (&json!(trace_id(2)), &json!("another"))
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_more_changes_than_a_client_is_told_some_are_lost_and_not_kept() -> Result<()> {
    let fixture = Fixture::start().await?;
    let start = Instant::now();
    let mut slow = Events::of(&fixture).await?;
    let mut changes = fixture.backend.changes();
    // Makes more changes than the backend keeps for a client.
    let mut traces = 0;
    for _ in 0..4 {
        fixture.export("shop", (0..5000).map(|i| span(traces + i + 1, 1, 0, "root"))).await?;
        traces += 5000;
    }
    // The client starts to read only now. The backend must soon send it the latest changes, without all the
    // earlier changes.
    let (mut told, last) = (0, trace_id(traces + 1));
    let told_of_last = async {
        for id in 1.. {
            fixture.export("shop", [span(traces + 1, id, 0, "last")]).await?;
            while let Ok(event) = timeout(Duration::from_millis(500), slow.next()).await {
                told += 1;
                if event?["traceID"] == last {
                    return anyhow::Ok(());
                }
            }
        }
        Ok(())
    };
    timeout(PATIENCE, told_of_last).await??;
    // A client gets at most 100 events every 250 ms.
    let pauses = start.elapsed().as_millis() / 250 + 1;
    assert!((1..=100 * pauses).contains(&told), "{told} in {pauses} pauses");
    assert!(matches!(changes.recv().await, Err(RecvError::Lagged(_))));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_knows_the_links_from_others_and_an_event_tells_of_a_new_one() -> Result<()> {
    let fixture = Fixture::start().await?;
    let link = |trace: u128, span: u64| Link {
        trace_id: trace.to_be_bytes().into(),
        span_id: span.to_be_bytes().into(),
        ..Link::default()
    };
    fixture.export("shop", [span(1, 1, 0, "root")]).await?;
    let mut events = Events::of(&fixture).await?;
    let links = vec![link(1, 1), link(3, 1), link(2, 5), Link::default()];
    fixture.export("bank", [Span { links, ..span(2, 5, 0, "collect") }]).await?;
    let told = [events.next().await?, events.next().await?].map(|event| event["traceID"].to_string());
    assert!(told.contains(&json!(trace_id(1)).to_string()), "{told:?}");
    let expected = json!([{
        "traceID": trace_id(2), "spanID": "0000000000000005", "service": "bank", "operation": "collect",
        "to": "0000000000000001",
    }]);
    for (trace, expected) in [(1, expected.clone()), (3, expected), (2, json!([])), (9, json!([]))] {
        assert_eq!(fixture.get(&format!("/api/links/{trace}")).await?.json()["data"], expected, "{trace}");
    }
    assert_eq!(fixture.get("/api/links/x").await?.status, 400);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_in_the_process_is_told_the_ids_of_changed_traces() -> Result<()> {
    let fixture = Fixture::start().await?;
    let mut changes = fixture.backend.changes();
    fixture.export("shop", [span(1, 1, 0, "root"), span(1, 2, 1, "child")]).await?;
    fixture.export("shop", [span(1, 2, 1, "child")]).await?;
    fixture.export("shop", [span(2, 1, 0, "root")]).await?;
    // The second export contained no new span.
    assert_eq!([changes.recv().await?, changes.recv().await?], [trace_id(1), trace_id(2)]);
    Ok(())
}
