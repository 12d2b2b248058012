//! Everything that the services export follows the semantic conventions and `docs/conventions.md`, whether a
//! login succeeds or fails.

use anyhow::{Context, Result};
use futures_util::{future::join_all, stream};
use harness::{
    PATIENCE, conventions,
    database::Database,
    poll,
    process::Process,
    stack::{KNOWN_MOBILE, Stack, TestBroker},
    stand_in::{Reply, StandIn},
    trace::Span,
};
use http::{Method, uri::PathAndQuery};
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use proto::usercenter::v1::{GetUserByMobileRequest, GetUserByMobileResponse};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Semaphore, time::timeout};
use tonic::{Code, transport::Channel};
use tonic_prost::ProstCodec;

/// The mobile number of a second known user. api answers this user's logins with 200, but mq's database
/// refuses to record them.
const POISONED: &str = "13800138001";

/// Makes the services export all three signals, with an interval for metrics that is short enough for a test.
const ALL_SIGNALS: [(&str, &str, &str); 3] = [
    ("*", "OTEL_METRICS_EXPORTER", "otlp"),
    ("*", "OTEL_METRIC_EXPORT_INTERVAL", "200"),
    ("*", "OTEL_LOGS_EXPORTER", "otlp"),
];

const LOGIN: &str = "POST /usercenter/v1/user/login SERVER";
const LOOKUP: &str = "usercenter.v1.Usercenter/GetUserByMobile";

/// Describes a span and how it ended, in the form of the lines that these tests expect.
fn ended(span: &Span) -> String {
    let Span { service, name, kind, attributes, .. } = span;
    let status = ["http.response.status_code", "rpc.status_code", "throughline.message.outcome"];
    let status = status.iter().chain(&["throughline.publish.outcome"]).find_map(|key| attributes.get(*key));
    let status = status.map(|status| format!(" {status}")).unwrap_or_default();
    let error = attributes.get("error.type").map(|error| format!(" error.type={error}")).unwrap_or_default();
    format!("{service} {name} {kind}{status}{error}")
}

/// Waits until the receiver has a span that [`ended`] describes by `line`.
async fn expect(stack: &Stack, line: &str) {
    stack.receiver.expect_span(|span| ended(span) == line).await;
}

/// Checks the telemetry that the receiver has received. The services must have ended before this call.
fn assert_no_faults(stack: &Stack) {
    let faults = stack.receiver.faults();
    assert!(faults.is_empty(), "{faults:#?}");
    for service in ["api", "usercenter", "mq"] {
        let has_metrics = stack.receiver.metrics().iter().any(|metric| metric.service == service);
        assert!(has_metrics && stack.receiver.logs().iter().any(|log| log.service == service), "{service}");
    }
}

/// Calls a method of usercenter, but never sends the request message.
async fn call(channel: &Channel, path: &'static str) -> Result<(), tonic::Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let request = tonic::Request::new(stream::pending::<GetUserByMobileRequest>());
    let codec = ProstCodec::<GetUserByMobileRequest, GetUserByMobileResponse>::default();
    client.client_streaming(request, PathAndQuery::from_static(path), codec).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_is_exported_follows_the_conventions() -> Result<()> {
    let (first, second) = (logins_and_their_messages().await?, calls_that_fail().await?);
    let spans = [first.receiver.spans(), second.receiver.spans()].concat();
    assert_eq!(conventions::unseen(&spans), [] as [&str; 0]);
    // Two instances of api have published messages. Each instance of a service has a client id of its own.
    let clients = spans.iter().filter_map(|span| {
        Some((span.attributes.get("messaging.client.id")?, span.resource.get("service.instance.id")?))
    });
    let clients: BTreeSet<_> = clients.collect();
    let ids: BTreeSet<_> = clients.iter().map(|(id, _)| id).collect();
    assert!(ids.len() == clients.len() && ids.len() >= 4, "{clients:#?}");
    Ok(())
}

/// Exercises requests and messages, with the real usercenter.
async fn logins_and_their_messages() -> Result<Stack> {
    let broker = TestBroker::connect().await?;
    let database = Database::new()?;
    let (proxy, url) = broker.proxy()?;
    let url_of_mq = format!("{}?frame_max=4096", broker.url);
    let own = [
        ("api", "AMQP_URL", url.as_str()),
        ("api", "API_SPOOL_MAX_ENTRIES", "1"),
        ("rpc", "USERCENTER_DEADLINE", "3s"),
        ("mq", "AMQP_URL", &url_of_mq),
        ("mq", "MQ_DATABASE_URL", &database.url),
        ("mq", "MQ_RETRY_DELAYS", "100ms"),
    ];
    let mut stack = Stack::start_on(broker, &[&ALL_SIGNALS[..], &own].concat()).await?;
    database.poison(POISONED).await?;

    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    let mut other = stack.another("api", &[]).await?;
    other.said("connected to the broker").await?;
    let url = format!("http://{}/usercenter/v1/user/login", other.address);
    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
    let json = [("content-type", "application/json")];
    assert_eq!(stack.client.send(Method::POST, &url, &json, body).await?.status, 200);
    other.stop().await?;
    assert_eq!(stack.login("13800138009", &[]).await?.status, 401);
    assert_eq!(stack.post("{", &[]).await?.status, 400);
    let elsewhere = format!("http://{}/users", stack.api.address);
    for method in ["GET", "QUERY", "BREW"] {
        for url in [&elsewhere, &stack.login_url()] {
            let method = Method::from_bytes(method.as_bytes())?;
            stack.client.send(method, url, &[("user-agent", "test/1.0")], "").await?;
        }
    }

    let channel = Channel::from_shared(format!("http://{}", stack.rpc.address))?.connect().await?;
    let too_late = call(&channel, "/usercenter.v1.Usercenter/GetUserByMobile").await.expect_err("a refusal");
    assert_eq!(too_late.code(), Code::DeadlineExceeded);
    assert_eq!(
        call(&channel, "/usercenter.v1.Usercenter/None").await.expect_err("a refusal").code(),
        Code::Unimplemented
    );
    // The client cuts off calls that have sent no message, until one of these calls has reached usercenter.
    let cancelled = format!("usercenter {LOOKUP} SERVER CANCELLED");
    let is_cancelled = poll(PATIENCE, async || {
        let _ =
            timeout(Duration::from_millis(50), call(&channel, "/usercenter.v1.Usercenter/GetUserByMobile"))
                .await;
        stack.receiver.spans().iter().any(|span| ended(span) == cancelled).then_some(())
    });
    is_cancelled.await.with_context(|| format!("{:#?}", stack.receiver.spans()))?;

    // Three messages follow. The first message always fails. The second message has no trace context, and is
    // published twice, once with headers that are too long. The third message is not JSON.
    assert_eq!(stack.login(POISONED, &[]).await?.status, 200);
    expect(&stack, "mq mq_consumer_msg CONSUMER dead_letter error.type=refused_by_database").await;
    let mut long = FieldTable::default();
    long.insert("x-long".into(), AMQPValue::LongString("x".repeat(6000).into()));
    let properties =
        BasicProperties::default().with_message_id("twice".into()).with_correlation_id("7".into());
    for properties in [properties.clone().with_headers(long), properties] {
        stack.publish(properties, format!(r#"{{"Msg":"{KNOWN_MOBILE}"}}"#).as_bytes()).await?;
    }
    stack.publish(BasicProperties::default(), b"not json").await?;
    expect(&stack, "mq mq_consumer_msg CONSUMER duplicate").await;
    expect(&stack, "mq mq_consumer_msg CONSUMER dead_letter error.type=not_a_json_object").await;
    let endpoint = format!("http://{}", stack.receiver.grpc);
    let variables = [
        ("AMQP_URL", stack.broker.url.as_str()),
        ("AMQP_PREFIX", &stack.broker.prefix),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
    ];
    let mut replay = Process::command("mq", &variables)?;
    let replayed = replay.args(["dead-letters", "replay", "--all"]).output().await?;
    assert!(replayed.status.success(), "{}", String::from_utf8_lossy(&replayed.stderr));

    proxy.refuse();
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    expect(&stack, "api send_msg_mq PRODUCER spooled").await;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 503);
    proxy.restore();
    stack.api.said("published the spooled logins").await?;
    stack
        .receiver
        .expect_span(|span| span.attributes.contains_key("throughline.message.time_in_spool_ms"))
        .await;
    stack.rpc.stop().await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 503);
    stack.api.stop().await?;
    stack.mq.stop().await?;

    assert_no_faults(&stack);
    let seen: BTreeSet<String> = stack.receiver.spans().iter().map(ended).collect();
    let expected = [
        &format!("api {LOGIN} 200"),
        &format!("api {LOGIN} 400"),
        &format!("api {LOGIN} 401"),
        &format!("api {LOGIN} 503 error.type=503"),
        "api GET /usercenter/v1/user/login SERVER 405",
        "api GET SERVER 404",
        "api HTTP /usercenter/v1/user/login SERVER 405",
        "api HTTP SERVER 404",
        "api QUERY /usercenter/v1/user/login SERVER 405",
        "api QUERY SERVER 404",
        "api local INTERNAL",
        "api send_msg_mq PRODUCER confirmed",
        "api send_msg_mq PRODUCER error.type=spool_full",
        "api send_msg_mq PRODUCER spooled",
        &format!("api {LOOKUP} CLIENT NOT_FOUND error.type=NOT_FOUND"),
        &format!("api {LOOKUP} CLIENT OK"),
        &format!("api {LOOKUP} CLIENT UNAVAILABLE error.type=UNAVAILABLE"),
        "mq mq_consumer_msg CONSUMER applied",
        "mq mq_consumer_msg CONSUMER dead_letter error.type=not_a_json_object",
        "mq mq_consumer_msg CONSUMER dead_letter error.type=refused_by_database",
        "mq mq_consumer_msg CONSUMER duplicate",
        "mq mq_consumer_msg CONSUMER retry error.type=refused_by_database",
        "mq replay_msg_mq PRODUCER",
        "usercenter grpc SERVER UNIMPLEMENTED error.type=UNIMPLEMENTED",
        &format!("usercenter {LOOKUP} SERVER CANCELLED"),
        &format!("usercenter {LOOKUP} SERVER DEADLINE_EXCEEDED error.type=DEADLINE_EXCEEDED"),
        &format!("usercenter {LOOKUP} SERVER NOT_FOUND"),
        &format!("usercenter {LOOKUP} SERVER OK"),
    ];
    assert_eq!(seen, expected.map(str::to_owned).into());
    Ok(stack)
}

/// Exercises a usercenter that is slow or fails, too many callers, and callers that hang up.
async fn calls_that_fail() -> Result<Stack> {
    let fake = StandIn::start(|_| Reply::Never).await?;
    let own = [
        ("api", "USERCENTER_URL", fake.url.as_str()),
        ("api", "USERCENTER_TIMEOUT", "500ms"),
        ("api", "USERCENTER_ATTEMPTS", "1"),
        ("api", "USERCENTER_CIRCUIT_PAUSE", "1h"),
        ("api", "API_MAX_IN_FLIGHT", "20"),
    ];
    let mut stack = Stack::start(&[&ALL_SIGNALS[..], &own].concat()).await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 504);

    let permits = Arc::new(Semaphore::new(0));
    let gate = permits.clone();
    fake.follow(move |_| Reply::ErrorAfter(Code::Unavailable, gate.clone()));
    let before = fake.calls().len();
    let mut hung_up = TcpStream::connect(stack.api.address).await?;
    let request = "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   content-length: 24\r\n\r\n{\"mobile\":\"13800138000\"}";
    hung_up.write_all(request.as_bytes()).await?;
    fake.called(before + 1).await?;
    hung_up.set_zero_linger()?;
    drop(hung_up);
    expect(&stack, &format!("api {LOGIN} error.type=cancelled")).await;
    permits.add_permits(1000);

    // The circuit opens after 20 calls, because all of them fail.
    let circuit_open = format!("api {LOOKUP} CLIENT UNAVAILABLE error.type=circuit_open");
    let overloaded = format!("api {LOGIN} 503 error.type=overloaded");
    let is_refused = poll(PATIENCE, async || {
        join_all((0..40).map(|_| stack.login(KNOWN_MOBILE, &[]))).await;
        let ended: Vec<_> = stack.receiver.spans().iter().map(ended).collect();
        (ended.contains(&circuit_open) && ended.contains(&overloaded)).then_some(())
    });
    is_refused.await.context("the circuit or the bound on requests in flight refused nothing")?;
    stack.stop().await?;

    assert_no_faults(&stack);
    let seen: BTreeSet<String> = stack.receiver.spans().iter().map(ended).collect();
    let expected = [
        format!("api {LOGIN} 503 error.type=503"),
        format!("api {LOGIN} 504 error.type=504"),
        format!("api {LOGIN} error.type=cancelled"),
        format!("api {LOOKUP} CLIENT CANCELLED error.type=CANCELLED"),
        format!("api {LOOKUP} CLIENT DEADLINE_EXCEEDED error.type=DEADLINE_EXCEEDED"),
        format!("api {LOOKUP} CLIENT UNAVAILABLE error.type=UNAVAILABLE"),
        circuit_open,
        overloaded,
    ];
    assert_eq!(seen, expected.into());
    Ok(stack)
}
