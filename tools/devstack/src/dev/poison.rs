//! A message that mq can't read, for the button `poison`.

use amqp::connection;
use anyhow::{Context, Result, ensure};
use lapin::{
    BasicProperties, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use proto::topology::{EXCHANGE, ROUTING_KEY};
use std::env;
use uuid::Uuid;

/// Publishes the message as api would publish a login; returns the trace id in the message's headers.
///
/// # Errors
/// If the broker can't be reached, or refuses the message.
pub async fn publish(amqp_url: &str) -> Result<String> {
    let server = connection::parse_url(amqp_url).map_err(anyhow::Error::msg)?;
    let connection = connection::connect(&server, "cargo dev").await.context("the broker does not answer")?;
    let channel = connection::open_channel(&connection).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let trace_id = Uuid::new_v4().simple().to_string();
    let traceparent = format!("00-{trace_id}-{:016x}-01", 1);
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    let message_id = Uuid::new_v4().to_string();
    let properties = BasicProperties::default().with_message_id(message_id.into()).with_headers(headers);
    let exchange = format!("{}{EXCHANGE}", env::var("AMQP_PREFIX").unwrap_or_default());
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let body = b"not a login";
    let published =
        channel.basic_publish(exchange.into(), ROUTING_KEY.into(), options, body, properties).await?.await?;
    connection::close(&connection).await;
    ensure!(published == Confirmation::Ack(None), "the broker did not accept the message");
    Ok(trace_id)
}
