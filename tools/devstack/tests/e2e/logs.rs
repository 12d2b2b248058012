//! Logs: OTLP records belong to the trace in which they were written, and log lines never block a request.

use anyhow::{Context, Result};
use harness::{
    PATIENCE, poll,
    receiver::Receiver,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
};
use std::fs;
use tempfile::TempDir;
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn records_are_exported_with_the_ids_of_their_span_and_filtered_by_rust_log() -> Result<()> {
    for protocol in ["grpc", "http/protobuf", "http/json"] {
        let receiver = Receiver::start().await?;
        let endpoint = match protocol {
            "grpc" => format!("http://{}", receiver.grpc),
            _ => format!("http://{}/v1/logs", receiver.http),
        };
        let variables = [
            ("*", "OTEL_LOGS_EXPORTER", "otlp"),
            ("*", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", endpoint.as_str()),
            ("*", "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", protocol),
            ("mq", "RUST_LOG", "info,mq::processing=off"),
        ];
        let mut stack = Stack::start(&variables).await?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        // Waiting records are exported when the services end.
        stack.stop().await?;
        let server =
            spans.iter().find(|span| span.kind == "SERVER" && span.service == "api").context("a span")?;
        let record = receiver.expect_log(|record| record.span_id == server.span_id).await;
        assert_eq!((&*record.trace_id, &*record.severity), (&*answer.trace_id(), "INFO"));
        assert_eq!((&*record.service, &*record.scope), ("api", "api::login"));
        let of_mq: Vec<_> = receiver.logs().into_iter().filter(|record| record.service == "mq").collect();
        assert!(of_mq.iter().any(|record| record.body.contains("consuming")), "{of_mq:#?}");
        assert!(of_mq.iter().all(|record| record.scope != "mq::processing"), "{of_mq:#?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_reading_holds_up_neither_requests_nor_the_end() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let directory = TempDir::new()?;
    let pipe = directory.path().join("pipe");
    let script = r#"mkfifo "$PIPE"; cat "$PIPE" & echo $! >"$PIPE.pid"; exec "$0" 2>"$PIPE""#;
    let variables = [("PIPE", pipe.to_str().context("a path")?), ("RUST_LOG", "trace")];
    let mut api = stack.another_by(script, "api", &variables).await?;
    let reader = fs::read_to_string(pipe.with_extension("pid"))?.trim().to_owned();
    let signal = async |signal: &str| Command::new("kill").args([signal, &reader]).status().await;
    signal("-STOP").await?;

    // At this level, one login writes more than 100 lines, so these logins write more than the pipe and the
    // queue can hold.
    let url = format!("http://{}/usercenter/v1/user/login", api.address);
    let body = format!("{{\"mobile\":\"{KNOWN_MOBILE}\"}}");
    let json = [("content-type", "application/json")];
    for _ in 0..100 {
        let answer = stack.client.send(http::Method::POST, &url, &json, body.clone()).await?;
        assert_eq!(answer.status, 200);
    }
    api.signal("TERM").await?;
    let exit = poll(PATIENCE, async || api.exited()).await;
    signal("-CONT").await?;
    assert!(exit.context("api does not end")?.success());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standard_output_that_is_closed_or_full_harms_no_request() -> Result<()> {
    let console = [
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_METRICS_EXPORTER", "console"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "100"),
        ("OTEL_LOGS_EXPORTER", "console"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ];
    let stack = Stack::start(&[]).await?;
    // In the first case, no program reads the pipe any more. In the second case, the disk is full.
    let closed = r#"mkfifo "$PIPE"; : <"$PIPE" & exec "$0" >"$PIPE""#;
    for script in [closed, r#"exec "$0" >/dev/full"#] {
        let directory = TempDir::new()?;
        let pipe = directory.path().join("pipe");
        let console = [&console[..], &[("PIPE", pipe.to_str().context("a path")?)]].concat();
        let mut api = stack.another_by(script, "api", &console).await?;
        let url = format!("http://{}/usercenter/v1/user/login", api.address);
        let body = format!("{{\"mobile\":\"{KNOWN_MOBILE}\"}}");
        for _ in 0..50 {
            let json = [("content-type", "application/json")];
            let answer = stack.client.send(http::Method::POST, &url, &json, body.clone()).await?;
            assert_eq!(answer.status, 200, "{script}");
        }
        assert!(api.stop().await?.success(), "{}", api.output());
        assert!(!api.output().contains("ERROR"), "{}", api.output());
        assert_eq!(api.output().matches("spans can't be exported").count(), 1, "{}", api.output());
    }
    Ok(())
}
