//! A work queue with its exchange, its dead letters and its delayed retries. The producer or the consumer,
//! whichever starts first, declares all of this, so that no message is lost because no consumer has started
//! yet.

use crate::{connection::open_channel, opening::OpenError};
use clap::ValueEnum;
use lapin::{
    Channel, Connection, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;

/// How many times a quorum queue may redeliver a message. By default, RabbitMQ 4 drops a message after 20
/// redeliveries, although a redelivery after a cut connection is not the message's fault. The value -1 means
/// "without a limit" only in RabbitMQ 4. With -1, RabbitMQ 3.10 drops a message when it is first returned.
/// Therefore, this limit is a very high number.
const DELIVERY_LIMIT: i32 = 1_000_000_000;

/// The type of all queues (`x-queue-type`). The services always declare the type, because the default of the
/// virtual host may be either type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QueueType {
    /// The queue is replicated if the broker is a cluster. A retry queue keeps each message until the main
    /// queue has it.
    Quorum,
    /// The queue is on one node. A retry queue passes each message on once, even if the main queue does not
    /// exist.
    Classic,
}

/// The names of an exchange and its queues, and the type of the queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// The direct exchange that other producers publish to. The services here publish directly to the queue.
    pub exchange: String,
    /// The routing key of other producers' messages.
    pub routing_key: String,
    /// The durable queue that consumers share.
    pub queue: String,
    /// The durable queue of dead letters, that is, messages that were given up, each with its reason in a
    /// header.
    pub dead_letter_queue: String,
    /// The type of all queues.
    pub queue_type: QueueType,
}

impl Topology {
    /// Makes the names. All names except the routing key start with `prefix`, so that deployments can share a
    /// broker.
    pub fn new(prefix: &str, exchange: &str, routing_key: &str, queue: &str, queue_type: QueueType) -> Self {
        Self {
            exchange: format!("{prefix}{exchange}"),
            routing_key: routing_key.to_owned(),
            queue: format!("{prefix}{queue}"),
            dead_letter_queue: format!("{prefix}{queue}.dead"),
            queue_type,
        }
    }

    /// Returns the name of the durable queue in which a message waits for its next attempt. The delay is in
    /// the name, because a queue that exists can't be given another delay.
    pub fn retry_queue(&self, delay: Duration) -> String {
        format!("{}.retry.{}", self.queue, humantime::format_duration(delay).to_string().replace(' ', ""))
    }

    /// Declares the queues, with a retry queue for each of these delays. Declaring a queue that already
    /// exists changes nothing.
    ///
    /// # Errors
    /// If the connection is lost, or if the broker refuses a queue, for example because the queue already
    /// exists with another type.
    pub async fn declare(&self, channel: &Channel, retry_delays: &[Duration]) -> Result<(), OpenError> {
        // The dead-letter queue comes first, because the main queue may send messages to it.
        self.declare_queue(channel, &self.dead_letter_queue, self.arguments(None)).await?;
        // The main queue itself makes a dead letter only of a message that a consumer or an operator's policy
        // drops. A classic main queue has no arguments for dead letters, as in earlier versions, because the
        // arguments of an existing queue can't be changed.
        let dead_letters = Some(&self.dead_letter_queue).filter(|_| self.queue_type == QueueType::Quorum);
        self.declare_queue(channel, &self.queue, self.arguments(dead_letters)).await?;
        for delay in retry_delays {
            // Nobody consumes a retry queue, and a message whose delay is over goes back to the main queue.
            // Each delay has its own queue, because a message expires only when it is the first in its queue.
            let mut arguments = self.arguments(Some(&self.queue));
            let milliseconds = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
            arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(milliseconds));
            self.declare_queue(channel, &self.retry_queue(*delay), arguments).await?;
        }
        Ok(())
    }

    /// Returns the arguments of a queue whose dead letters go to the queue `dead_letters`.
    fn arguments(&self, dead_letters: Option<&String>) -> FieldTable {
        let text = |text: &str| AMQPValue::LongString(text.into());
        let mut arguments = FieldTable::default();
        let mut set = |name: &str, value| {
            arguments.insert(name.into(), value);
        };
        match self.queue_type {
            QueueType::Classic => set("x-queue-type", text("classic")),
            QueueType::Quorum => {
                set("x-queue-type", text("quorum"));
                set("x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT));
                // If a policy limits the queue's length and the queue is full, the publisher gets a nack, and
                // keeps the message. Without this argument, RabbitMQ would send each dead letter at most
                // once.
                set("x-overflow", text("reject-publish"));
            }
        }
        if let Some(queue) = dead_letters {
            // This is the default exchange, whose bindings nobody can delete.
            set("x-dead-letter-exchange", text(""));
            set("x-dead-letter-routing-key", text(queue));
            if self.queue_type == QueueType::Quorum {
                set("x-dead-letter-strategy", text("at-least-once"));
            }
        }
        arguments
    }

    async fn declare_queue(
        &self,
        channel: &Channel,
        queue: &str,
        arguments: FieldTable,
    ) -> Result<(), OpenError> {
        let expected = arguments.clone();
        let declared = channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments).await;
        declared.map(drop).map_err(|error| OpenError::of_declaring("queue", queue, &expected, error))
    }

    /// Returns whether the exchange still exists, and whether [`Topology::bind`] has bound the current main
    /// queue.
    ///
    /// # Errors
    /// If the connection is lost.
    pub async fn is_bound(&self, connection: &Connection) -> Result<bool, OpenError> {
        // This needs a separate channel, because the broker closes the channel if an exchange is missing.
        let channel = open_channel(connection).await?;
        let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
        for exchange in [&self.exchange, &self.binding_mark()] {
            let (exchange, none) = (exchange.as_str().into(), FieldTable::default());
            match channel.exchange_declare(exchange, ExchangeKind::Direct, passive, none).await {
                Ok(()) => {}
                Err(error) if error.is_amqp_soft_error() => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(channel.close(200, "done".into()).await.map(|()| true)?)
    }

    /// Declares the exchange.
    ///
    /// # Errors
    /// If the connection is lost, or if the broker refuses the exchange, for example because it already
    /// exists with another type.
    pub async fn declare_exchange(&self, channel: &Channel) -> Result<(), OpenError> {
        let exchange = self.exchange.as_str();
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let none = FieldTable::default();
        let declared =
            channel.exchange_declare(exchange.into(), ExchangeKind::Direct, options, none.clone()).await;
        declared.map_err(|error| OpenError::of_declaring("exchange", exchange, &none, error))
    }

    /// Declares the exchange, and binds the main queue to it. Then marks the queue as bound.
    ///
    /// # Errors
    /// As for [`Topology::declare_exchange`].
    pub async fn bind(&self, channel: &Channel) -> Result<(), OpenError> {
        self.declare_exchange(channel).await?;
        self.bind_to(channel, &self.exchange, &self.routing_key).await?;
        let (mark, none) = (self.binding_mark(), FieldTable::default());
        // Nobody can publish to an internal exchange.
        let options =
            ExchangeDeclareOptions { durable: true, auto_delete: true, internal: true, ..Default::default() };
        let declared =
            channel.exchange_declare(mark.as_str().into(), ExchangeKind::Fanout, options, none.clone()).await;
        declared.map_err(|error| OpenError::of_declaring("exchange", &mark, &none, error))?;
        self.bind_to(channel, &mark, "").await
    }

    /// Returns the name of the exchange that marks the queue as bound. In AMQP, a client can't ask whether a
    /// binding exists. But when anybody deletes the queue, the broker also deletes this exchange
    /// (`auto-delete`), because no other queue is bound to it.
    fn binding_mark(&self) -> String {
        format!("{}.bound", self.queue)
    }

    async fn bind_to(&self, channel: &Channel, exchange: &str, routing_key: &str) -> Result<(), OpenError> {
        let (queue, options) = (self.queue.as_str().into(), QueueBindOptions::default());
        let none = FieldTable::default();
        Ok(channel.queue_bind(queue, exchange.into(), routing_key.into(), options, none).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_queue_is_named_for_its_delay() {
        let topology = Topology::new("p.", "e", "k", "q", QueueType::Quorum);
        for (delay, name) in [(1_000, "1s"), (120_000, "2m"), (1_500, "1s500ms")] {
            let queue = topology.retry_queue(Duration::from_millis(delay));
            assert_eq!(queue, format!("p.q.retry.{name}"));
        }
    }
}
