//! The exchange and queues of the login message, declared by whichever side comes first, so that no
//! message is lost because a consumer was not there yet.

use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};

/// The names under which login messages travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// Direct exchange that `api` publishes to.
    pub exchange: String,
    /// Routing key of a login.
    pub routing_key: String,
    /// Durable queue that `mq` consumes.
    pub queue: String,
    /// Durable queue of messages that could not be read, each with its reason in a header.
    pub dead_letter_queue: String,
}

impl Topology {
    /// The names, each with `prefix` in front: deployments that share a broker differ in it.
    pub fn with_prefix(prefix: &str) -> Self {
        Self {
            exchange: format!("{prefix}usercenter"),
            routing_key: "user.login".to_owned(),
            queue: format!("{prefix}mq.user_login"),
            dead_letter_queue: format!("{prefix}mq.user_login.dead"),
        }
    }

    /// Declares all of it; declaring what exists already changes nothing.
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
