//! Hostile and broken clients connect to the embedded broker. The broker reports an error to each such client
//! or disconnects it. No other client is harmed.

use amq_protocol::{
    frame::{AMQPContentHeader, AMQPFrame},
    protocol::{AMQPClass, basic, channel, confirm, exchange, queue},
};
use anyhow::{Context, Result};
use broker::{
    Broker,
    raw::{Raw, encoded},
};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use loopback::{PATIENCE, poll};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// A well-behaved client, connected at the same time as the hostile clients.
struct Healthy {
    _connection: Connection,
    channel: Channel,
}

impl Healthy {
    async fn connect(broker: &Broker) -> Result<Self> {
        let connection = Connection::connect(&broker.url(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        declare(&channel, "healthy", &[]).await?;
        Ok(Self { _connection: connection, channel })
    }

    /// Publishes and gets a message on the connection that has been open since before the attack.
    async fn works(&self, after: &str) -> Result<()> {
        let works = async {
            publish(&self.channel, "", "healthy", after.as_bytes()).await?;
            let got = self.channel.basic_get("healthy".into(), BasicGetOptions { no_ack: true }).await?;
            assert_eq!(got.context("no message")?.data, after.as_bytes());
            Ok(())
        };
        timeout(PATIENCE, works).await.with_context(|| format!("after {after}"))?
    }
}

async fn declare(channel: &Channel, name: &str, arguments: &[(&str, AMQPValue)]) -> lapin::Result<u32> {
    let mut table = FieldTable::default();
    for (argument, value) in arguments {
        table.insert((*argument).into(), value.clone());
    }
    let queue = channel.queue_declare(name.into(), QueueDeclareOptions::durable(), table).await?;
    Ok(queue.message_count())
}

async fn publish(channel: &Channel, exchange: &str, key: &str, body: &[u8]) -> Result<()> {
    let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
    channel.basic_publish(exchange.into(), key.into(), options, body, properties).await?.await?;
    Ok(())
}

fn method(channel: u16, method: AMQPClass) -> Vec<u8> {
    encoded(&AMQPFrame::Method(channel, method))
}

fn open_channel(number: u16) -> Vec<u8> {
    method(number, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})))
}

fn begin_message(number: u16, body_size: u64) -> Vec<u8> {
    let publish = basic::Publish { routing_key: "healthy".into(), ..Default::default() };
    let header = AMQPContentHeader { class_id: 60, body_size, properties: BasicProperties::default() };
    [
        method(number, AMQPClass::Basic(basic::AMQPMethod::Publish(publish))),
        encoded(&AMQPFrame::Header(number, header)),
    ]
    .concat()
}

/// Connects, opens a channel, and sends `bytes`.
async fn attack(broker: &Broker, bytes: &[u8]) -> Result<Raw> {
    let mut raw = Raw::open(&broker.url()).await?;
    // The write may fail, because the broker may have closed the socket by now.
    let _ = raw.send(bytes).await;
    Ok(raw)
}

#[tokio::test(flavor = "multi_thread")]
async fn random_frames_harm_nobody() -> Result<()> {
    let broker = Broker::start().await?;
    let healthy = Healthy::connect(&broker).await?;
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let start = Instant::now();
    let mut attacks = 0;
    while start.elapsed() < Duration::from_secs(5) || attacks < 200 {
        let bytes: Vec<u8> = (0..random.usize(1..30)).flat_map(|_| frame(&mut random)).collect();
        let mut raw = attack(&broker, &bytes).await?;
        if random.bool() {
            // Some clients read an answer before they disconnect.
            let _ = raw.next_within(Duration::from_millis(20)).await;
        }
        drop(raw);
        attacks += 1;
        healthy.works(&format!("attack {attacks} of seed {seed}")).await?;
    }
    Ok(())
}

/// Makes a random frame, which is valid, almost valid, or garbage.
fn frame(random: &mut fastrand::Rng) -> Vec<u8> {
    let number = random.u16(0..4);
    let any =
        |random: &mut fastrand::Rng| ["", "healthy", "a", "amq.topic", "amq.fanout"][random.usize(0..5)];
    let mut bytes = match random.u32(0..16) {
        0 => open_channel(number),
        1 => method(number, AMQPClass::Channel(channel::AMQPMethod::Close(channel::Close::default()))),
        2 => method(number, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))),
        3 => {
            let declare = queue::Declare {
                queue: "a".into(),
                durable: random.bool(),
                exclusive: random.bool(),
                auto_delete: random.bool(),
                nowait: random.bool(),
                ..Default::default()
            };
            method(number, AMQPClass::Queue(queue::AMQPMethod::Declare(declare)))
        }
        4 => {
            let bind = queue::Bind {
                queue: any(random).into(),
                exchange: any(random).into(),
                routing_key: "#".into(),
                ..Default::default()
            };
            method(number, AMQPClass::Queue(queue::AMQPMethod::Bind(bind)))
        }
        5 => {
            let declare = exchange::Declare {
                exchange: any(random).into(),
                kind: "topic".into(),
                auto_delete: random.bool(),
                ..Default::default()
            };
            method(number, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare)))
        }
        6 => {
            let consume = basic::Consume {
                queue: "a".into(),
                no_ack: random.bool(),
                nowait: random.bool(),
                ..Default::default()
            };
            method(number, AMQPClass::Basic(basic::AMQPMethod::Consume(consume)))
        }
        7 => {
            let get = basic::Get { queue: "a".into(), no_ack: random.bool() };
            method(number, AMQPClass::Basic(basic::AMQPMethod::Get(get)))
        }
        8 => {
            let nack = basic::Nack {
                delivery_tag: random.u64(0..4),
                multiple: random.bool(),
                requeue: random.bool(),
            };
            method(number, AMQPClass::Basic(basic::AMQPMethod::Nack(nack)))
        }
        9 => method(number, AMQPClass::Basic(basic::AMQPMethod::Recover(basic::Recover { requeue: true }))),
        10 => method(
            number,
            AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: random.bool() })),
        ),
        11 => {
            let publish = basic::Publish {
                exchange: any(random).into(),
                routing_key: "a".into(),
                mandatory: random.bool(),
                immediate: false,
            };
            method(number, AMQPClass::Basic(basic::AMQPMethod::Publish(publish)))
        }
        12 => {
            let body_size = [0, 1, 5, 20_000_000, u64::MAX][random.usize(0..5)];
            let header = AMQPContentHeader {
                class_id: random.u16(60..62),
                body_size,
                properties: BasicProperties::default().with_expiration("0".into()),
            };
            encoded(&AMQPFrame::Header(number, header))
        }
        13 => encoded(&AMQPFrame::Body(number, vec![0; random.usize(0..10)])),
        14 => method(
            number,
            AMQPClass::Queue(queue::AMQPMethod::Delete(queue::Delete {
                queue: "a".into(),
                ..Default::default()
            })),
        ),
        _ => (0..random.usize(0..50)).map(|_| random.u8(..)).collect(),
    };
    if random.u32(0..20) == 0 && !bytes.is_empty() {
        let at = random.usize(0..bytes.len());
        bytes[at] = random.u8(..);
    }
    if random.u32(0..20) == 0 {
        bytes.truncate(random.usize(0..=bytes.len()));
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_16_mebibytes_is_refused() -> Result<()> {
    let broker = Broker::start().await?;
    let healthy = Healthy::connect(&broker).await?;
    let mut raw = attack(&broker, &begin_message(1, 16 * 1024 * 1024 + 1)).await?;
    let closed = raw.expect(|method| matches!(method, AMQPClass::Channel(_))).await?;
    let AMQPClass::Channel(channel::AMQPMethod::Close(close)) = closed else { panic!("{closed:?}") };
    assert_eq!(close.reply_code, 406);
    let largest = vec![7; 16 * 1024 * 1024];
    declare(&healthy.channel, "large", &[]).await?;
    publish(&healthy.channel, "", "large", &largest).await?;
    let got = healthy.channel.basic_get("large".into(), BasicGetOptions { no_ack: true }).await?;
    assert!(got.context("no message")?.data == largest);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_messages_that_are_begun_and_never_finished_end_the_connection() -> Result<()> {
    let broker = Broker::start().await?;
    let healthy = Healthy::connect(&broker).await?;
    let mut raw = attack(&broker, &[]).await?;
    let part = vec![0; 131_064];
    let begun = async {
        for number in 2..10 {
            raw.send(&open_channel(number)).await?;
            raw.send(&begin_message(number, 16 * 1024 * 1024)).await?;
            for _ in 0..60 {
                raw.frame(&AMQPFrame::Body(number, part.clone())).await?;
            }
        }
        anyhow::Ok(())
    };
    // The broker may close the connection while the test is still writing, so a write may fail.
    let _ = timeout(PATIENCE, begun).await?;
    assert_eq!(raw.closed_with().await?, 506);
    healthy.works("messages that are never finished").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_does_not_read_gets_no_more_than_fits() -> Result<()> {
    const MESSAGES: u32 = 800;

    let broker = Broker::start().await?;
    let healthy = Healthy::connect(&broker).await?;
    declare(&healthy.channel, "q", &[]).await?;
    let consume = basic::Consume { queue: "q".into(), no_ack: true, ..Default::default() };
    let consume = method(1, AMQPClass::Basic(basic::AMQPMethod::Consume(consume)));
    let mut raw = attack(&broker, &consume).await?;
    let body = vec![0; 50_000];
    for _ in 0..MESSAGES {
        publish(&healthy.channel, "", "q", &body).await?;
    }
    // The consumer has read nothing, so only as much of the 40 MB as fits into the sockets' buffers has left
    // the queue.
    let waiting = declare(&healthy.channel, "q", &[]).await?;
    assert!(waiting > MESSAGES / 2, "{waiting}");
    healthy.works("a consumer that does not read").await?;
    // When the consumer reads, it gets the remaining messages.
    let mut read = 0;
    while read < MESSAGES as usize * body.len() {
        if let AMQPFrame::Body(_, part) =
            raw.next().await?.with_context(|| format!("cut after {read} bytes"))?
        {
            read += part.len();
        }
    }
    let none = poll(PATIENCE, async || (declare(&healthy.channel, "q", &[]).await.ok()? == 0).then_some(()));
    none.await.context("messages are left")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_and_does_not_read_is_not_read_either() -> Result<()> {
    let broker = Broker::start().await?;
    let healthy = Healthy::connect(&broker).await?;
    declare(&healthy.channel, "q", &[]).await?;
    let mut raw = attack(&broker, &[]).await?;
    let ask =
        method(1, AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: "q".into(), no_ack: true })));
    let many = ask.repeat(1000);
    let mut sent = 0;
    let stuck = async {
        loop {
            raw.send(&many).await?;
            sent += many.len();
            anyhow::ensure!(sent < 200_000_000, "the broker never stops reading");
        }
    };
    let stuck: Result<Result<()>, _> = timeout(Duration::from_secs(2), stuck).await;
    assert!(stuck.is_err(), "{stuck:?}");
    healthy.works("a client that does not read").await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_introduce_himself_is_cut() -> Result<()> {
    let broker = Broker::start().await?;
    let mut raw = Raw::connect(&broker.url()).await?;
    raw.send(b"AMQP").await?;
    assert_eq!(raw.until_the_end().await?, b"");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_that_multiply_leave_others_their_turn() -> Result<()> {
    let broker = Broker::start().await?;
    let healthy = Healthy::connect(&broker).await?;
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    healthy
        .channel
        .exchange_declare("all".into(), ExchangeKind::Fanout, options, FieldTable::default())
        .await?;
    // Each queue dead-letters every message to all queues at once, so the copies multiply endlessly.
    for i in 0..16 {
        let name = format!("q{i}");
        let arguments = [
            ("x-message-ttl", AMQPValue::LongInt(0)),
            ("x-dead-letter-exchange", AMQPValue::LongString("all".into())),
        ];
        declare(&healthy.channel, &name, &arguments).await?;
        let bind = QueueBindOptions::default();
        healthy.channel.queue_bind(name.into(), "all".into(), "".into(), bind, FieldTable::default()).await?;
    }
    publish(&healthy.channel, "all", "", b"m").await?;
    for _ in 0..3 {
        healthy.works("dead letters").await?;
    }
    // Even when dead letters have filled the broker's memory, a client that publishes nothing can stop them.
    let other = Healthy::connect(&broker).await?;
    for i in 0..16 {
        let deleted = other.channel.queue_delete(format!("q{i}").into(), Default::default());
        timeout(PATIENCE, deleted).await??;
    }
    let settled = poll(PATIENCE, async || healthy.works("the end").await.is_ok().then_some(()));
    assert!(settled.await.is_some());
    Ok(())
}
