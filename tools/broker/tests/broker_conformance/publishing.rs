//! Publishing: confirms, returned messages, and the messages that arrive.

use crate::client::{Client, body, long_string};
use amq_protocol::{
    frame::AMQPFrame,
    protocol::{AMQPClass, basic, confirm},
};
use anyhow::{Context, Result};
use broker::raw::{Raw, publish};
use lapin::{
    BasicProperties, Confirmation, ExchangeKind,
    options::{BasicPublishOptions, ExchangeDeclareOptions},
    types::{AMQPValue, FieldArray, FieldTable},
};
use loopback::PATIENCE;

#[tokio::test]
async fn a_message_arrives_as_it_was_published() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let queue = client.queue("q", &[]).await?;
    let mut array = FieldArray::default();
    array.push(AMQPValue::Boolean(true));
    array.push(long_string("two"));
    let mut inner = FieldTable::default();
    inner.insert("inner".into(), AMQPValue::LongLongInt(i64::MIN));
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("traceparent", long_string("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")),
        ("array", AMQPValue::FieldArray(array)),
        ("table", AMQPValue::FieldTable(inner)),
        ("int", AMQPValue::LongInt(-7)),
        ("double", AMQPValue::Double(0.5)),
        ("bytes", AMQPValue::LongString(b"\xff\x00"[..].into())),
        ("time", AMQPValue::Timestamp(1_700_000_000)),
        ("void", AMQPValue::Void),
    ] {
        headers.insert(name.into(), value);
    }
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("identity".into())
        .with_headers(headers)
        .with_delivery_mode(2)
        .with_priority(3)
        .with_correlation_id("correlation".into())
        .with_reply_to("reply".into())
        .with_expiration("60000".into())
        .with_message_id("message".into())
        .with_timestamp(1_700_000_001)
        .with_type("type".into())
        .with_user_id("guest".into())
        .with_app_id("app".into());
    client.publish("", &queue, b"\x00body\xff", properties.clone()).await?;
    let message = client.expect(&queue).await?;
    assert_eq!(message.properties, properties);
    assert_eq!(message.data, b"\x00body\xff");
    assert!(!message.redelivered);
    Ok(())
}

#[tokio::test]
async fn bodies_of_any_size_arrive_whole() -> Result<()> {
    let client = Client::connect().await?;
    client.confirm().await?;
    let queue = client.queue("q", &[]).await?;
    // Some of the sizes are near the limits of one frame and of two frames. The last size needs many frames.
    for size in [0, 1, 131_063, 131_064, 131_065, 262_128, 5_000_000] {
        let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        client.publish("", &queue, &sent, BasicProperties::default()).await?;
        let message = client.expect(&queue).await?;
        assert!(message.data == sent, "{size}: {}", message.data.len());
    }
    Ok(())
}

#[tokio::test]
async fn what_is_unroutable_and_mandatory_is_returned_and_then_confirmed() -> Result<()> {
    let client = Client::connect().await?;
    let mut raw = Raw::open(&client.url).await?;
    raw.method(1, AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: false }))).await?;
    raw.expect(|method| matches!(method, AMQPClass::Confirm(_))).await?;
    raw.publish(&client.name("nowhere"), b"back").await?;
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.push(match raw.next().await?.context("closed")? {
            AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Return(returned))) => {
                format!("return {} {} {}", returned.reply_code, returned.reply_text, returned.exchange)
            }
            AMQPFrame::Header(1, header) => format!("header {}", header.body_size),
            AMQPFrame::Body(1, body) => String::from_utf8(body)?,
            AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Ack(ack))) => {
                format!("ack {}", ack.delivery_tag)
            }
            AMQPFrame::Heartbeat => continue,
            other => format!("{other:?}"),
        });
    }
    assert_eq!(seen, ["return 312 NO_ROUTE ", "header 4", "back", "ack 1"]);
    Ok(())
}

#[tokio::test]
async fn every_one_of_many_messages_is_confirmed_some_of_them_together() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    client.confirm().await?;
    let mut confirms = Vec::new();
    for i in 0..500 {
        let body = i.to_string();
        let options = BasicPublishOptions::default();
        let properties = BasicProperties::default();
        confirms.push(
            client
                .channel
                .basic_publish("".into(), queue.as_str().into(), options, body.as_bytes(), properties)
                .await?,
        );
    }
    for confirm in confirms {
        assert_eq!(tokio::time::timeout(PATIENCE, confirm).await??, Confirmation::Ack(None));
    }
    for i in 0..500 {
        assert_eq!(body(&client.expect(&queue).await?), i.to_string());
    }
    Ok(())
}

#[tokio::test]
async fn confirms_cover_each_message_once_and_in_order() -> Result<()> {
    const MESSAGES: u64 = 200;

    let client = Client::connect().await?;
    let mut raw = Raw::open(&client.url).await?;
    raw.method(1, AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: true }))).await?;
    let missing = client.name("nowhere");
    let mut many = Vec::new();
    for _ in 0..MESSAGES {
        // The flag `mandatory` is cleared, so that the broker sends only confirms.
        let mut frames = publish(&missing, b"m");
        let flags = frames.iter().position(|byte| *byte == 0xce).context("an end mark")? - 1;
        frames[flags] = 0;
        many.extend(frames);
    }
    raw.send(&many).await?;
    let mut confirmed = 0;
    while confirmed < MESSAGES {
        match raw.next().await?.context("closed")? {
            AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Ack(ack))) => {
                assert!(ack.delivery_tag > confirmed, "{ack:?} after {confirmed}");
                assert!(ack.multiple || ack.delivery_tag == confirmed + 1, "{ack:?} after {confirmed}");
                confirmed = ack.delivery_tag;
            }
            AMQPFrame::Heartbeat => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(confirmed, MESSAGES);
    Ok(())
}

#[tokio::test]
async fn publishing_to_an_exchange_that_is_not_there_is_a_404() -> Result<()> {
    let client = Client::connect().await?;
    let missing = client.name("missing");
    client
        .expect_channel_error(404, async |channel| {
            channel.confirm_select(Default::default()).await?;
            let options = BasicPublishOptions::default();
            channel
                .basic_publish(missing.into(), "k".into(), options, b"m", BasicProperties::default())
                .await?
                .await
        })
        .await
}

#[tokio::test]
async fn publishing_to_an_internal_exchange_is_a_403() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    let name = client.name("x");
    let options =
        ExchangeDeclareOptions { durable: true, internal: true, auto_delete: true, ..Default::default() };
    client
        .channel
        .exchange_declare(name.as_str().into(), ExchangeKind::Direct, options, FieldTable::default())
        .await?;
    crate::client::bind(&client.channel, &queue, &name, "k").await?;
    client
        .expect_channel_error(403, async |channel| {
            channel.confirm_select(Default::default()).await?;
            let options = BasicPublishOptions::default();
            channel
                .basic_publish(name.into(), "k".into(), options, b"m", BasicProperties::default())
                .await?
                .await
        })
        .await
}

#[tokio::test]
async fn properties_that_can_not_be_true_are_a_406() -> Result<()> {
    let client = Client::connect().await?;
    let queue = client.queue("q", &[]).await?;
    for properties in [
        BasicProperties::default().with_user_id("somebody-else".into()),
        BasicProperties::default().with_expiration("soon".into()),
        BasicProperties::default().with_expiration("-1".into()),
    ] {
        client
            .expect_channel_error(406, async |channel| {
                channel.confirm_select(Default::default()).await?;
                let options = BasicPublishOptions::default();
                channel
                    .basic_publish("".into(), queue.as_str().into(), options, b"m", properties)
                    .await?
                    .await
            })
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn immediate_publishing_is_a_540_of_the_connection() -> Result<()> {
    let client = Client::connect().await?;
    client
        .expect_connection_error(540, async |channel| {
            channel.confirm_select(Default::default()).await?;
            let options = BasicPublishOptions { immediate: true, mandatory: false };
            channel
                .basic_publish("".into(), "k".into(), options, b"m", BasicProperties::default())
                .await?
                .await
        })
        .await
}
