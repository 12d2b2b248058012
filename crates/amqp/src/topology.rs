//! A work queue with its exchange, its dead letters and its delayed retries. Whichever side comes first declares
//! them, so that no message is lost because a consumer was not there yet.

use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;

/// The names of an exchange and its queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// The direct exchange that producers publish to.
    pub exchange: String,
    /// The routing key of the messages.
    pub routing_key: String,
    /// The durable queue that consumers share.
    pub queue: String,
    /// The durable queue of messages that were given up, each with its reason in a header.
    pub dead_letter_queue: String,
}

impl Topology {
    /// The names, with `prefix` in front of all but the routing key, so that deployments can share a broker.
    pub fn new(prefix: &str, exchange: &str, routing_key: &str, queue: &str) -> Self {
        Self {
            exchange: format!("{prefix}{exchange}"),
            routing_key: routing_key.to_owned(),
            queue: format!("{prefix}{queue}"),
            dead_letter_queue: format!("{prefix}{queue}.dead"),
        }
    }

    /// Returns the name of the durable queue in which a message waits for its next attempt. The delay is in
    /// the name, because a queue that exists can't be given another delay.
    pub fn retry_queue(&self, delay: Duration) -> String {
        format!("{}.retry.{}", self.queue, humantime::format_duration(delay).to_string().replace(' ', ""))
    }

    /// Declares the queues for these delays. Nobody consumes them, and a message whose delay is over goes
    /// back to the main queue. Each delay has its own queue, because only the first message of a queue
    /// expires.
    ///
    /// # Errors
    /// As for [`Topology::declare`].
    pub async fn declare_retry_queues(&self, channel: &Channel, delays: &[Duration]) -> lapin::Result<()> {
        for delay in delays {
            let milliseconds = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
            let mut arguments = FieldTable::default();
            arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(milliseconds));
            // This is the default exchange, whose bindings nobody can delete.
            arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("".into()));
            let back = AMQPValue::LongString(self.queue.as_str().into());
            arguments.insert("x-dead-letter-routing-key".into(), back);
            let queue = self.retry_queue(*delay);
            channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments).await?;
        }
        Ok(())
    }

    /// Declares everything but the retry queues. Declaring what exists already changes nothing.
    ///
    /// # Errors
    /// If the connection is lost, or if the broker holds one of the names with other properties
    /// (406 PRECONDITION_FAILED).
    pub async fn declare(&self, channel: &Channel) -> lapin::Result<()> {
        let exchange = self.exchange.as_str();
        channel
            .exchange_declare(
                exchange.into(),
                ExchangeKind::Direct,
                ExchangeDeclareOptions { durable: true, ..Default::default() },
                FieldTable::default(),
            )
            .await?;
        for queue in [&self.queue, &self.dead_letter_queue] {
            channel
                .queue_declare(queue.as_str().into(), QueueDeclareOptions::durable(), FieldTable::default())
                .await?;
        }
        channel
            .queue_bind(
                self.queue.as_str().into(),
                exchange.into(),
                self.routing_key.as_str().into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_queue_is_named_for_its_delay() {
        let topology = Topology::new("p.", "e", "k", "q");
        for (delay, name) in [(1_000, "1s"), (120_000, "2m"), (1_500, "1s500ms")] {
            let queue = topology.retry_queue(Duration::from_millis(delay));
            assert_eq!(queue, format!("p.q.retry.{name}"));
        }
    }
}
