//! Connections and channels: how they open, and how they close.

use crate::client::{Client, body, code, next};
use amq_protocol::protocol::{AMQPClass, channel};
use anyhow::Result;
use broker::raw::Raw;
use lapin::{
    Connection, ConnectionProperties,
    options::{BasicAckOptions, QueueDeclareOptions},
    types::FieldTable,
};

#[tokio::test]
async fn a_wrong_password_is_refused_with_403() -> Result<()> {
    let client = Client::connect().await?;
    let url = client.url.replace("guest:guest", "guest:wrong");
    assert_ne!(url, client.url, "these checks log in as guest");
    let refused = Connection::connect(&url, ConnectionProperties::default()).await.expect_err("refused");
    assert_eq!(code(&refused), 403);
    Ok(())
}

#[tokio::test]
async fn another_virtual_host_is_refused_with_530() -> Result<()> {
    let client = Client::connect().await?;
    let url = client.url.replace("/%2f", "/no-such-vhost");
    let refused = Connection::connect(&url, ConnectionProperties::default()).await.expect_err("refused");
    assert_eq!(code(&refused), 530);
    Ok(())
}

#[tokio::test]
async fn the_largest_frame_and_the_channels_are_agreed_on() -> Result<()> {
    let client = Client::connect().await?;
    let agreed = client.connection.configuration();
    assert_eq!((agreed.frame_max(), agreed.channel_max()), (131_072, 2047));
    Ok(())
}

#[tokio::test]
async fn the_broker_says_that_it_confirms_nacks_and_cancels() -> Result<()> {
    let client = Client::connect().await?;
    let mut raw = Raw::connect(&client.url).await?;
    let capabilities = raw.server_capabilities().await?;
    for capability in
        ["publisher_confirms", "basic.nack", "consumer_cancel_notify", "authentication_failure_close"]
    {
        assert!(capabilities.contains(&capability.to_owned()), "{capability} of {capabilities:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_channel_error_leaves_other_channels_alone() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let missing = client.name("missing");
    client
        .expect_channel_error(404, async |channel| {
            channel.queue_declare(missing.into(), passive, FieldTable::default()).await
        })
        .await?;
    client.fill(&queue, &["still here"]).await?;
    assert_eq!(body(&client.expect(&queue).await?), "still here");
    Ok(())
}

#[tokio::test]
async fn a_closed_channel_requeues_what_was_not_acknowledged_where_it_was() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c", "d"]).await?;
    let other = client.connection.create_channel().await?;
    for _ in 0..3 {
        other.basic_get(queue.as_str().into(), Default::default()).await?;
    }
    other.basic_ack(2, BasicAckOptions::default()).await?;
    other.close(200, "done".into()).await?;
    for (expected, redelivered) in [("a", true), ("c", true), ("d", false)] {
        let message = client.expect(&queue).await?;
        assert_eq!((body(&message), message.redelivered), (expected, redelivered));
    }
    Ok(())
}

#[tokio::test]
async fn a_lost_connection_requeues_what_was_not_acknowledged() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.shared_queue("q").await?;
    client.fill(&queue, &["a", "b"]).await?;
    let mut raw = Raw::open(&client.url).await?;
    assert_eq!(raw.get(&queue).await?, "a");
    // The socket closes without `connection.close`.
    drop(raw);
    client.expect_counts(&queue, (2, 0)).await;
    let mut consumer = client.consume(&queue, "").await?;
    let (first, second) = (next(&mut consumer).await?, next(&mut consumer).await?);
    assert_eq!((body(&first), first.redelivered), ("a", true));
    assert_eq!((body(&second), second.redelivered), ("b", false));
    client.channel.queue_delete(queue.into(), Default::default()).await?;
    Ok(())
}

#[tokio::test]
async fn a_closed_channel_number_can_be_opened_again() -> Result<()> {
    let client = Client::connect().await?;
    let mut raw = Raw::open(&client.url).await?;
    for _ in 0..20 {
        let close = channel::Close { reply_code: 200, ..Default::default() };
        raw.method(1, AMQPClass::Channel(channel::AMQPMethod::Close(close))).await?;
        raw.expect(|method| matches!(method, AMQPClass::Channel(channel::AMQPMethod::CloseOk(_)))).await?;
        raw.method(1, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}))).await?;
        raw.expect(|method| matches!(method, AMQPClass::Channel(channel::AMQPMethod::OpenOk(_)))).await?;
    }
    Ok(())
}
