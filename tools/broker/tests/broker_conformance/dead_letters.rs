//! Times to live and dead letters.
//!
//! For AMQP 0-9-1 clients, RabbitMQ 4 writes `x-death` as RabbitMQ 3.10 does. RabbitMQ 4 also adds
//! `x-last-death-*`, and ignores an `x-death` that a publisher has set. No check here covers these two
//! differences.

use crate::client::{Client, bind, body, long_string, next};
use anyhow::{Context, Result};
use lapin::{
    BasicProperties, ExchangeKind,
    message::Delivery,
    options::{BasicAckOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use loopback::{PATIENCE, poll};
use std::time::{SystemTime, UNIX_EPOCH};

const REJECT: BasicRejectOptions = BasicRejectOptions { requeue: false };

fn milliseconds(n: i32) -> AMQPValue {
    AMQPValue::LongInt(n)
}

fn headers(message: &Delivery) -> &FieldTable {
    message.properties.headers().as_ref().expect("headers")
}

fn deaths(message: &Delivery) -> Vec<FieldTable> {
    let Some(AMQPValue::FieldArray(deaths)) = headers(message).inner().get("x-death") else {
        panic!("{:?}", message.properties)
    };
    let table = |death: &AMQPValue| match death {
        AMQPValue::FieldTable(death) => death.clone(),
        other => panic!("{other:?}"),
    };
    deaths.as_slice().iter().map(table).collect()
}

fn text(table: &FieldTable, name: &str) -> String {
    match table.inner().get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        other => panic!("{name}: {other:?}"),
    }
}

fn count(death: &FieldTable) -> i64 {
    match death.inner().get("count") {
        Some(AMQPValue::LongLongInt(count)) => *count,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn messages_of_a_queue_are_gone_after_its_time_to_live_or_their_own_if_that_is_less() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let short = client.queue("short", &[("x-message-ttl", milliseconds(100))]).await?;
    let long = client.queue("long", &[("x-message-ttl", milliseconds(60_000))]).await?;
    let expiring = |after: &str| BasicProperties::default().with_expiration(after.into());
    client.publish("", &short, b"a", BasicProperties::default()).await?;
    client.publish("", &short, b"b", expiring("60000")).await?;
    client.publish("", &long, b"c", expiring("100")).await?;
    client.publish("", &long, b"d", BasicProperties::default()).await?;
    client.expect_counts(&short, (0, 0)).await;
    client.expect_counts(&long, (1, 0)).await;
    assert_eq!(body(&client.expect(&long).await?), "d");
    Ok(())
}

#[tokio::test]
async fn with_a_time_to_live_of_0_a_message_reaches_only_who_waits_for_it() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[("x-message-ttl", milliseconds(0))]).await?;
    client.fill(&queue, &["nobody waits"]).await?;
    client.expect_counts(&queue, (0, 0)).await;
    let mut consumer = client.consume(&queue, "").await?;
    client.fill(&queue, &["for you"]).await?;
    assert_eq!(body(&crate::client::next(&mut consumer).await?), "for you");
    Ok(())
}

#[tokio::test]
async fn a_message_that_was_delivered_does_not_expire_until_it_is_requeued() -> Result<()> {
    let client = Client::connect().await?;
    let dead = client.queue("dead", &[]).await?;
    let arguments = [
        ("x-message-ttl", milliseconds(100)),
        ("x-dead-letter-exchange", long_string("")),
        ("x-dead-letter-routing-key", long_string(&dead)),
    ];
    let queue = client.queue("q", &arguments).await?;
    // With this prefetch count, the first message is delivered at once, and the second waits.
    client.channel.basic_qos(1, BasicQosOptions::default()).await?;
    let mut consumer = client.consume(&queue, "").await?;
    client.fill(&queue, &["held", "waits"]).await?;
    let held = next(&mut consumer).await?;
    assert_eq!(body(&held), "held");
    assert_eq!(body(&client.expect(&dead).await?), "waits");
    assert!(client.get(&dead).await?.is_none());
    client.channel.basic_cancel(consumer.tag(), Default::default()).await?;
    held.nack(BasicNackOptions { multiple: false, requeue: true }).await?;
    assert_eq!(body(&client.expect(&dead).await?), "held");
    Ok(())
}

#[tokio::test]
async fn a_message_that_is_returned_more_often_than_a_quorum_queue_allows_is_dead_lettered() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let dead = client.queue("dead", &[]).await?;
    let queue = client.name("q");
    let mut arguments = FieldTable::default();
    for (name, value) in [
        ("x-queue-type", long_string("quorum")),
        ("x-delivery-limit", AMQPValue::LongInt(2)),
        ("x-dead-letter-exchange", long_string("")),
        ("x-dead-letter-routing-key", long_string(&dead)),
    ] {
        arguments.insert(name.into(), value);
    }
    client.channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::durable(), arguments).await?;
    client.publish("", &queue, b"m", BasicProperties::default()).await?;
    for _ in 0..3 {
        let got = client.expect(&queue).await?;
        got.nack(BasicNackOptions { multiple: false, requeue: true }).await?;
    }
    let letter = client.expect(&dead).await?;
    assert_eq!(body(&letter), "m");
    assert_eq!(deaths(&letter)[0].inner()["reason"], long_string("delivery_limit"));
    client.channel.queue_delete(queue.as_str().into(), Default::default()).await?;
    Ok(())
}

#[tokio::test]
async fn a_queue_that_nobody_uses_is_gone_after_its_time() -> Result<()> {
    let client = Client::connect().await?;
    // On a busy machine, the queue may expire before the consumer starts.
    let consumed = poll(PATIENCE, async || {
        let client = client.another().await.ok()?;
        let queue = client.queue("q", &[("x-expires", milliseconds(300))]).await.ok()?;
        let consumer = client.consume(&queue, "").await.ok()?;
        Some((client, queue, consumer))
    });
    let (client, queue, consumer) = consumed.await.context("no consumer")?;
    tokio::time::sleep(std::time::Duration::from_millis(900)).await;
    assert!(client.has_queue(&queue).await?, "the queue has a consumer");
    client.channel.basic_cancel(consumer.tag(), Default::default()).await?;
    // RabbitMQ counts even a passive declaration as use, so the pauses between the checks exceed `x-expires`.
    let gone = poll(PATIENCE, async || {
        tokio::time::sleep(std::time::Duration::from_millis(900)).await;
        (client.has_queue(&queue).await.ok() == Some(false)).then_some(())
    });
    assert!(gone.await.is_some());
    Ok(())
}

#[tokio::test]
async fn a_rejected_message_is_dead_lettered_with_its_story() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let dead = client.queue("dead", &[]).await?;
    let dlx = client.exchange("dlx", ExchangeKind::Direct, &dead, &["k"]).await?;
    let queue = client.queue("q", &[("x-dead-letter-exchange", long_string(&dlx))]).await?;
    let exchange = client.exchange("x", ExchangeKind::Direct, &queue, &["k"]).await?;
    let mut mine = FieldTable::default();
    mine.insert("mine".into(), AMQPValue::LongInt(7));
    let properties = BasicProperties::default()
        .with_message_id("id".into())
        .with_content_type("text/plain".into())
        .with_delivery_mode(2)
        .with_headers(mine)
        .with_expiration("60000".into());
    client.publish(&exchange, "k", b"m", properties).await?;
    let before = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    client.expect(&queue).await?.reject(REJECT).await?;

    let letter = client.expect(&dead).await?;
    assert_eq!(body(&letter), "m");
    assert_eq!((letter.exchange.as_str(), letter.routing_key.as_str()), (dlx.as_str(), "k"));
    assert!(!letter.redelivered);
    assert_eq!(*letter.properties.expiration(), None);
    assert_eq!(letter.properties.message_id().as_ref().map(|id| id.as_str()), Some("id"));
    assert_eq!(*letter.properties.delivery_mode(), Some(2));
    assert_eq!(headers(&letter).inner()["mine"], AMQPValue::LongInt(7));
    assert_eq!(text(headers(&letter), "x-first-death-reason"), "rejected");
    assert_eq!(text(headers(&letter), "x-first-death-queue"), queue);
    assert_eq!(text(headers(&letter), "x-first-death-exchange"), exchange);

    let deaths = deaths(&letter);
    assert_eq!(deaths.len(), 1);
    assert_eq!(count(&deaths[0]), 1);
    assert_eq!(text(&deaths[0], "reason"), "rejected");
    assert_eq!(text(&deaths[0], "queue"), queue);
    assert_eq!(text(&deaths[0], "exchange"), exchange);
    assert_eq!(text(&deaths[0], "original-expiration"), "60000");
    let AMQPValue::FieldArray(keys) = &deaths[0].inner()["routing-keys"] else { panic!("{deaths:?}") };
    assert_eq!(keys.as_slice(), [long_string("k")]);
    let AMQPValue::Timestamp(time) = deaths[0].inner()["time"] else { panic!("{deaths:?}") };
    assert!((before..before + 60).contains(&time), "{time} and {before}");
    Ok(())
}

#[tokio::test]
async fn a_dead_letter_gets_the_routing_key_that_the_queue_names() -> Result<()> {
    let client = Client::connect().await?;
    let dead = client.queue("dead", &[]).await?;
    let arguments =
        [("x-dead-letter-exchange", long_string("")), ("x-dead-letter-routing-key", long_string(&dead))];
    let queue = client.queue("q", &arguments).await?;
    client.fill(&queue, &["m"]).await?;
    client.expect(&queue).await?.nack(BasicNackOptions { multiple: false, requeue: false }).await?;
    let letter = client.expect(&dead).await?;
    assert_eq!((letter.exchange.as_str(), letter.routing_key.as_str()), ("", dead.as_str()));
    let deaths = deaths(&letter);
    let AMQPValue::FieldArray(keys) = &deaths[0].inner()["routing-keys"] else { panic!("{deaths:?}") };
    assert_eq!(keys.as_slice(), [long_string(&queue)]);
    Ok(())
}

#[tokio::test]
async fn an_expired_message_is_dead_lettered_as_expired() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let dead = client.queue("dead", &[]).await?;
    let arguments =
        [("x-dead-letter-exchange", long_string("")), ("x-dead-letter-routing-key", long_string(&dead))];
    let queue = client.queue("q", &arguments).await?;
    client.publish("", &queue, b"m", BasicProperties::default().with_expiration("50".into())).await?;
    let letter = client.expect(&dead).await?;
    let deaths = deaths(&letter);
    assert_eq!(
        (text(&deaths[0], "reason"), text(&deaths[0], "original-expiration")),
        ("expired".into(), "50".into())
    );
    assert_eq!(*letter.properties.expiration(), None);
    Ok(())
}

#[tokio::test]
async fn without_its_exchange_a_dead_letter_is_lost_and_nobody_harmed() -> Result<()> {
    let client = Client::connect().await?;
    let missing = client.name("missing");
    let queue = client.queue("q", &[("x-dead-letter-exchange", long_string(&missing))]).await?;
    client.fill(&queue, &["lost", "next"]).await?;
    client.expect(&queue).await?.reject(REJECT).await?;
    assert_eq!(body(&client.expect(&queue).await?), "next");
    Ok(())
}

#[tokio::test]
async fn a_message_that_dies_again_is_counted() -> Result<()> {
    let client = Client::connect().await?;
    // As in a retry, a rejected message waits in the second queue. When it expires there, it goes back to the
    // first queue as a dead letter.
    let (queue, retry) = (client.name("q"), client.name("retry"));
    client
        .queue(
            "q",
            &[
                ("x-dead-letter-exchange", long_string("")),
                ("x-dead-letter-routing-key", long_string(&retry)),
            ],
        )
        .await?;
    client
        .queue(
            "retry",
            &[
                ("x-message-ttl", milliseconds(20)),
                ("x-dead-letter-exchange", long_string("")),
                ("x-dead-letter-routing-key", long_string(&queue)),
            ],
        )
        .await?;
    client.fill(&queue, &["m"]).await?;
    for _ in 0..3 {
        client.expect(&queue).await?.reject(REJECT).await?;
    }
    let message = client.expect(&queue).await?;
    let deaths = deaths(&message);
    let seen: Vec<_> = deaths.iter().map(|d| (text(d, "queue"), text(d, "reason"), count(d))).collect();
    assert_eq!(seen, [(retry, "expired".to_owned(), 3), (queue.clone(), "rejected".to_owned(), 3)]);
    assert_eq!(text(headers(&message), "x-first-death-queue"), queue);
    message.ack(BasicAckOptions::default()).await?;
    Ok(())
}

#[tokio::test]
async fn a_message_that_goes_round_with_nobody_rejecting_it_is_dropped() -> Result<()> {
    let client = Client::connect().await?;
    let (one, two, seen) = (client.name("one"), client.name("two"), client.queue("seen", &[]).await?);
    // Each queue sends its dead letters to the exchange, with the other queue's name as the routing key.
    // `seen` gets every dead letter.
    let exchange = client.exchange("x", ExchangeKind::Topic, &seen, &["#"]).await?;
    for (name, next) in [("one", &two), ("two", &one)] {
        client
            .queue(
                name,
                &[
                    ("x-message-ttl", milliseconds(20)),
                    ("x-dead-letter-exchange", long_string(&exchange)),
                    ("x-dead-letter-routing-key", long_string(next)),
                ],
            )
            .await?;
        bind(&client.channel, &client.name(name), &exchange, &client.name(name)).await?;
    }
    client.fill(&one, &["round"]).await?;
    // The message goes to the second queue, then back to the first, where it is dropped.
    for key in [&two, &one] {
        assert_eq!(client.expect(&seen).await?.routing_key.as_str(), key);
    }
    client.expect_counts(&one, (0, 0)).await;
    client.expect_counts(&two, (0, 0)).await;
    client.fill(&two, &["another"]).await?;
    assert_eq!(body(&client.expect(&seen).await.context("the next story")?), "another");
    Ok(())
}
