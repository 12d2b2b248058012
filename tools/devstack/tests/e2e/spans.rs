//! Runs the example of hand-written spans as a program, and checks its spans and its log.

use anyhow::Result;
use harness::{process, receiver::Receiver};

#[tokio::test(flavor = "multi_thread")]
async fn spans_by_hand_and_by_tracing_nest_in_each_other_and_follow_tasks() -> Result<()> {
    let receiver = Receiver::start().await?;
    let endpoint = format!("http://{}", receiver.grpc);
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_LOGS_EXPORTER", "otlp")];
    let output = process::example("spans", &variables)?.output().await?;
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");

    let root = receiver.expect_span(|span| span.kind == "SERVER").await;
    let tree = "
        spans GET /report/{id} SERVER
          spans local INTERNAL
            spans instrumented INTERNAL
              spans inner INTERNAL
          spans asynchronous INTERNAL
          spans blocking INTERNAL
          spans background INTERNAL
    ";
    let spans = receiver.expect_tree(&root.trace_id, tree).await;
    assert_eq!(receiver.spans().len(), 7);
    let find = |name: &str| spans.iter().find(|span| span.name == name).expect(name);

    // The background task outlives the request.
    assert!(find("background").end > root.end);
    assert_eq!(find("instrumented").attributes["report.id"], "7");
    // Log lines and log records have the ids of the innermost span.
    for (text, span) in [("in the inner span", "inner"), ("in the asynchronous span", "asynchronous")] {
        let line = log.lines().find(|log| log.contains(text)).expect(text);
        assert!(line.ends_with(&format!("span_id={}", find(span).span_id)), "{line}");
        let record = receiver.expect_log(|record| record.body.ends_with(text)).await;
        assert_eq!((&record.trace_id, &record.span_id), (&root.trace_id, &find(span).span_id));
    }
    Ok(())
}
