//! Metrics of the three services, as a collector receives them. No caller can create a new series.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    client::Client,
    metric::Metric,
    poll,
    stack::{KNOWN_MOBILE, Stack},
};
use http::Method;
use lapin::BasicProperties;
use std::collections::{BTreeMap, BTreeSet};
use tokio::net::TcpStream;

/// The variables for exporting metrics over OTLP, at an interval short enough for a test.
const OTLP: [(&str, &str, &str); 2] =
    [("*", "OTEL_METRICS_EXPORTER", "otlp"), ("*", "OTEL_METRIC_EXPORT_INTERVAL", "200")];

/// Returns the latest point of each series of a metric.
fn series(stack: &Stack, service: &str, name: &str) -> Vec<Metric> {
    let mut latest = BTreeMap::new();
    for point in stack.receiver.metrics() {
        if point.service == service && point.name == name {
            latest.insert(point.attributes.clone(), point);
        }
    }
    latest.into_values().collect()
}

/// Waits until a metric of a service has a series with these attributes and at least this count or value.
async fn expect(stack: &Stack, service: &str, name: &str, attributes: &[(&str, &str)], least: f64) -> Metric {
    let found = poll(PATIENCE, async || {
        series(stack, service, name).into_iter().find(|point| {
            let has = |(key, value): &(&str, &str)| point.attributes.get(*key).is_some_and(|v| v == value);
            attributes.iter().all(has) && point.value.max(point.count as f64) >= least
        })
    });
    found
        .await
        .unwrap_or_else(|| panic!("{service} {name} {attributes:?}: {:#?}", series(stack, service, name)))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_boundary_and_every_process_is_measured_as_the_conventions_say() -> Result<()> {
    let stack = Stack::start(&OTLP).await?;
    for _ in 0..3 {
        assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    }
    assert_eq!(stack.login("13900139000", &[]).await?.status, 401);

    let route = ("http.route", "/usercenter/v1/user/login");
    let post = [("http.request.method", "POST"), ("url.scheme", "http"), route];
    let ok =
        [&post[..], &[("http.response.status_code", "200"), ("network.protocol.version", "1.1")]].concat();
    let duration = expect(&stack, "api", "http.server.request.duration", &ok, 3.0).await;
    assert_eq!((duration.unit.as_str(), duration.scope.as_str()), ("s", "throughline"));
    assert!(duration.value > 0.0 && duration.value < 180.0, "{duration:#?}");
    assert!(!duration.attributes.contains_key("error.type"));
    let unknown = [&post[..], &[("http.response.status_code", "401")]].concat();
    expect(&stack, "api", "http.server.request.duration", &unknown, 1.0).await;
    let active = [("http.request.method", "POST"), ("url.scheme", "http")];
    let active = expect(&stack, "api", "http.server.active_requests", &active, 0.0).await;
    assert_eq!((active.value, active.unit.as_str()), (0.0, "{request}"));
    let problem = [("error.type", "unknown-user")];
    expect(&stack, "api", "throughline.requests.refused", &problem, 1.0).await;

    let method = ("rpc.method", "usercenter.v1.Usercenter/GetUserByMobile");
    for (service, name) in [("api", "rpc.client.call.duration"), ("usercenter", "rpc.server.call.duration")] {
        let ok = [("rpc.system.name", "grpc"), method, ("rpc.status_code", "OK")];
        expect(&stack, service, name, &ok, 3.0).await;
        let not_found = expect(&stack, service, name, &[method, ("rpc.status_code", "NOT_FOUND")], 1.0).await;
        // This status is an error for the client, but not for the server.
        assert_eq!(not_found.attributes.contains_key("error.type"), service == "api");
    }

    let rabbitmq = ("messaging.system", "rabbitmq");
    let send = [rabbitmq, ("messaging.operation.name", "send")];
    expect(&stack, "api", "messaging.client.sent.messages", &send, 3.0).await;
    expect(&stack, "api", "messaging.client.operation.duration", &send, 1.0).await;
    let process = [rabbitmq, ("messaging.operation.name", "process")];
    expect(&stack, "mq", "messaging.client.consumed.messages", &process, 3.0).await;
    expect(&stack, "mq", "messaging.process.duration", &process, 3.0).await;
    expect(&stack, "mq", "throughline.message.time_in_queue", &[], 3.0).await;

    for service in ["api", "usercenter", "mq"] {
        expect(&stack, service, "process.cpu.time", &[("cpu.mode", "user")], 0.0).await;
        expect(&stack, service, "process.memory.usage", &[], 1e6).await;
        expect(&stack, service, "process.thread.count", &[], 2.0).await;
        expect(&stack, service, "throughline.tokio.tasks", &[], 1.0).await;
        expect(&stack, service, "otel.sdk.processor.span.queue.capacity", &[], 16_384.0).await;
        let exported = expect(&stack, service, "otel.sdk.exporter.span.exported", &[], 3.0).await;
        assert!(!exported.attributes.contains_key("error.type"), "{exported:#?}");
    }
    for name in ["entries", "size", "age", "set_aside"] {
        let spool = expect(&stack, "api", &format!("throughline.spool.{name}"), &[], 0.0).await;
        assert_eq!(spool.value, 0.0, "{name}");
    }
    for (state, value) in [("closed", 1.0), ("open", 0.0), ("half_open", 0.0)] {
        let of_state = [("throughline.circuit.name", "usercenter"), ("throughline.circuit.state", state)];
        let circuit = expect(&stack, "api", "throughline.circuit.state", &of_state, value).await;
        assert_eq!(circuit.value, value, "{state}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spool_a_retry_and_a_dead_letter_are_in_the_metrics() -> Result<()> {
    let variables = [&OTLP[..], &[("mq", "MQ_RETRY_DELAYS", "none")]].concat();
    let (mut stack, proxy) = Stack::start_with_proxy(&variables).await?;
    proxy.refuse();
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    // A login takes about 180 bytes in the spool.
    for (name, least) in [("entries", 1.0), ("size", 100.0), ("age", 1.0)] {
        expect(&stack, "api", &format!("throughline.spool.{name}"), &[], least).await;
    }
    stack.publish(BasicProperties::default(), b"not a message").await?;
    expect(&stack, "mq", "throughline.message.dead_letters", &[("error.type", "not_a_json_object")], 1.0)
        .await;
    stack.rpc.stop().await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 503);
    expect(&stack, "api", "throughline.rpc.retries", &[], 1.0).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_caller_can_make_a_series() -> Result<()> {
    let stack = Stack::start(&OTLP).await?;
    let client = Client::new();
    for i in 0..300 {
        let url = format!("http://{}/{i}?id={i}", stack.api.address);
        let method = Method::from_bytes(format!("M{i}").as_bytes())?;
        let host = format!("h{i}.example");
        let headers = [("host", host.as_str()), ("user-agent", host.as_str()), ("baggage", "id=1")];
        client.send(method, &url, &headers, String::new()).await?;
    }
    let other = [("http.request.method", "_OTHER")];
    expect(&stack, "api", "http.server.request.duration", &other, 300.0).await;
    let names: BTreeSet<String> = stack.receiver.metrics().into_iter().map(|point| point.name).collect();
    for name in names {
        for service in ["api", "usercenter", "mq"] {
            let count = series(&stack, service, &name).len();
            assert!(count <= 6, "{service} {name} has {count} series");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_and_standard_output_have_the_same_metrics() -> Result<()> {
    let variables = [
        ("api", "OTEL_METRICS_EXPORTER", "prometheus,console"),
        ("api", "OTEL_METRIC_EXPORT_INTERVAL", "200"),
        ("api", "OTEL_EXPORTER_PROMETHEUS_PORT", "0"),
    ];
    let stack = Stack::start(&variables).await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    let line = stack.api.said("metrics for Prometheus").await?;
    let address = line.split_once("address=").context("address")?.1;
    // Connections that send no request don't keep other clients out.
    let silent = (0..100).map(|_| TcpStream::connect(address));
    let _silent = futures_util::future::try_join_all(silent).await?;
    let answer = Client::new().get(&format!("http://{address}/metrics")).await?;
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
    let text = String::from_utf8(answer.body.to_vec())?;
    assert!(text.contains("http_server_request_duration_seconds_bucket{"), "{text}");
    assert!(text.contains("http_route=\"/usercenter/v1/user/login\""), "{text}");
    stack.api.said("http.server.request.duration").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn delta_temporality_is_honoured() -> Result<()> {
    let preference = ("api", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta");
    let stack = Stack::start(&[&OTLP[..], &[preference]].concat()).await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    let point = expect(&stack, "api", "http.server.request.duration", &[], 1.0).await;
    assert_eq!(point.temporality, "DELTA", "{point:#?}");
    Ok(())
}
