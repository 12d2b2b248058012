//! Publishes messages again. The broker confirms each copy before mq acknowledges the original.
//!
//! The forwarder has its own connection, because a broker that is short of memory or disk stops reading from
//! connections that publish. On a shared connection, it would then not read mq's acknowledgements.

use amqp::{Backoff, Failures, IfBlocked, OpenError, Server, Session, Topology, Unconfirmed};
use lapin::BasicProperties;
use std::time::{Duration, Instant};
use telemetry::amqp::Broker;
use tokio::sync::Mutex;

/// The name of the connection on the broker.
const CLIENT_ID: &str = "mq-publisher";

/// How long the broker may take to confirm a message.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Publishes to the queues of a topology.
pub struct Forwarder {
    broker: Broker,
    server: Server,
    topology: Topology,
    retry_delays: Vec<Duration>,
    /// The session, which is opened for the first message, and opened again after a failure.
    session: Mutex<Option<Session>>,
    /// The refused declarations, which are logged once for all messages.
    failures: Mutex<Failures>,
}

impl Forwarder {
    /// Makes a forwarder, which opens no connection yet.
    pub fn new(server: Server, topology: Topology, retry_delays: Vec<Duration>) -> Self {
        let broker = Broker::of_hosts(&server.hosts, server.current.clone(), CLIENT_ID);
        Self { broker, server, topology, retry_delays, session: Mutex::default(), failures: Mutex::default() }
    }

    /// Returns the longest frame in bytes, as the last connection negotiated it.
    pub fn frame_max(&self) -> usize {
        self.server.frame_max()
    }

    /// Publishes a message again and again until the broker has confirmed it. So the queue may hold several
    /// copies of the message.
    pub async fn publish_until_confirmed(&self, queue: &str, properties: &BasicProperties, body: &[u8]) {
        let mut backoff = Backoff::new();
        let mut was_told = false;
        while let Err(error) = self.publish(queue, properties.clone(), body).await {
            if let Some(error @ OpenError::Refused(_)) = error.downcast_ref() {
                self.failures.lock().await.log(&self.server, error);
            } else if !std::mem::replace(&mut was_told, true) {
                // This is logged once, not for every attempt.
                let why = telemetry::causes(&*error);
                tracing::warn!(queue, "can't publish a message; still trying: {why}");
            }
            backoff.pause().await;
        }
    }

    /// Publishes a message to a queue. Returns once the broker has confirmed the message.
    ///
    /// # Errors
    /// If the broker did not confirm the message. The broker may have the message nevertheless.
    pub async fn publish(&self, queue: &str, properties: BasicProperties, body: &[u8]) -> anyhow::Result<()> {
        // Only one message is published at a time. With several unconfirmed messages, lapin may mistake the
        // return of one message for the return of another, and a message that no queue took would count as
        // confirmed.
        let mut current = self.session.lock().await;
        // Take the session, so that it is gone if publishing fails. The next message then opens another
        // session, which declares the queues again, because they may have been deleted.
        let mut session = match current.take() {
            Some(session) => session,
            None => Session::open(&self.server, CLIENT_ID, &self.topology, &self.retry_delays).await?,
        };
        let started = Instant::now();
        let message = std::iter::once((properties, body));
        let published = session.publish(queue, message, CONFIRM_TIMEOUT, IfBlocked::Wait).await;
        self.broker.sent(("", queue), 1, started, published.err().map(Unconfirmed::reason));
        published?;
        *current = Some(session);
        Ok(())
    }

    /// Closes the connection in an orderly way.
    pub async fn close(&self) {
        if let Some(session) = self.session.lock().await.take() {
            session.close().await;
        }
    }
}
