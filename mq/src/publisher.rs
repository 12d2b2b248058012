//! Publishes messages again. Each one is confirmed before its original is acknowledged.
//!
//! The publisher has its own connection, because a broker that is short of memory or disk stops reading from
//! connections that publish, and would then not read the acknowledgements on them.

use anyhow::{Context, bail};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use proto::{
    broker::{self, Backoff, Server},
    topology::Topology,
};
use std::{
    pin::pin,
    time::{Duration, Instant},
};
use telemetry::{amqp::Broker, semconv};
use tokio::{sync::Mutex, time::timeout};

/// The name of the connection on the broker.
const CLIENT_ID: &str = "mq-publisher";

/// How long the broker may take to confirm a message.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Publishes to the queues of a topology.
pub struct Publisher {
    broker: Broker,
    server: Server,
    topology: Topology,
    retry_delays: Vec<Duration>,
    /// The session is opened with the first message, and anew after a failure.
    session: Mutex<Option<Session>>,
}

struct Session {
    connection: Connection,
    channel: Channel,
}

impl Publisher {
    /// Makes a publisher, which opens no connection yet.
    pub fn new(server: Server, topology: Topology, retry_delays: Vec<Duration>) -> Self {
        let broker = Broker::new(&server.uri, CLIENT_ID);
        Self { broker, server, topology, retry_delays, session: Mutex::default() }
    }

    /// Publishes a message again and again until the broker has confirmed it. The broker may then have it
    /// more than once.
    pub async fn publish_until_confirmed(&self, queue: &str, properties: &BasicProperties, body: &[u8]) {
        let mut backoff = Backoff::new();
        let mut was_told = false;
        while let Err(error) = self.publish("", queue, properties.clone(), body).await {
            // This is logged once, not for every attempt.
            if !std::mem::replace(&mut was_told, true) {
                tracing::warn!(queue, "can't publish a message; still trying: {error:#}");
            }
            backoff.pause().await;
        }
    }

    /// Publishes a message; returns once the broker has confirmed it.
    ///
    /// # Errors
    /// If the broker did not confirm it. The broker may have the message nevertheless.
    pub async fn publish(
        &self,
        exchange: &str,
        routing_key: &str,
        properties: BasicProperties,
        body: &[u8],
    ) -> anyhow::Result<()> {
        // Only one message is published at a time. With several under way, lapin may take the return of one
        // for that of another, and a message that no queue took would count as confirmed.
        let mut current = self.session.lock().await;
        // Take the session. After a failure, the next message opens another one, which declares again what
        // may have been deleted.
        let session = match current.take() {
            Some(session) => session,
            None => self.open().await?,
        };
        let started = Instant::now();
        let published = session.publish(exchange, routing_key, properties, body).await;
        self.broker.sent(
            (exchange, routing_key),
            1,
            started,
            published.as_ref().err().map(|_| semconv::OTHER),
        );
        published?;
        *current = Some(session);
        Ok(())
    }

    /// Closes the connection in an orderly way.
    pub async fn close(&self) {
        if let Some(session) = self.session.lock().await.take() {
            broker::close(&session.connection).await;
        }
    }

    async fn open(&self) -> lapin::Result<Session> {
        let connection = broker::connect(&self.server, CLIENT_ID).await?;
        let channel = broker::open_channel(&connection).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        self.topology.declare(&channel).await?;
        self.topology.declare_retry_queues(&channel, &self.retry_delays).await?;
        Ok(Session { connection, channel })
    }
}

impl Session {
    async fn publish(
        &self,
        exchange: &str,
        routing_key: &str,
        properties: BasicProperties,
        body: &[u8],
    ) -> anyhow::Result<()> {
        // Without `mandatory`, the broker would drop a message that no queue takes.
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let confirmed = async {
            let sent =
                self.channel.basic_publish(exchange.into(), routing_key.into(), options, body, properties);
            sent.await?.await
        };
        let mut confirmed = pin!(confirmed);
        let confirmation = loop {
            match timeout(CONFIRM_TIMEOUT, &mut confirmed).await {
                Ok(confirmation) => break confirmation?,
                // The message is on its way, and the broker will take it when it takes messages again.
                // Publishing it on another connection would only duplicate it.
                Err(_) if self.connection.status().blocked() => {}
                Err(elapsed) => return Err(elapsed).context("waiting for the broker's confirm"),
            }
        };
        match confirmation {
            Confirmation::Ack(None) => Ok(()),
            // The broker returns an unroutable message, and then acknowledges it nevertheless.
            Confirmation::Ack(Some(_)) => bail!("the message was returned as unroutable"),
            Confirmation::Nack(_) | Confirmation::NotRequested => bail!("the broker refused the message"),
        }
    }
}
