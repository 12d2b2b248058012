//! Queues with a maximum length.

use crate::client::{Client, body, long_string};
use anyhow::Result;
use lapin::{BasicProperties, Confirmation, types::AMQPValue};

fn max_length(n: i32) -> (&'static str, AMQPValue) {
    ("x-max-length", AMQPValue::LongInt(n))
}

#[tokio::test]
async fn a_full_queue_drops_its_oldest_message() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[max_length(2)]).await?;
    client.fill(&queue, &["a", "b", "c", "d"]).await?;
    client.expect_counts(&queue, (2, 0)).await;
    for expected in ["c", "d"] {
        assert_eq!(body(&client.expect(&queue).await?), expected);
    }
    Ok(())
}

#[tokio::test]
async fn what_a_full_queue_drops_is_dead_lettered() -> Result<()> {
    let client = Client::connect().await?;
    let dead = client.queue("dead", &[]).await?;
    let arguments = [
        max_length(1),
        ("x-dead-letter-exchange", long_string("")),
        ("x-dead-letter-routing-key", long_string(&dead)),
    ];
    let queue = client.queue("q", &arguments).await?;
    client.fill(&queue, &["a", "b"]).await?;
    let letter = client.expect(&dead).await?;
    assert_eq!(body(&letter), "a");
    let headers = letter.properties.headers().as_ref().expect("headers").inner();
    assert_eq!(headers["x-first-death-reason"], long_string("maxlen"));
    Ok(())
}

#[tokio::test]
async fn a_full_queue_that_rejects_has_the_publisher_nacked() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let queue = client.queue("q", &[max_length(1), ("x-overflow", long_string("reject-publish"))]).await?;
    let publish = async |body: &'static str| {
        client.publish("", &queue, body.as_bytes(), BasicProperties::default()).await
    };
    assert_eq!(publish("a").await?, Confirmation::Ack(None));
    // RabbitMQ may notice only a moment later that the queue is full.
    let nacked = loopback::poll(loopback::PATIENCE, async || {
        (publish("b").await.ok() == Some(Confirmation::Nack(None))).then_some(())
    });
    assert!(nacked.await.is_some());
    assert_eq!(body(&client.expect(&queue).await?), "a");
    Ok(())
}

#[tokio::test]
async fn a_limit_does_not_count_what_was_delivered() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[max_length(1)]).await?;
    client.fill(&queue, &["a"]).await?;
    let a = client.expect(&queue).await?;
    client.fill(&queue, &["b"]).await?;
    assert_eq!((body(&a), body(&client.expect(&queue).await?)), ("a", "b"));
    Ok(())
}
