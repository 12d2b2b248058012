//! Logs: records by OTLP in the trace in which they were written, and lines that hold up nobody.

use anyhow::{Context, Result};
use devstack::{
    PATIENCE, poll, process,
    receiver::Receiver,
    stack::{KNOWN_MOBILE, Stack},
};
use std::{fs, time::Duration};
use tempfile::TempDir;
use tokio::{process::Command, time::timeout};

const OTLP: [(&str, &str, &str); 2] =
    [("*", "OTEL_LOGS_EXPORTER", "otlp"), ("*", "OTEL_BLRP_SCHEDULE_DELAY", "100")];

#[tokio::test(flavor = "multi_thread")]
async fn records_are_exported_with_the_ids_of_their_span_and_filtered_by_rust_log() -> Result<()> {
    for protocol in ["grpc", "http/protobuf", "http/json"] {
        let receiver = Receiver::start().await?;
        let address = if protocol == "grpc" { receiver.grpc } else { receiver.http };
        let endpoint = format!("http://{address}");
        let own = [
            ("*", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", endpoint.clone()),
            ("*", "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", protocol.to_owned()),
            ("*", "RUST_LOG", "info,api::publisher=off".to_owned()),
        ];
        let mut variables = OTLP.to_vec();
        let path = endpoint.clone() + "/v1/logs";
        variables.extend(own.iter().map(|(service, name, value)| (*service, *name, value.as_str())));
        if protocol != "grpc" {
            variables.push(("*", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", &path));
        }
        // The publisher's own line would be waited for; this one tells as much.
        let stack = Stack::start(&variables[..]).await;
        let stack = stack.with_context(|| protocol.to_owned())?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        let spans = poll(PATIENCE, async || {
            let spans = stack.receiver.trace(&answer.trace_id());
            (spans.len() == 6).then_some(spans)
        });
        let spans = spans.await.context("six spans")?;
        for (service, span) in [("api", "POST /usercenter/v1/user/login"), ("mq", "mq_consumer_msg")] {
            let span = spans.iter().find(|s| s.service == service && s.name == span).context(span)?;
            let record = receiver
                .expect_log(|record| record.service == service && record.span_id == span.span_id)
                .await;
            assert_eq!((record.trace_id.as_str(), record.severity.as_str()), (&*answer.trace_id(), "INFO"));
        }
        assert!(receiver.logs().iter().all(|record| !record.body.contains("connected to the broker")));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn records_inside_of_spans_by_tracing_have_the_ids_of_the_innermost() -> Result<()> {
    let receiver = Receiver::start().await?;
    let endpoint = format!("http://{}", receiver.grpc);
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_LOGS_EXPORTER", "otlp")];
    let output = process::example("spans", &variables)?.output().await?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (body, span) in [("in the inner span", "inner"), ("in the asynchronous span", "asynchronous")] {
        let span = receiver.expect_span(|other| other.name == span).await;
        let record = receiver.expect_log(|record| record.body == body).await;
        assert_eq!((record.trace_id, record.span_id), (span.trace_id, span.span_id));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_reading_holds_up_neither_requests_nor_the_end() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let directory = TempDir::new()?;
    let pipe = directory.path().join("pipe");
    let script = r#"mkfifo "$PIPE"; cat "$PIPE" & echo $! >"$PIPE.pid"; exec "$0" 2>"$PIPE""#;
    let variables = [("PIPE", pipe.to_str().context("a path")?)];
    let mut api = stack.another_by(script, "api", &variables).await?;
    let reader = fs::read_to_string(pipe.with_extension("pid"))?.trim().to_owned();
    let signal = async |signal: &str| Command::new("kill").args([signal, &reader]).status().await;
    signal("-STOP").await?;

    // More lines than the pipe and the queue take together.
    let url = format!("http://{}/usercenter/v1/user/login", api.address);
    let body = format!("{{\"mobile\":\"{KNOWN_MOBILE}\"}}");
    let json = [("content-type", "application/json")];
    for _ in 0..6_000 {
        let answer = stack.client.send(http::Method::POST, &url, &json, body.clone()).await?;
        assert_eq!(answer.status, 200);
    }
    let stopped = timeout(Duration::from_secs(40), api.stop()).await;
    signal("-CONT").await?;
    assert!(stopped.context("it does not end")??.success());
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
    for script in [r#"exec "$0" >&-"#, r#"exec "$0" >/dev/full"#] {
        let mut api = stack.another_by(script, "api", &console).await?;
        let url = format!("http://{}/usercenter/v1/user/login", api.address);
        let body = format!("{{\"mobile\":\"{KNOWN_MOBILE}\"}}");
        for _ in 0..50 {
            let json = [("content-type", "application/json")];
            let answer = stack.client.send(http::Method::POST, &url, &json, body.clone()).await?;
            assert_eq!(answer.status, 200, "{script}");
        }
        assert!(api.stop().await?.success(), "{}", api.output());
        assert!(!api.output().contains("panicked"), "{}", api.output());
    }
    Ok(())
}
