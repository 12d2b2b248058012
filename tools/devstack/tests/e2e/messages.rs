//! How the consumer treats messages from api, messages from clients in other languages, and garbage.

use amqp::properties::UNREADABLE;
use anyhow::{Context, Result};
use broker::raw::{Raw, publish_with};
use harness::{
    database::Database,
    stack::{KNOWN_MOBILE, Stack, TestBroker},
    trace::Span,
};
use lapin::{
    BasicProperties,
    message::BasicGetMessage,
    types::{AMQPValue, DecimalValue, FieldArray, FieldTable},
};
use serde_json::Value;

/// Publishes a message that api would not publish.
async fn publish(stack: &Stack, id: &str, headers: FieldTable, body: &[u8]) -> Result<()> {
    let properties =
        BasicProperties::default().with_message_id(id.into()).with_headers(headers).with_delivery_mode(2);
    stack.publish(properties, body).await
}

fn reason(letter: &BasicGetMessage) -> String {
    let headers = letter.properties.headers().as_ref().expect("headers").inner();
    match &headers["x-dead-letter-reason"] {
        AMQPValue::LongString(reason) => reason.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_vector_has_its_outcome() -> Result<()> {
    let vectors: Value = serde_json::from_str(include_str!("vectors/messages.json"))?;
    let cases = vectors["cases"].as_array().context("cases")?;
    assert_eq!(cases.len(), 18);
    let stack = Stack::start(&[("mq", "BAGGAGE_SPAN_ATTRIBUTES", "tenant")]).await?;

    for case in cases {
        let name = case["name"].as_str().context("name")?;
        let mut headers = FieldTable::default();
        for (header, value) in case["headers"].as_object().into_iter().flatten() {
            headers.insert(
                header.as_str().into(),
                AMQPValue::LongString(value.as_str().unwrap_or_default().into()),
            );
        }
        publish(&stack, name, headers, case["body"].as_str().context("body")?.as_bytes()).await?;

        let is_dead = case["outcome"] == "dead-lettered";
        if case["context"]["sampled"] == false {
            stack.mq.said("login recorded").await?;
            continue;
        }
        let span = stack
            .receiver
            .expect_span(|span| span.attributes.get("messaging.message.id").is_some_and(|id| id == name))
            .await;
        match case["context"].as_object() {
            None => {
                assert_eq!(span.parent_span_id, "", "{name}");
                assert_eq!(span.attributes["throughline.trace_context.source"], "none", "{name}");
            }
            Some(context) => {
                assert_eq!(context["trace_id"], span.trace_id, "{name}");
                assert_eq!(context["parent_span_id"], span.parent_span_id, "{name}");
                let tracestate = context.get("tracestate").and_then(Value::as_str).unwrap_or_default();
                assert_eq!(span.trace_state, tracestate, "{name}");
                let tenant = context.get("baggage").map(|baggage| &baggage["tenant"]);
                assert_eq!(
                    span.attributes.get("tenant").map(|v| Value::from(v.as_str())).as_ref(),
                    tenant,
                    "{name}"
                );
                let source = if name == "headers_win_over_body" { "headers" } else { "body" };
                assert_eq!(span.attributes["throughline.trace_context.source"], source, "{name}");
            }
        }
        assert_eq!(span.status, if is_dead { "ERROR" } else { "UNSET" }, "{name}");
        assert_eq!(span.attributes.contains_key("error.type"), is_dead, "{name}");
        if is_dead {
            let letter = stack.dead_letter().await?;
            assert_eq!(letter.properties.message_id().as_ref().map(|id| id.as_str()), Some(name));
            assert_eq!(letter.data, case["body"].as_str().context("body")?.as_bytes(), "{name}");
            assert_eq!(reason(&letter), span.attributes["error.type"], "{name}");
        }
    }
    // The unsampled message left no span, and every other message left exactly one.
    let consumed = stack.receiver.spans().len();
    assert_eq!(consumed, cases.len() - 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_in_byte_arrays_is_continued_and_a_timestamp_of_zero_is_none() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("tracestate", "vendor=a"),
    ] {
        headers.insert(name.into(), AMQPValue::ByteArray(value.as_bytes().to_vec().into()));
    }
    for (id, timestamp) in [("at-zero", 0), ("at-one", 1)] {
        let properties = BasicProperties::default()
            .with_message_id(id.into())
            .with_correlation_id("order-7 of 13800138000".into())
            .with_headers(headers.clone())
            .with_timestamp(timestamp);
        stack.publish(properties, br#"{"Msg":"13800138000"}"#).await?;
        let of_message =
            |span: &Span| span.attributes.get("messaging.message.id").is_some_and(|other| other == id);
        let span = stack.receiver.expect_span(of_message).await;
        assert_eq!(span.trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(
            (span.parent_span_id.as_str(), span.trace_state.as_str()),
            ("00f067aa0ba902b7", "vendor=a")
        );
        assert_eq!(span.attributes["throughline.trace_context.source"], "headers");
        assert_eq!(span.attributes["messaging.message.conversation_id"], "order-7 of REDACTED");
        let has_time = span.attributes.contains_key("throughline.message.time_in_queue_ms");
        assert_eq!(has_time, timestamp > 0, "{span:#?}");
    }
    Ok(())
}

/// Nests `depth` tables inside each other.
fn nested(depth: usize) -> AMQPValue {
    (0..depth).fold(AMQPValue::Void, |inner, _| {
        let mut table = FieldTable::default();
        table.insert("inner".into(), inner);
        AMQPValue::FieldTable(table)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_properties_never_cost_a_message_its_processing() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let mut array = FieldArray::default();
    array.push(AMQPValue::LongString("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()));
    array.push(AMQPValue::LongString("00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-00f067aa0ba902b7-01".into()));
    for (i, value) in [
        AMQPValue::LongInt(7),
        AMQPValue::Void,
        AMQPValue::Boolean(true),
        AMQPValue::LongString(b"\xff\x00"[..].into()),
        AMQPValue::FieldTable(FieldTable::default()),
        AMQPValue::FieldArray(array),
        AMQPValue::LongString("x".repeat(20_000).into()),
        AMQPValue::ShortShortInt(-7),
        AMQPValue::ShortInt(-7),
        AMQPValue::LongLongInt(i64::MIN),
        // NaN is missing from this list, because RabbitMQ itself can't read it.
        AMQPValue::Float(f32::MIN_POSITIVE),
        AMQPValue::Double(f64::MAX),
        AMQPValue::DecimalValue(DecimalValue { scale: 255, value: u32::MAX }),
        AMQPValue::Timestamp(u64::MAX),
        AMQPValue::ByteArray(vec![0, 255].into()),
        AMQPValue::LongString("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nx: y".into()),
        nested(30),
    ]
    .into_iter()
    .enumerate()
    {
        let mut headers = FieldTable::default();
        for name in ["traceparent", "tracestate", "baggage", "TRACEPARENT"] {
            headers.insert(name.into(), value.clone());
        }
        let name = format!("malformed-{i}");
        publish(&stack, &name, headers, br#"{"Msg":"13800138000"}"#).await?;
        let span = stack
            .receiver
            .expect_span(|span| span.attributes.get("messaging.message.id") == Some(&name))
            .await;
        assert_eq!((span.status, span.parent_span_id.as_str()), ("UNSET", ""), "{value:?}");
    }
    Ok(())
}

/// Makes properties whose header table has as many nested arrays as fit into a frame.
fn properties_that_fill_the_stack() -> Vec<u8> {
    const DEPTH: u32 = 26_000;
    let mut properties = vec![0x20, 0];
    properties.extend((DEPTH * 5 + 2).to_be_bytes());
    properties.extend([1, b'x']);
    for level in 1..=DEPTH {
        properties.push(b'A');
        properties.extend(((DEPTH - level) * 5).to_be_bytes());
    }
    properties
}

/// No client library would publish a message with unreadable properties, but RabbitMQ accepts it unchanged.
#[tokio::test(flavor = "multi_thread")]
async fn properties_that_cannot_be_read_are_a_dead_letter_and_stop_nothing() -> Result<()> {
    let mut stack = Stack::start(&[]).await?;
    let queue = stack.broker.topology.queue.clone();
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let body = format!(r#"{{"Carrier":{{"Traceparent":["{traceparent}"]}},"Msg":"13800138000"}}"#);
    let mut raw = Raw::open(&stack.broker.url).await?;
    // The message id has two bytes, which are not UTF-8.
    let not_utf8 = [0x00, 0x80, 2, 0xff, 0xfe];
    for (properties, kept) in [(&not_utf8[..], &not_utf8[..]), (&properties_that_fill_the_stack(), &[])] {
        raw.send(&publish_with(&queue, properties, body.as_bytes())).await?;
        let letter = stack.dead_letter().await?;
        assert_eq!(reason(&letter), "unreadable_properties");
        assert_eq!(letter.data, body.as_bytes());
        let headers = letter.properties.headers().as_ref().context("headers")?.inner();
        assert_eq!(headers[UNREADABLE], AMQPValue::LongString(kept.into()));
    }
    // mq still finds the trace, because the body also names it.
    let tree = "
        mq mq_consumer_msg CONSUMER ERROR error.type=unreadable_properties
        mq mq_consumer_msg CONSUMER ERROR error.type=unreadable_properties
    ";
    stack.receiver.expect_tree_below("00f067aa0ba902b7", "4bf92f3577b34da6a3ce929d0e0e4736", tree).await;

    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    stack.mq.said("login recorded").await?;
    assert!(!stack.mq.output().contains("lost the connection"), "{}", stack.mq.output());
    assert!(stack.mq.stop().await?.success());
    Ok(())
}

async fn consumed(stack: &Stack, id: &str) -> Span {
    let of_message =
        |span: &Span| span.attributes.get("messaging.message.id").is_some_and(|other| other == id);
    stack.receiver.expect_span(of_message).await
}

/// A producer whose frame size is larger than the consumer's can publish a message with such long headers,
/// and brokers deliver it.
#[tokio::test(flavor = "multi_thread")]
async fn headers_longer_than_a_frame_of_the_consumer_are_left_out_and_stop_nothing() -> Result<()> {
    let broker = TestBroker::connect().await?;
    let url = format!("{}?frame_max=4096", broker.url);
    let stack = Stack::start_on(broker, &[("mq", "AMQP_URL", &url)]).await?;
    let mut headers = FieldTable::default();
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    headers.insert("x-long".into(), AMQPValue::LongString("x".repeat(6000).into()));
    publish(&stack, "long", headers.clone(), br#"{"Msg":"13800138000"}"#).await?;
    for id in ["one", "two", "three"] {
        publish(&stack, id, FieldTable::default(), br#"{"Msg":"13800138000"}"#).await?;
    }
    // The first message lost a header, but mq still finds its trace, and applies its login.
    let span = consumed(&stack, "long").await;
    assert_eq!((span.status, span.parent_span_id.as_str()), ("UNSET", "00f067aa0ba902b7"));
    assert_eq!(span.attributes["throughline.message.headers_left_out"], "true");
    for id in ["one", "two", "three"] {
        let span = consumed(&stack, id).await;
        assert_eq!(span.attributes["throughline.message.outcome"], "applied");
        assert!(!span.attributes.contains_key("throughline.message.headers_left_out"));
    }

    // Headers that only just fit into a frame leave no room for the headers that mq adds to a dead letter.
    headers.insert("x-long".into(), AMQPValue::LongString("x".repeat(3900).into()));
    publish(&stack, "bad", headers, b"not json").await?;
    let letter = stack.dead_letter().await?;
    assert_eq!(reason(&letter), "not_a_json_object");
    let headers = letter.properties.headers().as_ref().context("headers")?.inner();
    assert_eq!(headers["x-headers-left-out"], AMQPValue::Boolean(true));
    assert_eq!(headers["traceparent"], AMQPValue::LongString(traceparent.into()));
    assert!(!headers.contains_key("x-long"));
    assert!(!stack.mq.output().contains("lost the connection"), "{}", stack.mq.output());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_longer_than_a_frame_of_the_producer_costs_no_login() -> Result<()> {
    let broker = TestBroker::connect().await?;
    let url = format!("{}?frame_max=4096", broker.url);
    let stack = Stack::start_on(broker, &[("api", "AMQP_URL", &url)]).await?;
    // The baggage has many members, so that some of them remain wherever it is cut.
    let baggage = (0..80).map(|i| format!("k{i:02}={}", "x".repeat(97))).collect::<Vec<_>>().join(",");
    let tracestate = format!("a={0},b={0}", "x".repeat(247));
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let context = [("traceparent", traceparent), ("tracestate", &tracestate), ("baggage", &baggage)];
    let mut logins = vec![stack.login(KNOWN_MOBILE, &context).await?];
    for _ in 0..3 {
        logins.push(stack.login(KNOWN_MOBILE, &[]).await?);
    }
    for login in logins {
        assert_eq!(login.status, 200);
        let (trace, applied) = (login.trace_id(), "applied".to_owned());
        let of_login = |span: &Span| span.trace_id == trace && span.kind == "CONSUMER";
        let span = stack.receiver.expect_span(of_login).await;
        assert_eq!(span.attributes.get("throughline.message.outcome"), Some(&applied));
    }
    assert!(!stack.api.output().contains("lost the connection"), "{}", stack.api.output());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_no_login_is_a_dead_letter_and_not_in_the_history() -> Result<()> {
    let database = Database::new()?;
    let stack = Stack::start(&[("mq", "MQ_DATABASE_URL", &database.url)]).await?;
    let text = |length| "a".repeat(length);
    for (id, msg, reason_expected) in [
        ("empty", String::new(), "not_a_mobile_number"),
        ("a null", "\\u0000".to_owned(), "not_a_mobile_number"),
        ("a null at the end", "13800138000\\u0000".to_owned(), "not_a_mobile_number"),
        ("text", text(100_000), "not_a_mobile_number"),
        ("long text", text(2_000_000), "body_too_long"),
    ] {
        let body = format!(r#"{{"Msg":"{msg}"}}"#);
        publish(&stack, id, FieldTable::default(), body.as_bytes()).await?;
        let letter = stack.dead_letter().await?;
        assert_eq!(reason(&letter), reason_expected, "{id}");
        let kept = body.len().min(256 * 1024);
        assert!(letter.data == body.as_bytes()[..kept], "{id}: {} bytes", letter.data.len());
        let headers = letter.properties.headers().as_ref().context("headers")?.inner();
        let size = AMQPValue::LongLongInt(body.len() as i64);
        assert_eq!(headers.get("x-body-cut-from"), (kept < body.len()).then_some(&size), "{id}");
    }
    publish(&stack, "good", FieldTable::default(), br#"{"Msg":"13800138000"}"#).await?;
    assert_eq!(consumed(&stack, "good").await.attributes["throughline.message.outcome"], "applied");
    for (mobile, logins) in [("", 0), (&*text(100_000), 0), (KNOWN_MOBILE, 1)] {
        assert_eq!(database.logins(mobile).await?, (logins, logins));
    }
    assert!(!stack.mq.output().contains("lost the connection"), "{}", stack.mq.output());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_long_bodies_take_no_more_memory_than_their_bound() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    // This body would be a valid login if it were shorter.
    let mut body = br#"{"Msg":"13800138000"}"#.to_vec();
    body.resize(8_000_000, b' ');
    for i in 0..32 {
        publish(&stack, &format!("long-{i}"), FieldTable::default(), &body).await?;
    }
    for _ in 0..32 {
        assert_eq!(reason(&stack.dead_letter().await?), "body_too_long");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", stack.mq.id()))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    assert!(kilobytes < 100_000, "{kilobytes} kB");
    assert!(!stack.mq.output().contains("lost the connection"), "{}", stack.mq.output());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_keeps_its_properties_and_its_trace() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let mut headers = FieldTable::default();
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    headers.insert("x-mine".into(), AMQPValue::LongInt(7));
    publish(&stack, "bad", headers, b"\xff\xfe\x00 not json").await?;

    let letter = stack.dead_letter().await?;
    assert_eq!(letter.data, b"\xff\xfe\x00 not json");
    assert_eq!(reason(&letter), "not_a_json_object");
    assert_eq!(*letter.properties.delivery_mode(), Some(2));
    let headers = letter.properties.headers().as_ref().context("headers")?.inner();
    assert_eq!(headers["traceparent"], AMQPValue::LongString(traceparent.into()));
    assert_eq!(headers["x-mine"], AMQPValue::LongInt(7));
    let tree = "mq mq_consumer_msg CONSUMER ERROR error.type=not_a_json_object";
    stack.receiver.expect_tree_below("00f067aa0ba902b7", "4bf92f3577b34da6a3ce929d0e0e4736", tree).await;

    // The next message is processed as usual.
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    stack.mq.said("login recorded").await?;
    Ok(())
}
