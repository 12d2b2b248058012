//! A client connection with the operations that most checks need.

use anyhow::{Context, Result};
use broker::Broker;
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer, Error, ErrorKind,
    ExchangeKind, Queue,
    message::Delivery,
    options::{
        BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use loopback::{PATIENCE, poll};
use std::{env, sync::Arc};
use tokio::time::timeout;
use uuid::Uuid;

/// A connection with a channel, and a prefix for names that no other check uses.
pub struct Client {
    pub connection: Connection,
    pub channel: Channel,
    pub url: String,
    prefix: String,
    _broker: Option<Arc<Broker>>,
}

impl Client {
    /// Connects to the broker at `AMQP_URL`, or to a new embedded broker.
    pub async fn connect() -> Result<Self> {
        let (url, broker) = match env::var("AMQP_URL") {
            Ok(url) => (url, None),
            Err(_) => {
                let broker = Broker::start().await?;
                (broker.url(), Some(Arc::new(broker)))
            }
        };
        let prefix = format!("conformance.{}.", Uuid::new_v4().simple());
        Self::connect_to(url, prefix, broker).await
    }

    /// Opens another connection to the same broker, with the same prefix for names.
    pub async fn another(&self) -> Result<Self> {
        Self::connect_to(self.url.clone(), self.prefix.clone(), self._broker.clone()).await
    }

    async fn connect_to(url: String, prefix: String, broker: Option<Arc<Broker>>) -> Result<Self> {
        let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok(Self { connection, channel, url, prefix, _broker: broker })
    }

    /// Returns a name that no other check uses.
    pub fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Declares a queue that is deleted with the connection.
    pub async fn queue(&self, name: &str, arguments: &[(&str, AMQPValue)]) -> Result<String> {
        let name = self.name(name);
        declare(&self.channel, &name, exclusive(), arguments).await?;
        Ok(name)
    }

    /// Declares a queue that outlives the connection, but expires after a minute without use.
    pub async fn shared_queue(&self, name: &str) -> Result<String> {
        let name = self.name(name);
        let arguments = [("x-expires", AMQPValue::LongInt(60_000))];
        declare(&self.channel, &name, QueueDeclareOptions::durable(), &arguments).await?;
        Ok(name)
    }

    /// Declares an exchange that is deleted with its last binding, and binds a queue to it with these keys.
    pub async fn exchange(
        &self,
        name: &str,
        kind: ExchangeKind,
        queue: &str,
        keys: &[&str],
    ) -> Result<String> {
        let name = self.name(name);
        let options = ExchangeDeclareOptions { durable: true, auto_delete: true, ..Default::default() };
        self.channel.exchange_declare(name.as_str().into(), kind, options, FieldTable::default()).await?;
        for key in keys {
            bind(&self.channel, queue, &name, key).await?;
        }
        Ok(name)
    }

    /// Puts the channel into confirm mode.
    pub async fn confirm(&self) -> Result<()> {
        Ok(self.channel.confirm_select(ConfirmSelectOptions::default()).await?)
    }

    /// Publishes a message, and waits for its confirm if the channel is in confirm mode.
    pub async fn publish(
        &self,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<Confirmation> {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let sent = self.channel.basic_publish(exchange.into(), key.into(), options, body, properties).await?;
        Ok(timeout(PATIENCE, sent).await??)
    }

    /// Publishes these bodies to a queue, and waits until the broker has confirmed them.
    pub async fn fill(&self, queue: &str, bodies: &[&str]) -> Result<()> {
        let channel = self.connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        for body in bodies {
            let options = BasicPublishOptions::default();
            let sent = channel.basic_publish(
                "".into(),
                queue.into(),
                options,
                body.as_bytes(),
                BasicProperties::default(),
            );
            assert_eq!(sent.await?.await?, Confirmation::Ack(None));
        }
        Ok(channel.close(200, "done".into()).await?)
    }

    /// Gets a message if one is waiting.
    pub async fn get(&self, queue: &str) -> Result<Option<Delivery>> {
        let got = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: false }).await?;
        Ok(got.map(|got| got.delivery))
    }

    /// Gets a message, and waits for it if necessary.
    pub async fn expect(&self, queue: &str) -> Result<Delivery> {
        poll(PATIENCE, async || self.get(queue).await.ok().flatten()).await.context("no message")
    }

    /// Starts a consumer.
    pub async fn consume(&self, queue: &str, tag: &str) -> Result<Consumer> {
        let options = BasicConsumeOptions::default();
        Ok(self.channel.basic_consume(queue.into(), tag.into(), options, FieldTable::default()).await?)
    }

    /// Returns the queue's numbers of waiting messages and of consumers.
    pub async fn counts(&self, queue: &str) -> Result<(u32, u32)> {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let channel = self.connection.create_channel().await?;
        let queue = channel.queue_declare(queue.into(), passive, FieldTable::default()).await?;
        channel.close(200, "done".into()).await?;
        Ok((queue.message_count(), queue.consumer_count()))
    }

    /// Waits until a queue has these numbers of waiting messages and of consumers.
    pub async fn expect_counts(&self, queue: &str, expected: (u32, u32)) {
        let is_so = async || (self.counts(queue).await.ok() == Some(expected)).then_some(());
        assert!(poll(PATIENCE, is_so).await.is_some(), "{:?} and not {expected:?}", self.counts(queue).await);
    }

    /// Returns whether the queue exists.
    pub async fn has_queue(&self, queue: &str) -> Result<bool> {
        let channel = self.connection.create_channel().await?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = channel.queue_declare(queue.into(), passive, FieldTable::default()).await;
        Ok(declared.map(drop).map_err(|error| code(&error)) != Err(404))
    }

    /// Asserts that the operation closes its channel with this code, and leaves the connection open.
    pub async fn expect_channel_error<T: std::fmt::Debug>(
        &self,
        expected: u16,
        operation: impl AsyncFnOnce(Channel) -> lapin::Result<T>,
    ) -> Result<()> {
        let channel = self.connection.create_channel().await?;
        let error = operation(channel).await.expect_err("an error");
        assert_eq!(code(&error), expected, "{error}");
        self.connection.create_channel().await?.close(200, "lives".into()).await?;
        Ok(())
    }

    /// Opens a connection, and asserts that the operation closes this connection with this code.
    pub async fn expect_connection_error<T: std::fmt::Debug>(
        &self,
        expected: u16,
        operation: impl AsyncFnOnce(Channel) -> lapin::Result<T>,
    ) -> Result<()> {
        let other = self.another().await?;
        let error = operation(other.channel.clone()).await.expect_err("an error");
        assert_eq!(code(&error), expected, "{error}");
        let closed = poll(PATIENCE, async || (!other.connection.status().connected()).then_some(())).await;
        assert!(closed.is_some(), "the connection is still open");
        Ok(())
    }
}

/// Returns the options of a queue that is deleted with the connection.
pub fn exclusive() -> QueueDeclareOptions {
    QueueDeclareOptions { exclusive: true, ..Default::default() }
}

pub fn table(arguments: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    table
}

pub async fn declare(
    channel: &Channel,
    name: &str,
    options: QueueDeclareOptions,
    arguments: &[(&str, AMQPValue)],
) -> lapin::Result<Queue> {
    channel.queue_declare(name.into(), options, table(arguments)).await
}

pub async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()).await
}

/// Waits for the next delivery.
pub async fn next(consumer: &mut Consumer) -> Result<Delivery> {
    let next = timeout(PATIENCE, consumer.next()).await.context("no delivery")?;
    Ok(next.context("the consumer was cancelled")??)
}

/// Returns the body as text.
pub fn body(delivery: &Delivery) -> &str {
    std::str::from_utf8(&delivery.data).expect("text")
}

/// Returns the AMQP reply code of an error.
pub fn code(error: &Error) -> u16 {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_id(),
        other => panic!("{other:?}"),
    }
}

pub fn long_string(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}
