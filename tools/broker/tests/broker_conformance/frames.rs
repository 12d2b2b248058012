//! Frames that no client library would send.

use crate::client::Client;
use amq_protocol::{
    frame::{AMQPContentHeader, AMQPFrame},
    protocol::{AMQPClass, basic, channel, connection},
};
use anyhow::{Context, Result};
use broker::raw::{Raw, encoded, publish};
use loopback::PATIENCE;
use std::time::{Duration, Instant};

fn begin_publish() -> AMQPFrame {
    let publish = basic::Publish { routing_key: "k".into(), ..Default::default() };
    AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Publish(publish)))
}

fn header(class_id: u16, body_size: u64) -> AMQPFrame {
    AMQPFrame::Header(1, AMQPContentHeader { class_id, body_size, properties: Default::default() })
}

#[tokio::test]
async fn another_protocol_is_answered_with_the_right_one_and_the_end() -> Result<()> {
    let client = Client::connect().await?;
    const AMQP_0_9_1: &[u8] = b"AMQP\0\0\x09\x01";
    // RabbitMQ 4 prefers this protocol if the client's bytes do not name a version of AMQP.
    const AMQP_1_0_SASL: &[u8] = b"AMQP\x03\x01\0\0";

    for (hello, answers) in [
        (&b"AMQP\0\0\x09\x02"[..], &[AMQP_0_9_1][..]),
        (b"AMQP\x09\x09\x09\x09", &[AMQP_0_9_1, AMQP_1_0_SASL]),
        (b"GET / HTTP/1.1\r\n\r\n", &[AMQP_0_9_1, AMQP_1_0_SASL]),
    ] {
        let mut raw = Raw::connect(&client.url).await?;
        raw.send(hello).await?;
        let answer = raw.until_the_end().await?;
        assert!(answers.contains(&&answer[..]), "{hello:?} was answered with {answer:?}");
    }
    Ok(())
}

#[tokio::test]
async fn frames_that_are_out_of_order_end_the_connection_with_the_right_code() -> Result<()> {
    let client = Client::connect().await?;
    let open = AMQPFrame::Method(1, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})));
    let qos =
        |channel| AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::Qos(basic::Qos::default())));
    for (what, frames, code) in [
        ("a channel that is not open", vec![qos(2)], 504),
        ("a channel that is open already", vec![open], 504),
        ("a header without a method", vec![header(60, 1)], 505),
        ("a body without a header", vec![AMQPFrame::Body(1, b"m".to_vec())], 505),
        ("a body instead of a header", vec![begin_publish(), AMQPFrame::Body(1, b"m".to_vec())], 505),
        ("a method instead of a header", vec![begin_publish(), qos(1)], 505),
        ("a method instead of a body", vec![begin_publish(), header(60, 1), qos(1)], 505),
        ("a header of another class", vec![begin_publish(), header(10, 1)], 505),
        (
            "a method that is the server's",
            vec![AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::QosOk(basic::QosOk {})))],
            503,
        ),
    ] {
        let mut raw = Raw::open(&client.url).await?;
        for frame in frames {
            raw.frame(&frame).await?;
        }
        assert_eq!(raw.closed_with().await.context(what)?, code, "{what}");
    }
    Ok(())
}

#[tokio::test]
async fn bytes_that_are_no_frame_end_the_connection_with_501() -> Result<()> {
    let client = Client::connect().await?;
    let mut no_end = encoded(&AMQPFrame::Heartbeat);
    *no_end.last_mut().context("bytes")? = 0;
    for (what, bytes) in [
        ("a frame without its end mark", no_end),
        ("a frame of an unknown type", vec![9, 0, 1, 0, 0, 0, 0, 0xce]),
    ] {
        let mut raw = Raw::open(&client.url).await?;
        raw.send(&bytes).await?;
        assert_eq!(raw.closed_with().await.context(what)?, 501, "{what}");
    }
    Ok(())
}

#[tokio::test]
async fn a_frame_beyond_what_was_agreed_ends_the_connection_with_501() -> Result<()> {
    let client = Client::connect().await?;
    let mut raw = Raw::open(&client.url).await?;
    let mut large = vec![3, 0, 1];
    large.extend(140_000_u32.to_be_bytes());
    raw.send(&large).await?;
    raw.send(&[0; 4096]).await?;
    assert_eq!(raw.closed_with().await?, 501);
    Ok(())
}

#[tokio::test]
async fn a_negotiation_beyond_what_was_offered_is_refused() -> Result<()> {
    let client = Client::connect().await?;
    let fair = connection::TuneOk { channel_max: 2047, frame_max: 131_072, heartbeat: 0 };
    for tune_ok in [
        connection::TuneOk { frame_max: 0, ..fair },
        connection::TuneOk { frame_max: 131_073, ..fair },
        connection::TuneOk { frame_max: 100, ..fair },
        connection::TuneOk { channel_max: 2048, ..fair },
    ] {
        let mut raw = Raw::connect(&client.url).await?;
        raw.log_in(tune_ok.clone()).await?;
        // RabbitMQ may close the socket without sending `close`. Then only RabbitMQ's log has the reason.
        let code = raw.closed_with().await.unwrap_or(530);
        assert_eq!((code, raw.next().await?), (530, None), "{tune_ok:?}");
    }
    Ok(())
}

#[tokio::test]
async fn what_comes_in_small_pieces_is_understood() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.shared_queue("q").await?;
    let mut raw = Raw::open(&client.url).await?;
    for byte in publish(&queue, b"piece by piece") {
        raw.send(&[byte]).await?;
    }
    assert_eq!(crate::client::body(&client.expect(&queue).await?), "piece by piece");
    client.channel.queue_delete(queue.into(), Default::default()).await?;
    Ok(())
}

#[tokio::test]
async fn after_a_channel_error_frames_are_ignored_until_the_client_knows() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.shared_queue("q").await?;
    let mut raw = Raw::open(&client.url).await?;
    let missing = basic::Get { queue: client.name("missing").into(), no_ack: true };
    raw.method(1, AMQPClass::Basic(basic::AMQPMethod::Get(missing))).await?;
    raw.publish(&queue, b"too late").await?;
    let closed = raw.expect(|method| matches!(method, AMQPClass::Channel(_))).await?;
    let AMQPClass::Channel(channel::AMQPMethod::Close(close)) = closed else { panic!("{closed:?}") };
    assert_eq!((close.reply_code, close.class_id, close.method_id), (404, 60, 70));
    raw.method(1, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))).await?;
    raw.method(1, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}))).await?;
    raw.expect(|method| matches!(method, AMQPClass::Channel(channel::AMQPMethod::OpenOk(_)))).await?;
    raw.publish(&queue, b"in time").await?;
    assert_eq!(crate::client::body(&client.expect(&queue).await?), "in time");
    client.channel.queue_delete(queue.into(), Default::default()).await?;
    Ok(())
}

#[tokio::test]
async fn a_broker_gives_signs_of_life_and_cuts_a_client_that_gives_none() -> Result<()> {
    let client = Client::connect().await?;
    let mut raw = Raw::open_with_heartbeat(&client.url, 3).await?;
    let start = Instant::now();
    raw.frame(&AMQPFrame::Heartbeat).await?;
    let mut heartbeats = 0;
    while let Some(frame) = raw.next_within(PATIENCE).await? {
        heartbeats += usize::from(frame == AMQPFrame::Heartbeat);
        assert!(start.elapsed() < PATIENCE, "the connection is not cut");
    }
    assert!(heartbeats > 0);
    assert!(start.elapsed() > Duration::from_millis(4500), "{:?}", start.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_client_that_gives_signs_of_life_is_kept() -> Result<()> {
    let client = Client::connect().await?;
    let mut raw = Raw::open_with_heartbeat(&client.url, 4).await?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        raw.frame(&AMQPFrame::Heartbeat).await?;
        assert!(raw.next().await?.is_some(), "cut after {:?}", start.elapsed());
    }
    Ok(())
}
