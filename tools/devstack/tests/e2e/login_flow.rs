//! A login passes through three processes and a broker, and makes one trace.

use anyhow::{Context, Result};
use harness::{
    client::Answer,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
    trace::{self, Span},
};
use lapin::{
    options::{BasicGetOptions, BasicNackOptions},
    types::AMQPValue,
};
use std::collections::{BTreeMap, HashSet};

const REMOTE_PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn span<'a>(spans: &'a [Span], service: &str, name: &str) -> &'a Span {
    spans.iter().find(|span| span.service == service && span.name == name).expect(name)
}

/// Returns the attributes whose values are the same in each run. Checks that the span also has all attributes
/// in `varying`, whose values vary from run to run.
fn stable(span: &Span, varying: &[&str]) -> BTreeMap<String, String> {
    let mut attributes = span.attributes.clone();
    for key in varying {
        assert!(attributes.remove(*key).is_some(), "{key} is missing in {span:#?}");
    }
    attributes
}

fn expected<const N: usize>(attributes: [(&str, &str); N]) -> BTreeMap<String, String> {
    attributes.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_leaves_exactly_one_tree_of_six_spans() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200);
    let body = answer.json();
    assert_eq!(body["accessToken"].as_str().unwrap().split('.').count(), 3);
    assert!(body["refreshAfter"].as_u64() < body["accessExpire"].as_u64());

    // All spans are sent before the services end, so no span can arrive later.
    stack.stop().await?;
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    assert_eq!(stack.receiver.spans().len(), 6, "{}", trace::tree(&stack.receiver.spans(), ""));
    assert!(
        answer.header("traceparent").contains(&span(&spans, "api", "POST /usercenter/v1/user/login").span_id)
    );
    for span in &spans {
        assert!(span.start < span.end && span.status == "UNSET", "{span:#?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_span_has_the_attributes_of_the_semantic_conventions() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[("user-agent", "test/1.0")]).await?;
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    let (api_port, rpc_port) = (stack.api.address.port().to_string(), stack.rpc.address.port().to_string());
    let uri = amqp::connection::parse_url(&stack.broker.url).unwrap().uri().clone();
    let (broker_host, broker_port) = (uri.authority.host, uri.authority.port.to_string());

    assert_eq!(
        stable(span(&spans, "api", "POST /usercenter/v1/user/login"), &["network.peer.port", "client.port"]),
        expected([
            ("http.request.method", "POST"),
            ("http.route", "/usercenter/v1/user/login"),
            ("http.response.status_code", "200"),
            ("url.path", "/usercenter/v1/user/login"),
            ("url.scheme", "http"),
            ("user_agent.original", "test/1.0"),
            ("network.protocol.version", "1.1"),
            ("server.address", "127.0.0.1"),
            ("server.port", &api_port),
            ("client.address", "127.0.0.1"),
            ("network.peer.address", "127.0.0.1"),
        ])
    );
    let grpc = "usercenter.v1.Usercenter/GetUserByMobile";
    assert_eq!(
        stable(span(&spans, "api", grpc), &[]),
        expected([
            ("rpc.system.name", "grpc"),
            ("rpc.method", grpc),
            ("rpc.status_code", "OK"),
            ("server.address", "127.0.0.1"),
            ("server.port", &rpc_port),
            ("network.peer.address", "127.0.0.1"),
            ("network.peer.port", &rpc_port),
        ])
    );
    assert_eq!(
        stable(span(&spans, "usercenter", grpc), &["network.peer.port", "client.port"]),
        expected([
            ("rpc.system.name", "grpc"),
            ("rpc.method", grpc),
            ("rpc.status_code", "OK"),
            ("server.address", "127.0.0.1"),
            ("server.port", &rpc_port),
            ("client.address", "127.0.0.1"),
            ("network.peer.address", "127.0.0.1"),
        ])
    );
    assert_eq!(stable(span(&spans, "api", "local"), &[]), expected([]));

    let queue = stack.broker.topology.queue.clone();
    let producer = span(&spans, "api", "send_msg_mq");
    assert_eq!(
        stable(
            producer,
            &["messaging.message.id", "messaging.client.id", "network.peer.address", "network.peer.port"]
        ),
        expected([
            ("messaging.system", "rabbitmq"),
            ("messaging.operation.name", "send"),
            ("messaging.operation.type", "send"),
            ("messaging.destination.name", &queue),
            ("messaging.rabbitmq.destination.routing_key", &queue),
            ("server.address", &broker_host),
            ("server.port", &broker_port),
            ("throughline.publish.outcome", "confirmed"),
        ])
    );
    let consumer = span(&spans, "mq", "mq_consumer_msg");
    let varying = ["messaging.message.id", "messaging.client.id", "throughline.message.time_in_queue_ms"];
    assert_eq!(
        stable(consumer, &varying),
        expected([
            ("messaging.system", "rabbitmq"),
            ("messaging.operation.name", "process"),
            ("messaging.operation.type", "process"),
            ("messaging.destination.name", &queue),
            ("messaging.rabbitmq.destination.routing_key", &queue),
            ("messaging.rabbitmq.message.delivery_tag", "1"),
            ("server.address", &broker_host),
            ("server.port", &broker_port),
            ("throughline.trace_context.source", "headers"),
            ("throughline.message.attempt", "1"),
            ("throughline.chunk.size", "1"),
            ("throughline.chunk.pause_ms", "0"),
            ("throughline.message.outcome", "applied"),
        ])
    );
    assert_eq!(producer.attributes["messaging.message.id"], consumer.attributes["messaging.message.id"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn other_members_of_the_request_are_allowed() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let answer = stack.post(r#"{"password":"x","mobile":"13800138000","n":{"a":[1,null]}}"#, &[]).await?;
    assert_eq!(answer.status, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_describes_itself() -> Result<()> {
    let attributes = "service.version=9,team=a%20b,deployment.environment.name=test";
    let stack = Stack::start(&[("mq", "OTEL_RESOURCE_ATTRIBUTES", attributes)]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;

    let mut instances = HashSet::new();
    for span in &spans {
        let of = |key: &str| span.resource.get(key).map(String::as_str).unwrap_or_default();
        assert_eq!(of("service.namespace"), "throughline");
        assert_eq!(of("telemetry.sdk.language"), "rust");
        assert_eq!(
            of("process.executable.name"),
            if span.service == "usercenter" { "rpc" } else { &span.service }
        );
        let described = [
            "host.name",
            "host.arch",
            "os.type",
            "process.pid",
            "process.creation.time",
            "process.runtime.name",
            "process.runtime.version",
        ];
        for key in described {
            assert!(!of(key).is_empty(), "{key}");
        }
        // For example 2026-11-26T12:00:00.000Z.
        let created = of("process.creation.time");
        assert!(created.starts_with("20") && created.len() == 24 && created.ends_with('Z'), "{created}");
        let is_mq = span.service == "mq";
        assert_eq!(of("service.version"), if is_mq { "9" } else { env!("CARGO_PKG_VERSION") });
        assert_eq!(of("team"), if is_mq { "a b" } else { "" });
        assert_eq!(of("deployment.environment.name"), if is_mq { "test" } else { "development" });
        instances.insert(of("service.instance.id").to_owned());
    }
    assert_eq!(instances.len(), 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_trace_is_continued_to_the_consumer() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let headers = [("traceparent", REMOTE_PARENT), ("tracestate", "vendor=a"), ("tracestate", "other=b")];
    let answer = stack.login(KNOWN_MOBILE, &headers).await?;
    assert_eq!(answer.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
    let spans = stack.receiver.expect_tree_below("00f067aa0ba902b7", &answer.trace_id(), LOGIN_TREE).await;
    for span in &spans {
        assert_eq!(span.trace_state, "vendor=a,other=b", "{span:#?}");
        // The span is sampled. The flags also say whether its parent is remote. Only the first span of each
        // process has a remote parent.
        let first = ["SERVER", "CONSUMER"].contains(&span.kind);
        assert_eq!(span.flags & 0x3ff, if first { 0x301 } else { 0x101 }, "{span:#?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_span_may_be_linked_instead_of_being_a_child_or_as_well() -> Result<()> {
    let until_the_broker = LOGIN_TREE.replace("        mq mq_consumer_msg CONSUMER\n", "");
    for (relation, tree) in [("link", until_the_broker.as_str()), ("both", LOGIN_TREE)] {
        let stack = Stack::start(&[("mq", "MQ_RELATION", relation)]).await?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
        let consumer = stack.receiver.expect_span(|span| span.service == "mq").await;
        let is_child = relation == "both";
        assert_eq!(consumer.trace_id == answer.trace_id(), is_child, "{consumer:#?}");
        assert_eq!(!consumer.parent_span_id.is_empty(), is_child, "{consumer:#?}");
        let producer = span(&spans, "api", "send_msg_mq");
        assert_eq!(consumer.links, [(answer.trace_id(), producer.span_id.clone())]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn baggage_of_the_caller_reaches_the_consumer() -> Result<()> {
    let stack = Stack::start(&[("*", "BAGGAGE_SPAN_ATTRIBUTES", "tenant")]).await?;
    let headers = [("baggage", "tenant=blue%20sky,session=secret"), ("baggage", "region=eu")];
    let answer = stack.login(KNOWN_MOBILE, &headers).await?;
    let spans = stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    for span in &spans {
        assert_eq!(span.attributes.get("tenant").map(String::as_str), Some("blue sky"), "{span:#?}");
        assert!(!span.attributes.contains_key("session"), "{span:#?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_message_is_what_the_contract_says() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    // mq is stopped, so the message stays in the queue until the test starts another mq.
    stack.mq.stop().await?;

    let headers = [("traceparent", REMOTE_PARENT), ("tracestate", "vendor=a"), ("baggage", "tenant=blue")];
    let answer = stack.login(KNOWN_MOBILE, &headers).await?;
    let trace = answer.trace_id();
    let queue = stack.broker.topology.queue.as_str();
    let got = stack.broker.channel.basic_get(queue.into(), BasicGetOptions::default()).await?;
    let message = got.context("a message")?.delivery;
    message.nack(BasicNackOptions { requeue: true, multiple: false }).await?;
    let _mq = stack.another("mq", &[]).await?;
    let spans = stack.receiver.expect_tree_below("00f067aa0ba902b7", &trace, LOGIN_TREE).await;
    let producer = span(&spans, "api", "send_msg_mq");

    let traceparent = format!("00-{trace}-{}-01", producer.span_id);
    assert_eq!(
        String::from_utf8(message.data.clone())?,
        format!(
            r#"{{"Carrier":{{"Baggage":["tenant=blue"],"Traceparent":["{traceparent}"],"Tracestate":["vendor=a"]}},"Msg":"13800138000"}}"#
        )
    );
    let properties = &message.properties;
    assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "application/json");
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(
        properties.message_id().as_ref().unwrap().as_str(),
        producer.attributes["messaging.message.id"]
    );
    let headers = properties.headers().as_ref().unwrap().inner();
    for (name, value) in
        [("traceparent", traceparent.as_str()), ("tracestate", "vendor=a"), ("baggage", "tenant=blue")]
    {
        assert_eq!(headers[name], AMQPValue::LongString(value.into()));
    }
    // This header has the time of publishing in milliseconds. AMQP's property `timestamp` has it in seconds.
    let AMQPValue::LongLongInt(published) = headers[proto::headers::PUBLISHED_AT] else {
        panic!("{headers:?}");
    };
    let during = |time: i64| (producer.start / 1_000_000..=producer.end / 1_000_000).contains(&(time as u64));
    assert!(during(published), "{published}");
    assert_eq!(*properties.timestamp(), Some(published as u64 / 1000));
    // RabbitMQ adds the header `x-delivery-count` to messages that it delivers from a quorum queue.
    let ours = headers.keys().filter(|name| name.as_str() != "x-delivery-count");
    assert_eq!(ours.count(), 4, "{headers:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_agent_keeps_its_versions_and_no_mobile_number() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let firefox = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0";
    let android = "Dalvik/2.1.0 (Linux; U; Android 12; 2201116SG Build/20190302)";
    for (sent, shown) in [
        (firefox.to_owned(), firefox.to_owned()),
        (android.to_owned(), android.to_owned()),
        (format!("{firefox} ({KNOWN_MOBILE})"), format!("{firefox} (REDACTED)")),
        (format!("app/{KNOWN_MOBILE} (1380013)"), "app/REDACTED (REDACTED)".to_owned()),
    ] {
        let trace = stack.login(KNOWN_MOBILE, &[("user-agent", &sent)]).await?.trace_id();
        let of_request = |span: &Span| span.trace_id == trace && span.attributes.contains_key("url.path");
        let span = stack.receiver.expect_span(of_request).await;
        assert_eq!(span.attributes["user_agent.original"], shown);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_span_log_or_answer_holds_personal_data_or_secrets() -> Result<()> {
    let loud = ("*", "RUST_LOG", "info,lapin=trace,api=trace,rpc=trace,mq=trace,telemetry=trace,proto=trace");
    let secret = ("api", "ACCESS_SECRET", "0123456789abcdef-this-is-a-secret-0123456789");
    let otlp_headers = ("*", "OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20s3cr3t");
    let mut stack = Stack::start(&[loud, secret, otlp_headers]).await?;
    let bytes = format!("{:?}", KNOWN_MOBILE.as_bytes());
    let login =
        stack.login(KNOWN_MOBILE, &[("authorization", "Bearer s3cr3t"), ("cookie", "s3cr3t")]).await?;
    assert_eq!(login.status, 200);
    let token = login.json()["accessToken"].as_str().unwrap().to_owned();
    // These requests have the mobile number in places where it does not belong.
    let url = format!("http://{}/users/{KNOWN_MOBILE}?mobile={KNOWN_MOBILE}", stack.api.address);
    let number_in_headers = [("user-agent", KNOWN_MOBILE), ("x-request-id", KNOWN_MOBILE)];
    let ready = format!("http://{}/readyz", stack.api.address);
    let others = [
        stack.client.send(http::Method::GET, &url, &number_in_headers, "").await?,
        stack.client.send(http::Method::POST, &stack.login_url(), &number_in_headers, KNOWN_MOBILE).await?,
        stack.post(&format!(r#"{{"mobile":{KNOWN_MOBILE}}}"#), &[]).await?,
        stack.post(&format!(r#"{{"mobile":"{KNOWN_MOBILE}x"}}"#), &[]).await?,
        stack.post(&format!(r#"{{"{KNOWN_MOBILE}":1}}"#), &[]).await?,
        stack.login("13800138009", &[]).await?,
        stack.client.get(&ready).await?,
    ];
    let statuses = others.each_ref().map(|answer| answer.status.as_u16());
    assert_eq!(statuses, [404, 415, 422, 422, 422, 401, 200]);

    stack.mq.said("login recorded").await?;
    stack.stop().await?;
    let spans = format!("{:?}", stack.receiver.spans());
    let logs = [&stack.api, &stack.rpc, &stack.mq].map(|service| service.output()).join("\n");
    let text = |answer: &Answer| format!("{:?}\n{}", answer.headers, String::from_utf8_lossy(&answer.body));
    // Only the answer to the login may contain the token.
    let answers = others.iter().map(text).collect::<String>() + &text(&login).replacen(&token, "", 1);
    assert!(spans.contains("REDACTED") && logs.contains("logged in"), "there are no spans or logs to check");
    assert!(answers.contains("accessToken") && answers.contains("problem+json"), "{answers}");
    for private in
        [KNOWN_MOBILE, bytes.trim_matches(['[', ']']), "13800138009", "s3cr3t", "this-is-a-secret", &token]
    {
        assert!(!spans.contains(private), "{private} is in a span");
        assert!(!logs.contains(private), "{private} is in a log");
        assert!(!answers.contains(private), "{private} is in an answer:\n{answers}");
    }
    Ok(())
}
