//! Messages that fail. Each attempt is a span in the message's trace, and the last attempt makes the message
//! a dead letter.

use anyhow::{Context, Result};
use harness::{
    PATIENCE,
    database::Database,
    poll,
    stack::{KNOWN_MOBILE, LOGIN_TREE, Stack},
    trace::Span,
};
use lapin::{
    BasicProperties,
    options::{BasicGetOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;

/// The mobile number of another known user, whose logins fail after `Database::poison`.
const POISONED: &str = "13800138001";

/// Returns the tree of a login whose message fails `failures` times.
fn tree(failures: usize) -> String {
    let failed = "            mq mq_consumer_msg CONSUMER ERROR error.type=refused_by_database\n";
    LOGIN_TREE.replace("        mq mq_consumer_msg CONSUMER\n", &failed[4..].repeat(failures))
}

fn attempts(spans: &[Span]) -> Vec<&Span> {
    let mut attempts: Vec<_> = spans.iter().filter(|span| span.kind == "CONSUMER").collect();
    attempts.sort_by_key(|span| span.start);
    attempts
}

fn number(span: &Span, attribute: &str) -> i64 {
    span.attributes[&format!("throughline.message.{attribute}")].parse().expect("a number")
}

fn outcome(span: &Span) -> &str {
    &span.attributes["throughline.message.outcome"]
}

async fn poisoned(delays: &str) -> Result<(Stack, Database)> {
    let database = Database::new()?;
    let variables = [("mq", "MQ_DATABASE_URL", &*database.url), ("mq", "MQ_RETRY_DELAYS", delays)];
    let stack = Stack::start(&variables).await?;
    stack.mq.said("the database is available").await?;
    database.poison(POISONED).await?;
    Ok((stack, database))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_attempt_is_a_span_in_the_trace_and_the_last_one_makes_a_dead_letter() -> Result<()> {
    let delays = [200, 500, 5000];
    let (stack, database) = poisoned("200ms,500ms,5s").await?;
    let answer = stack.login(POISONED, &[]).await?;
    assert_eq!(answer.status, 200);
    // The failing message does not delay other messages.
    let other = stack.login(KNOWN_MOBILE, &[]).await?;
    let others = stack.receiver.expect_tree(&other.trace_id(), LOGIN_TREE).await;

    let spans = stack.receiver.expect_tree(&answer.trace_id(), &tree(4)).await;
    let attempts = attempts(&spans);
    for (i, span) in attempts.iter().enumerate() {
        assert_eq!(number(span, "attempt"), i as i64 + 1);
        assert!(span.status_message.contains("1811"), "{}", span.status_message);
        match delays.get(i) {
            Some(delay) => {
                assert_eq!((outcome(span), number(span, "retry_delay_ms")), ("retry", *delay));
                let next = attempts[i + 1];
                let pause = (next.start - span.start) / 1_000_000;
                assert!(pause >= *delay as u64, "{pause} ms before attempt {}", i + 2);
                assert!(number(next, "time_in_queue_ms") >= *delay, "{next:#?}");
            }
            None => assert_eq!(outcome(span), "dead_letter"),
        }
    }
    assert!(others.iter().all(|span| span.end < attempts[3].start));

    let letter = stack.dead_letter().await?;
    let headers = letter.properties.headers().as_ref().context("headers")?.inner();
    assert_eq!(headers["x-dead-letter-reason"], AMQPValue::LongString("refused_by_database".into()));
    assert_eq!(headers["x-dead-letter-attempts"], AMQPValue::LongInt(4));
    let producer = spans.iter().find(|span| span.kind == "PRODUCER").context("producer span")?;
    let traceparent = format!("00-{}-{}-03", producer.trace_id, producer.span_id);
    assert_eq!(headers["traceparent"], AMQPValue::LongString(traceparent.into()));
    let id = letter.properties.message_id().as_ref().map(|id| id.to_string());
    assert_eq!(id.as_ref(), producer.attributes.get("messaging.message.id"));
    assert_eq!(*letter.properties.delivery_mode(), Some(2));

    assert_eq!(database.logins(POISONED).await?, (0, 0));
    assert_eq!(database.logins(KNOWN_MOBILE).await?, (1, 1));
    // The database's error text contains the mobile number, but neither the log nor the spans may contain it.
    assert!(!stack.mq.output().contains(POISONED), "{}", stack.mq.output());
    assert!(!format!("{:?}", stack.receiver.spans()).contains(POISONED));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_succeeds_at_a_later_attempt_is_applied_once() -> Result<()> {
    // There are enough retries for the message to fail until the database is repaired, even on a slow
    // machine.
    let (stack, database) = poisoned(&["500ms"; 16].join(",")).await?;
    let answer = stack.login(POISONED, &[]).await?;
    let trace = answer.trace_id();
    let is_outcome = |span: &Span, expected: &str| {
        span.trace_id == trace && span.kind == "CONSUMER" && outcome(span) == expected
    };
    stack.receiver.expect_span(|span| is_outcome(span, "retry")).await;
    database.cure().await?;
    let applied = stack.receiver.expect_span(|span| is_outcome(span, "applied")).await;
    let failures = number(&applied, "attempt") - 1;
    let whole = tree(failures.try_into()?).trim_end().to_owned() + "\n        mq mq_consumer_msg CONSUMER\n";
    let spans = stack.receiver.expect_tree(&trace, &whole).await;
    let attempts = attempts(&spans);
    let (last, failed) = attempts.split_last().context("attempts")?;
    assert!(failed.iter().all(|span| outcome(span) == "retry") && outcome(last) == "applied");
    assert_eq!(database.logins(POISONED).await?, (1, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_messages_that_are_taken_together_only_those_fail_that_are_to_blame() -> Result<()> {
    let (mut stack, database) = poisoned("none").await?;
    stack.mq.stop().await?;
    for i in 0..60 {
        let mobile = if i % 10 == 5 { POISONED } else { KNOWN_MOBILE };
        let properties = BasicProperties::default().with_message_id(format!("message-{i}").into());
        stack.publish(properties, format!(r#"{{"Msg":"{mobile}"}}"#).as_bytes()).await?;
    }
    let _mq = stack.another("mq", &[("MQ_DATABASE_URL", &database.url), ("MQ_RETRY_DELAYS", "none")]).await?;
    let mut dead = Vec::new();
    for _ in 0..6 {
        let letter = stack.dead_letter().await?;
        dead.push(letter.properties.message_id().as_ref().map(|id| id.to_string()).context("id")?);
    }
    dead.sort();
    let mut expected: Vec<_> = (0..6).map(|i| format!("message-{}", i * 10 + 5)).collect();
    expected.sort();
    assert_eq!(dead, expected);
    let applied =
        poll(PATIENCE, async || (database.logins(KNOWN_MOBILE).await.ok()? == (54, 54)).then_some(()));
    assert!(applied.await.is_some(), "{:?}", database.logins(KNOWN_MOBILE).await);
    assert_eq!(database.logins(POISONED).await?, (0, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_that_are_deleted_are_declared_again() -> Result<()> {
    let (stack, database) = poisoned("300ms").await?;
    let topology = &stack.broker.topology;
    // After this login, mq's publishing connection is open.
    let answer = stack.login(POISONED, &[]).await?;
    stack.receiver.expect_tree(&answer.trace_id(), &tree(2)).await;
    let retry_queue = topology.retry_queue(Duration::from_millis(300));
    for queue in [&retry_queue, &topology.dead_letter_queue] {
        let options = QueueDeleteOptions::default();
        stack.broker.channel.queue_delete(queue.as_str().into(), options).await?;
    }
    let answer = stack.login(POISONED, &[]).await?;
    stack.receiver.expect_tree(&answer.trace_id(), &tree(2)).await;
    stack.dead_letter().await?;
    stack.mq.said("can't publish a message; still trying").await?;

    // Next, the queue that mq consumes is deleted.
    let options = QueueDeleteOptions::default();
    stack.broker.channel.queue_delete(topology.queue.as_str().into(), options).await?;
    stack.mq.said("the broker cancelled the consumer").await?;
    database.cure().await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200);
    stack.receiver.expect_tree(&answer.trace_id(), LOGIN_TREE).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kills_the_process_each_time_is_a_dead_letter_in_the_end() -> Result<()> {
    let (mut stack, database) = poisoned("60s").await?;
    stack.mq.stop().await?;
    database.make_deadly(POISONED).await?;
    // The harmless message is behind the deadly message in the queue, so it is redelivered just as often
    // until mq processes it.
    for (id, mobile) in [("deadly", POISONED), ("harmless", KNOWN_MOBILE)] {
        let properties = BasicProperties::default().with_message_id(id.into());
        stack.publish(properties, format!(r#"{{"Msg":"{mobile}"}}"#).as_bytes()).await?;
    }
    // The first delivery and each of 20 redeliveries kill the process. At the next redelivery, mq makes the
    // message a dead letter without processing it.
    let variables = [("MQ_DATABASE_URL", &*database.url), ("MQ_RETRY_DELAYS", "60s")];
    for delivery in 1..=21 {
        let died = match stack.another_by(Database::BOUND_FILES, "mq", &variables).await {
            Ok(mut mq) => format!("{}\n{}", mq.exit().await?, mq.output()),
            // mq died before the test had read mq's address.
            Err(error) => format!("{error:#}"),
        };
        assert!(died.contains("SIGXFSZ"), "delivery {delivery}: {died}");
        let letter = stack.broker.topology.dead_letter_queue.as_str();
        let letter = stack.broker.channel.basic_get(letter.into(), BasicGetOptions::default()).await?;
        assert!(letter.is_none(), "delivery {delivery}: {letter:?}");
    }
    let mq = stack.another_by(Database::BOUND_FILES, "mq", &variables).await?;

    let span = stack.receiver.expect_span(|span| span.attributes["messaging.message.id"] == "deadly").await;
    assert_eq!(
        (span.attributes["error.type"].as_str(), outcome(&span)),
        ("redelivered_too_often", "dead_letter")
    );
    let letter = stack.dead_letter().await?;
    assert_eq!(letter.properties.message_id().as_ref().map(|id| id.as_str()), Some("deadly"));
    // The harmless message is applied. Both messages have an outcome, so the database has no redelivery
    // count.
    let mut connection = database.connect().await?;
    let all = async || {
        let counts = sqlx::query_scalar("SELECT COUNT(*) FROM redelivery_count");
        let counts: i64 = counts.fetch_one(&mut connection).await.ok()?;
        (counts == 0 && database.logins(KNOWN_MOBILE).await.ok()? == (1, 1)).then_some(())
    };
    poll(PATIENCE, all).await.with_context(|| mq.output())?;
    assert_eq!(database.logins(POISONED).await?, (0, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_headers_of_ours_do_no_harm() -> Result<()> {
    let (stack, _database) = poisoned("60s").await?;
    for (i, value) in [
        AMQPValue::LongLongInt(i64::MAX),
        AMQPValue::LongLongInt(i64::MIN),
        AMQPValue::LongString("x".into()),
        AMQPValue::FieldTable(FieldTable::default()),
    ]
    .into_iter()
    .enumerate()
    {
        let mut headers = FieldTable::default();
        for name in ["x-attempt", "x-published-at-ms", "x-dead-letter-reason", "x-dead-letter-attempts"] {
            headers.insert(name.into(), value.clone());
        }
        for (kind, mobile) in [("good", KNOWN_MOBILE), ("bad", POISONED)] {
            let id = format!("{kind}-{i}");
            let properties =
                BasicProperties::default().with_message_id(id.as_str().into()).with_headers(headers.clone());
            stack.publish(properties, format!(r#"{{"Msg":"{mobile}"}}"#).as_bytes()).await?;
            let span = stack.receiver.expect_span(|span| span.attributes["messaging.message.id"] == id).await;
            // An attempt number above the maximum counts as the last attempt.
            let expected = match (kind, i) {
                ("good", _) => "applied",
                (_, 0) => "dead_letter",
                _ => "retry",
            };
            assert_eq!(outcome(&span), expected, "{value:?}");
            let time = span.attributes.get("throughline.message.time_in_queue_ms");
            assert!(time.is_none_or(|time| time.parse::<i64>().expect("a number") >= 0), "{time:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_leave_no_room_for_ours_are_left_out() -> Result<()> {
    /// The length of a header that almost fills a frame. The properties of a message must fit into one frame,
    /// which has 128 KiB by default.
    const LONG: usize = 131_072 - 64;

    let stack = Stack::start(&[]).await?;
    let mut headers = FieldTable::default();
    headers.insert("x-long".into(), AMQPValue::LongString("x".repeat(LONG).into()));
    let properties = BasicProperties::default().with_message_id("long".into()).with_headers(headers);
    stack.publish(properties, b"not json").await?;
    let letter = stack.dead_letter().await?;
    assert_eq!(letter.properties.message_id().as_ref().map(|id| id.as_str()), Some("long"));
    let headers = letter.properties.headers().as_ref().context("headers")?.inner();
    assert_eq!(headers["x-dead-letter-reason"], AMQPValue::LongString("not_a_json_object".into()));
    assert_eq!(headers["x-headers-left-out"], AMQPValue::Boolean(true));
    assert!(!headers.contains_key("x-long"));
    Ok(())
}
