//! Consuming, getting, and acknowledging.

use crate::client::{Client, body, next};
use amq_protocol::protocol::{AMQPClass, basic, channel};
use anyhow::Result;
use broker::raw::Raw;
use futures_util::StreamExt;
use lapin::{
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions,
        BasicQosOptions, BasicRejectOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};
use loopback::{PATIENCE, poll};
use tokio::time::timeout;

const REQUEUE: BasicNackOptions = BasicNackOptions { multiple: false, requeue: true };

#[tokio::test]
async fn a_get_tells_how_many_are_left_and_without_ack_takes_for_good() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c"]).await?;
    let other = client.connection.create_channel().await?;
    let first = other.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true }).await?.expect("a");
    assert_eq!((body(&first), first.message_count), ("a", 2));
    other.close(200, "done".into()).await?;
    client.expect_counts(&queue, (2, 0)).await;
    Ok(())
}

#[tokio::test]
async fn deliveries_are_numbered_and_carry_where_they_came_from() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b"]).await?;
    let mut consumer = client.consume(&queue, "mine").await?;
    assert_eq!(consumer.tag().as_str(), "mine");
    for (tag, expected) in [(1, "a"), (2, "b")] {
        let delivery = next(&mut consumer).await?;
        assert_eq!((delivery.delivery_tag, body(&delivery)), (tag, expected));
        assert_eq!((delivery.exchange.as_str(), delivery.routing_key.as_str()), ("", queue.as_str()));
    }
    Ok(())
}

#[tokio::test]
async fn a_consumer_gets_a_tag_if_it_has_none_and_keeps_it_for_itself() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let (one, two) = (client.consume(&queue, "").await?, client.consume(&queue, "").await?);
    assert!(!one.tag().as_str().is_empty());
    assert_ne!(one.tag(), two.tag());
    let shared = client.shared_queue("shared").await?;
    let tag = "again";
    client
        .expect_connection_error(530, async |channel| {
            let options = BasicConsumeOptions::default();
            for _ in 0..2 {
                channel
                    .basic_consume(shared.as_str().into(), tag.into(), options, FieldTable::default())
                    .await?;
            }
            Ok(())
        })
        .await?;
    client.channel.queue_delete(shared.into(), QueueDeleteOptions::default()).await?;
    Ok(())
}

#[tokio::test]
async fn consumers_take_turns() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let (mut one, mut two) = (client.consume(&queue, "one").await?, client.consume(&queue, "two").await?);
    client.fill(&queue, &["1", "2", "3", "4"]).await?;
    for consumer in [&mut one, &mut two] {
        let (first, second) = (next(consumer).await?, next(consumer).await?);
        let (first, second): (u32, u32) = (body(&first).parse()?, body(&second).parse()?);
        assert_eq!(second - first, 2);
    }
    Ok(())
}

#[tokio::test]
async fn a_prefetch_count_limits_what_each_consumer_has_in_hand() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c", "d", "e"]).await?;
    client.channel.basic_qos(2, BasicQosOptions::default()).await?;
    let mut one = client.consume(&queue, "one").await?;
    let (a, _b) = (next(&mut one).await?, next(&mut one).await?);
    client.expect_counts(&queue, (3, 1)).await;
    a.ack(BasicAckOptions::default()).await?;
    assert_eq!(body(&next(&mut one).await?), "c");
    client.expect_counts(&queue, (2, 1)).await;
    // The prefetch count applies to each consumer separately.
    let mut two = client.consume(&queue, "two").await?;
    assert_eq!(body(&next(&mut two).await?), "d");
    client.expect_counts(&queue, (0, 2)).await;
    Ok(())
}

#[tokio::test]
async fn a_prefetch_count_does_not_limit_consumers_without_ack() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.channel.basic_qos(1, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let mut consumer = client
        .channel
        .basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default())
        .await?;
    client.fill(&queue, &["a", "b", "c"]).await?;
    for expected in ["a", "b", "c"] {
        assert_eq!(body(&next(&mut consumer).await?), expected);
    }
    Ok(())
}

#[tokio::test]
async fn an_ack_of_multiple_settles_all_before_it() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.shared_queue("q").await?;
    client.fill(&queue, &["a", "b", "c", "d"]).await?;
    let other = client.another().await?;
    let mut consumer = other.consume(&queue, "").await?;
    let mut deliveries = Vec::new();
    for _ in 0..4 {
        deliveries.push(next(&mut consumer).await?);
    }
    deliveries[2].ack(BasicAckOptions { multiple: true }).await?;
    other.connection.close(200, "done".into()).await?;
    client.expect_counts(&queue, (1, 0)).await;
    let left = client.expect(&queue).await?;
    assert_eq!((body(&left), left.redelivered), ("d", true));
    client.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    Ok(())
}

#[tokio::test]
async fn an_ack_of_multiple_with_tag_0_settles_all() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c"]).await?;
    let other = client.connection.create_channel().await?;
    for _ in 0..3 {
        other.basic_get(queue.as_str().into(), BasicGetOptions::default()).await?;
    }
    other.basic_ack(0, BasicAckOptions { multiple: true }).await?;
    other.close(200, "done".into()).await?;
    client.expect_counts(&queue, (0, 0)).await;
    Ok(())
}

#[tokio::test]
async fn an_unknown_delivery_tag_is_a_406() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.shared_queue("q").await?;
    client.fill(&queue, &["a"]).await?;
    let mut raw = Raw::open(&client.url).await?;
    let get = basic::Get { queue: queue.as_str().into(), no_ack: false };
    raw.method(1, AMQPClass::Basic(basic::AMQPMethod::Get(get))).await?;
    raw.expect(|method| matches!(method, AMQPClass::Basic(basic::AMQPMethod::GetOk(_)))).await?;
    for _ in 0..2 {
        let ack = basic::Ack { delivery_tag: 1, multiple: false };
        raw.method(1, AMQPClass::Basic(basic::AMQPMethod::Ack(ack))).await?;
    }
    let closed = raw.expect(|method| matches!(method, AMQPClass::Channel(_))).await?;
    let AMQPClass::Channel(channel::AMQPMethod::Close(close)) = closed else { panic!("{closed:?}") };
    assert_eq!((close.reply_code, close.class_id, close.method_id), (406, 60, 80));
    client.channel.queue_delete(queue.into(), Default::default()).await?;
    Ok(())
}

#[tokio::test]
async fn what_is_requeued_comes_again_where_it_was_and_says_so() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c", "d"]).await?;
    let (a, b) = (client.expect(&queue).await?, client.expect(&queue).await?);
    let c = client.expect(&queue).await?;
    c.nack(REQUEUE).await?;
    a.reject(BasicRejectOptions { requeue: true }).await?;
    b.ack(BasicAckOptions::default()).await?;
    for (expected, redelivered) in [("a", true), ("c", true), ("d", false)] {
        let message = client.expect(&queue).await?;
        assert_eq!((body(&message), message.redelivered), (expected, redelivered));
    }
    Ok(())
}

#[tokio::test]
async fn a_nack_of_multiple_requeues_all_before_it_in_order() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c"]).await?;
    for _ in 0..2 {
        client.expect(&queue).await?;
    }
    client.expect(&queue).await?.nack(BasicNackOptions { multiple: true, requeue: true }).await?;
    for expected in ["a", "b", "c"] {
        let message = client.expect(&queue).await?;
        assert_eq!((body(&message), message.redelivered), (expected, true));
    }
    Ok(())
}

#[tokio::test]
async fn what_is_rejected_without_requeue_is_gone() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a", "b", "c"]).await?;
    client.expect(&queue).await?.reject(BasicRejectOptions { requeue: false }).await?;
    client.expect(&queue).await?.nack(BasicNackOptions { multiple: false, requeue: false }).await?;
    assert_eq!(body(&client.expect(&queue).await?), "c");
    assert!(client.get(&queue).await?.is_none());
    Ok(())
}

#[tokio::test]
async fn a_cancelled_consumer_gets_nothing_more_and_may_still_acknowledge() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.fill(&queue, &["a"]).await?;
    let mut consumer = client.consume(&queue, "c").await?;
    let delivery = next(&mut consumer).await?;
    client.channel.basic_cancel("c".into(), BasicCancelOptions::default()).await?;
    client.fill(&queue, &["b"]).await?;
    client.expect_counts(&queue, (1, 0)).await;
    delivery.ack(BasicAckOptions::default()).await?;
    assert_eq!(body(&client.expect(&queue).await?), "b");
    // Cancelling a consumer that does not exist succeeds, too.
    Ok(client.channel.basic_cancel("c".into(), BasicCancelOptions::default()).await?)
}

#[tokio::test]
async fn an_exclusive_consumer_is_alone() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let options = BasicConsumeOptions { exclusive: true, ..Default::default() };
    let first = client
        .channel
        .basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default())
        .await?;
    client
        .expect_channel_error(403, async |channel| {
            let options = BasicConsumeOptions::default();
            channel
                .basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default())
                .await
                .map(drop)
        })
        .await?;
    client.channel.basic_cancel(first.tag(), BasicCancelOptions::default()).await?;
    // The consumer is kept in a variable, because lapin cancels it when it is dropped.
    let _second = client.consume(&queue, "second").await?;
    client
        .expect_channel_error(403, async |channel| {
            channel
                .basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default())
                .await
                .map(drop)
        })
        .await
}

#[tokio::test]
async fn a_consumer_is_told_when_its_queue_is_deleted() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let mut consumer = client.consume(&queue, "c").await?;
    let other = client.connection.create_channel().await?;
    other.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    // lapin ends the stream at `basic.cancel`.
    assert!(timeout(PATIENCE, consumer.next()).await?.is_none());
    assert!(client.channel.status().connected());
    Ok(())
}

#[tokio::test]
async fn what_a_consumer_lost_goes_to_the_others() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.shared_queue("q").await?;
    let other = client.another().await?;
    other.channel.basic_qos(10, BasicQosOptions::default()).await?;
    let mut lost = other.consume(&queue, "").await?;
    client.fill(&queue, &["a", "b"]).await?;
    next(&mut lost).await?;
    let mut consumer = client.consume(&queue, "").await?;
    other.connection.close(200, "away".into()).await?;
    for expected in ["a", "b"] {
        let delivery = next(&mut consumer).await?;
        assert_eq!((body(&delivery), delivery.redelivered), (expected, true));
    }
    client.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    Ok(())
}

#[tokio::test]
async fn a_queue_with_more_than_a_consumer_reads_at_once_arrives_in_full() -> Result<()> {
    const MESSAGES: usize = 300;

    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.confirm().await?;
    let large = vec![7; 10_000];
    for _ in 0..MESSAGES {
        client.publish("", &queue, &large, Default::default()).await?;
    }
    let mut consumer = client.consume(&queue, "").await?;
    for _ in 0..MESSAGES {
        let delivery = next(&mut consumer).await?;
        assert_eq!(delivery.data.len(), large.len());
        delivery.ack(BasicAckOptions::default()).await?;
    }
    let is_empty = async || (client.counts(&queue).await.ok() == Some((0, 1))).then_some(());
    assert!(poll(PATIENCE, is_empty).await.is_some());
    Ok(())
}
