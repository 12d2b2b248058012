//! The services as an operator sees them: health, reflection, logs.

use anyhow::{Context, Result};
use harness::{
    PATIENCE, poll,
    process::Process,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
};
use serde_json::{Value, json};
use std::process::Output;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// Runs `{service} health` against the running service. Returns whether the service is healthy.
async fn probe(service: &Process) -> Result<bool> {
    let address = service.address.to_string();
    // No collector listens at this address. A probe exports no telemetry, so it must not log a failed export.
    let mut probe = Process::command(service.name, &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")])?;
    let Output { status, stdout, stderr } = probe.args(["health", "--listen", &address]).output().await?;
    let (stdout, stderr) = (String::from_utf8(stdout)?, String::from_utf8(stderr)?);
    match status.code() {
        Some(0) => assert_eq!((stdout.as_str(), stderr.as_str()), ("SERVING\n", "")),
        code => {
            assert_eq!((code, stdout.as_str()), (Some(1), ""));
            assert!(stderr.starts_with("unhealthy: ") && stderr.contains(&address), "{stderr}");
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
        }
    }
    Ok(status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_in_every_way_and_leaves_no_span() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let url = format!("http://{}", stack.api.address);
    for _ in 0..3 {
        assert_eq!(stack.client.get(&format!("{url}/healthz")).await?.status, 200);
        let expected = json!({
            "usercenter": true, "broker": true, "topology": true, "spool": true, "spooled": 0,
            "spooledBytes": 0, "oldestSeconds": 0, "stopping": false,
        });
        // Each check has a time limit, so on a busy machine a single try may fail.
        let ready = poll(PATIENCE, async || {
            let ready = stack.client.get(&format!("{url}/readyz")).await.ok()?;
            (ready.status == 200 && ready.json() == expected).then_some(())
        });
        ready.await.context("not ready")?;
        for service in [&stack.api, &stack.rpc, &stack.mq] {
            let healthy = poll(PATIENCE, async || probe(service).await.ok()?.then_some(()));
            healthy.await.context(service.name)?;
        }
    }
    let channel = Endpoint::from_shared(format!("http://{}", stack.rpc.address))?.connect().await?;
    let request = HealthCheckRequest { service: "usercenter.v1.Usercenter".to_owned() };
    assert_eq!(HealthClient::new(channel.clone()).check(request).await?.get_ref().status, 1);

    let list = MessageRequest::ListServices(String::new());
    let requests =
        tokio_stream::iter([ServerReflectionRequest { host: String::new(), message_request: Some(list) }]);
    let mut answers =
        ServerReflectionClient::new(channel).server_reflection_info(requests).await?.into_inner();
    let answer = answers.message().await?.and_then(|answer| answer.message_response);
    let Some(MessageResponse::ListServicesResponse(services)) = answer else { panic!("{answer:?}") };
    assert!(
        services.service.iter().any(|service| service.name == "usercenter.v1.Usercenter"),
        "{services:?}"
    );

    stack.stop().await?;
    assert_eq!(stack.receiver.spans(), []);
    for service in [&stack.api, &stack.rpc, &stack.mq] {
        assert!(!probe(service).await?, "{}", service.name);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_follows_the_dependencies() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    stack.rpc.kill().await?;
    let url = format!("http://{}", stack.api.address);
    let ready = stack.client.get(&format!("{url}/readyz")).await?;
    let expected = json!({
        "usercenter": false, "broker": true, "topology": true, "spool": true, "spooled": 0,
        "spooledBytes": 0, "oldestSeconds": 0, "stopping": false,
    });
    assert_eq!((ready.status.as_u16(), ready.json()), (503, expected));
    assert!(!probe(&stack.api).await?);
    // api is not ready, but alive.
    assert_eq!(stack.client.get(&format!("{url}/healthz")).await?.status, 200);

    let away = [("AMQP_URL", "amqp://127.0.0.1:1"), ("OTEL_TRACES_EXPORTER", "none")];
    let (api, mq) = (Process::start("api", &away).await?, Process::start("mq", &away).await?);
    let ready = stack.client.get(&format!("http://{}/readyz", api.address)).await?;
    assert_eq!((&ready.json()["broker"], &ready.json()["spool"]), (&json!(false), &json!(true)));
    assert!(!probe(&mq).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_carry_the_ids_of_their_span_as_text_and_as_json() -> Result<()> {
    for format in ["text", "json"] {
        let stack = Stack::start(&[("*", "LOG_FORMAT", format)]).await?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        for (service, line, span) in [
            (&stack.api, "logged in", "POST /usercenter/v1/user/login"),
            (&stack.rpc, "user found", "usercenter.v1.Usercenter/GetUserByMobile"),
            (&stack.mq, "login recorded", "mq_consumer_msg"),
        ] {
            let line = service.said(line).await?;
            let is_it = |s: &&harness::trace::Span| s.name == span && s.kind != "CLIENT";
            let span = spans.iter().find(is_it).expect("span");
            if format == "json" {
                let line: Value = serde_json::from_str(&line)?;
                assert_eq!(line["trace_id"], span.trace_id);
                assert_eq!(line["span_id"], span.span_id);
                assert_eq!(line["level"], "INFO");
                assert!(line["target"].as_str().is_some_and(|target| target.starts_with(service.name)));
                assert!(line["timestamp"].as_str().is_some_and(|timestamp| timestamp.ends_with('Z')));
                assert!(line["fields"]["message"].is_string());
            } else {
                assert!(
                    line.ends_with(&format!("trace_id={} span_id={}", span.trace_id, span.span_id)),
                    "{line}"
                );
                assert!(!line.contains('\x1b'), "{line}");
            }
        }
        // A log line that belongs to no request has no trace id.
        let line = stack.api.said("connected to the broker").await?;
        assert!(!line.contains("trace_id"), "{line}");
        if format == "json" {
            for service in [&stack.api, &stack.rpc, &stack.mq] {
                for line in service.output().lines() {
                    serde_json::from_str::<Value>(line)?;
                }
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_filter_filters_logs_and_never_spans() -> Result<()> {
    // The harness reads each service's address from a log line, so a few info lines must remain.
    let quiet = "off,api=info,api::login=off,rpc=info,mq=info,mq::processing=off";
    let stack = Stack::start(&[("*", "RUST_LOG", quiet)]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    assert!(!stack.api.output().contains("logged in"));
    assert!(!stack.mq.output().contains("login recorded"));
    drop(stack);

    let loud = Stack::start(&[("*", "RUST_LOG", "trace")]).await?;
    let answer = loud.login(KNOWN_MOBILE, &[]).await?;
    loud.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    loud.rpc.said("TRACE").await?;
    Ok(())
}
