//! Export: without a collector no request suffers, and with a collector no span is lost.

use anyhow::{Context, Result};
use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, HeaderName, HeaderValue, Response},
    routing::post,
};
use harness::{
    PATIENCE, free_port, poll,
    receiver::{Receiver, Refusal},
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
};
use http_body_util::{BodyExt, Full};
use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};

const WARNING: &str = "spans can't be exported";
const REJECTED: &str = "spans were rejected";

/// Finds the last line with counts in a service's log. Returns how many spans ended, were exported, and were
/// dropped.
fn counts(output: &str) -> Result<[u64; 3]> {
    let line = output.lines().rfind(|line| line.contains("ended=")).context("no counts")?;
    let number = |key: &str| {
        let digits = line.split_once(key).context("number")?.1.split(' ').next().context("number")?;
        digits.parse::<u64>().context(line.to_owned())
    };
    Ok([number("ended=")?, number("exported=")?, number("dropped=")?])
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_requests_go_on_with_one_warning_and_spans_flow_when_it_comes() -> Result<()> {
    // No collector is listening at this address yet.
    let address = (Ipv4Addr::LOCALHOST, free_port()?).into();
    let endpoint = format!("http://{address}");
    let variables = [
        ("*", "OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        // With this time-out, the first batch waits as long as necessary.
        ("*", "OTEL_BSP_EXPORT_TIMEOUT", "600000"),
    ];
    let stack = Stack::start(&variables).await?;
    let mut answers = Vec::new();
    for _ in 0..200 {
        answers.push(stack.login(KNOWN_MOBILE, &[]).await?);
    }
    assert!(answers.iter().all(|answer| answer.status == 200));
    for service in [&stack.api, &stack.rpc, &stack.mq] {
        service.said(WARNING).await?;
    }

    // The waiting spans are sent, and so are new spans.
    let receiver = Receiver::start_at(address).await?;
    for answer in [&answers[0], &answers[199], &stack.login(KNOWN_MOBILE, &[]).await?] {
        receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    }
    for service in [&stack.api, &stack.rpc, &stack.mq] {
        service.said("spans are exported again").await?;
        assert_eq!(service.output().matches(WARNING).count(), 1, "{}", service.output());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_collector_refuses_for_now_is_sent_again() -> Result<()> {
    for protocol in ["grpc", "http/protobuf"] {
        let receiver = Receiver::start().await?;
        let address = if protocol == "grpc" { receiver.grpc } else { receiver.http };
        let mut stack = Stack::start(&[
            ("*", "OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{address}")),
            ("*", "OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ])
        .await?;
        receiver.refuse([Refusal::Unavailable; 4]);
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
        stack.stop().await?;
        assert_eq!(receiver.spans().len(), 6);
        assert_eq!(counts(&stack.api.output())?, [4, 4, 0]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_collector_refuses_for_good_is_dropped_and_counted() -> Result<()> {
    let mut stack =
        Stack::start(&[("rpc", "OTEL_TRACES_EXPORTER", "none"), ("mq", "OTEL_TRACES_EXPORTER", "none")])
            .await?;
    stack.receiver.refuse([Refusal::Invalid]);
    // The collector refuses the first batch, which has one span or both spans of this login.
    let refused = stack.login("13800138009", &[]).await?;
    stack.api.said(REJECTED).await?;
    let taken = stack.login("13800138009", &[]).await?;
    let tree = "
        api POST /usercenter/v1/user/login SERVER
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=NOT_FOUND
    ";
    stack.receiver.expect_tree(&taken.trace_id(), tree).await;
    stack.stop().await?;
    let [ended, exported, dropped] = counts(&stack.api.output())?;
    assert_eq!((ended, exported + dropped), (4, 4));
    assert_eq!(dropped as usize, 2 - stack.receiver.trace(&refused.trace_id()).len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_collector_refuses_in_part_again_and_again_is_counted_with_one_warning() -> Result<()> {
    let receiver = Receiver::start().await?;
    for (protocol, address) in [("grpc", receiver.grpc), ("http/protobuf", receiver.http)] {
        let endpoint = format!("http://{address}");
        let mut stack = Stack::start(&[
            ("api", "OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("api", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol),
            ("api", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"),
        ])
        .await?;
        // The collector alternately refuses one span and is unavailable.
        let moods = [Refusal::OneSpan, Refusal::Unavailable, Refusal::OneSpan, Refusal::Unavailable];
        receiver.refuse(moods.into_iter().cycle().take(20));
        for _ in 0..5 {
            stack.login(KNOWN_MOBILE, &[]).await?;
        }
        stack.stop().await?;
        let output = stack.api.output();
        let [ended, exported, dropped] = counts(&output)?;
        assert_eq!((ended, exported + dropped), (20, 20));
        assert!(dropped >= 10, "{output}");
        assert_eq!(output.matches(WARNING).count() + output.matches(REJECTED).count(), 1, "{output}");
    }
    Ok(())
}

/// Starts a collector that refuses the first two requests, and accepts all later requests. The details of the
/// refusals are not base64. Returns the URL of the collector, and the count of the requests.
async fn collector_with_strange_details() -> Result<(String, Arc<AtomicUsize>)> {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let export = async move || {
        let mut head = Response::builder().header("content-type", "application/grpc");
        if counter.fetch_add(1, SeqCst) < 2 {
            head = head.header("grpc-status", "14").header("grpc-status-details-bin", "!");
            return head.body(Body::empty()).expect("a response");
        }
        // The body of the answer is only the five-byte prefix of an empty message.
        let ok =
            HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
        let message = Full::new(Bytes::from_static(&[0; 5])).with_trailers(async { Some(Ok(ok)) });
        head.body(Body::new(message)).expect("a response")
    };
    let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    let routes = Router::new().route(path, post(export));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let server = Server::builder().add_routes(Routes::from(routes));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    Ok((url, asked))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_with_strange_details_does_not_end_the_export() -> Result<()> {
    let (url, asked) = collector_with_strange_details().await?;
    let mut stack = Stack::start(&[("api", "OTEL_EXPORTER_OTLP_ENDPOINT", &url)]).await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    let taken = poll(PATIENCE, async || (asked.load(SeqCst) >= 3).then_some(())).await;
    assert!(taken.is_some(), "{}", stack.api.output());
    stack.stop().await?;
    assert_eq!(counts(&stack.api.output())?, [4, 4, 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_delays_neither_requests_nor_the_end() -> Result<()> {
    // The kernel accepts connections to this port, but no program ever reads from them.
    let black_hole = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", black_hole.local_addr()?);
    let variables = [
        ("*", "OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("*", "SHUTDOWN_TIMEOUT", "2s"),
        ("*", "OTEL_METRICS_EXPORTER", "otlp"),
        ("*", "OTEL_LOGS_EXPORTER", "otlp"),
        ("*", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4"),
    ];
    let mut stack = Stack::start(&variables).await?;
    for _ in 0..100 {
        assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    }
    let start = Instant::now();
    stack.stop().await?;
    // The three services stop one after the other, each within 2 s. Without that limit, api alone would wait
    // 10 s for each of a hundred batches.
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert_eq!(counts(&stack.api.output())?, [400, 0, 400]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_is_given_up_after_the_timeout_that_is_set() -> Result<()> {
    let black_hole = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", black_hole.local_addr()?);
    for variables in [
        vec![("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_EXPORTER_OTLP_TIMEOUT", "100")],
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "100"),
        ],
        vec![
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_EXPORTER_ZIPKIN_ENDPOINT", &url),
            ("OTEL_EXPORTER_ZIPKIN_TIMEOUT", "100"),
        ],
        vec![("OTEL_EXPORTER_OTLP_ENDPOINT", &url), ("OTEL_BSP_EXPORT_TIMEOUT", "100")],
    ] {
        let variables: Vec<_> =
            variables.into_iter().map(|(variable, value)| ("*", variable, value)).collect();
        let stack = Stack::start(&variables).await?;
        let start = Instant::now();
        stack.login(KNOWN_MOBILE, &[]).await?;
        stack.api.said(WARNING).await?;
        // The default time-outs are 10 and 30 seconds.
        assert!(start.elapsed() < Duration::from_secs(8), "{variables:?}: {:?}", start.elapsed());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_comes_back_while_a_service_ends_gets_all_spans() -> Result<()> {
    // This collector closes each connection at once, and counts the connections.
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let closed = Arc::new(AtomicUsize::new(0));
    let count = closed.clone();
    let away = tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            drop(connection);
            count.fetch_add(1, SeqCst);
        }
    });
    let endpoint = format!("http://{address}");
    let variables =
        [("api", "OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("api", "SHUTDOWN_TIMEOUT", "90s")];
    let mut stack = Stack::start(&variables).await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    stack.api.said(WARNING).await?;
    stack.api.signal("TERM").await?;
    stack.api.said("finishing requests in flight").await?;
    // One attempt to export makes at most four connections. More than 12 connections after the signal show
    // that there were several attempts.
    let before = closed.load(SeqCst);
    let attempts = poll(PATIENCE, async || (closed.load(SeqCst) > before + 12).then_some(()));
    attempts.await.with_context(|| format!("{} connections", closed.load(SeqCst) - before))?;

    away.abort();
    let _ = away.await;
    let receiver = poll(PATIENCE, async || Receiver::start_at(address).await.ok()).await;
    let _receiver = receiver.context("the address is still taken")?;
    stack.api.exit().await?;
    assert_eq!(counts(&stack.api.output())?, [4, 4, 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_line_at_the_end_of_an_outage_counts_all_that_was_dropped_in_it() -> Result<()> {
    let address = (Ipv4Addr::LOCALHOST, free_port()?).into();
    let endpoint = format!("http://{address}");
    let variables = [
        ("*", "OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("*", "OTEL_BSP_MAX_QUEUE_SIZE", "8"),
        ("*", "OTEL_BSP_EXPORT_TIMEOUT", "600000"),
    ];
    let mut stack = Stack::start(&variables).await?;
    stack.login(KNOWN_MOBILE, &[]).await?;
    stack.api.said(WARNING).await?;
    for _ in 0..10 {
        stack.login(KNOWN_MOBILE, &[]).await?;
    }
    let _receiver = Receiver::start_at(address).await?;
    let line = stack.api.said("spans are exported again").await?;
    stack.stop().await?;
    let [_, _, dropped] = counts(&stack.api.output())?;
    assert_eq!(dropped, 4 * 11 - 8);
    assert!(line.contains(&format!("dropped={dropped}")), "{line}");
    Ok(())
}

/// Returns the names of a process's threads, each with the thread's niceness.
fn niceness(id: u32) -> Result<Vec<(String, i32)>> {
    let tasks = fs::read_dir(format!("/proc/{id}/task"))?;
    let stats = tasks.map(|task| Ok(fs::read_to_string(task?.path().join("stat"))?));
    let threads = stats.map(|stat: Result<String>| {
        // Counted from 1, the niceness is field 19, and the name in parentheses is field 2
        // (proc_pid_stat(5)).
        let stat = stat?;
        let (name, fields) = stat.split_once(") ").context("no name")?;
        let niceness = fields.split(' ').nth(16).context("no niceness")?.parse()?;
        Ok((name.split_once('(').context("no name")?.1.to_owned(), niceness))
    });
    threads.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_that_export_let_requests_pass() -> Result<()> {
    let stack = Stack::start(&[
        ("*", "OTEL_METRICS_EXPORTER", "otlp"),
        ("*", "OTEL_METRIC_EXPORT_INTERVAL", "100"),
        ("*", "OTEL_LOGS_EXPORTER", "otlp"),
    ])
    .await?;
    let own = niceness(std::process::id())?[0].1;
    // The highest niceness, which means the lowest priority, is 19.
    let lowered = (own + 10).min(19);
    stack.login(KNOWN_MOBILE, &[]).await?;
    let found = poll(PATIENCE, async || {
        let threads = niceness(stack.api.id()).ok()?;
        let [exporting, serving] = [true, false].map(|exports| {
            let those = threads.iter().filter(move |(name, _)| name.starts_with("OpenTelemetry") == exports);
            those.map(|(_, niceness)| *niceness).collect::<Vec<_>>()
        });
        // Four threads export: one thread for each of the three signals, and one thread for the connections
        // of all exporters.
        (exporting == [lowered; 4] && serving.iter().all(|niceness| *niceness == own)).then_some(())
    });
    found.await.with_context(|| format!("{:?}", niceness(stack.api.id())))
}
