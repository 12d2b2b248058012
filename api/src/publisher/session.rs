//! A connection to the broker, with a channel that is set up for publishing. A session is used until
//! something goes wrong. Then `dispatch` opens another one, which declares the topology again.

use super::{CLIENT_ID, Unconfirmed, message::Message};
use futures_util::{Stream, StreamExt, future::join_all};
use lapin::{
    Channel, Confirmation, Connection, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use proto::{broker, topology::Topology};
use std::{
    pin::Pin,
    time::{Duration, Instant, SystemTime},
};
use telemetry::amqp::Broker;
use tokio::{
    select,
    time::{sleep, timeout},
};

/// An open session.
pub struct Session {
    connection: Connection,
    channel: Channel,
    events: Events,
    broker: Broker,
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send>>;

impl Session {
    /// Connects, and declares the topology.
    pub async fn open(server: &broker::Server, topology: &Topology) -> lapin::Result<Self> {
        let connection = broker::connect(server, CLIENT_ID).await?;
        let events = Box::pin(connection.events_listener());
        let channel = broker::open_channel(&connection).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        topology.declare(&channel).await?;
        Ok(Self { connection, channel, events, broker: Broker::new(&server.uri, CLIENT_ID) })
    }

    /// Publishes messages in this order, and waits until all are confirmed. After an error, nobody knows
    /// which of them were published, and the session can't publish any more.
    pub async fn publish(
        &mut self,
        topology: &Topology,
        messages: impl ExactSizeIterator<Item = &Message>,
        limit: Duration,
    ) -> Result<(), Unconfirmed> {
        let Self { channel, events, .. } = self;
        let (started, count) = (Instant::now(), messages.len() as u64);
        let round = timeout(limit, publish_all(channel, topology, messages));
        let result = select! {
            confirmed = round => confirmed.unwrap_or(Err(Unconfirmed::Timeout)),
            why = trouble(events) => Err(why),
        };
        let destination = (topology.exchange.as_str(), topology.routing_key.as_str());
        self.broker.sent(destination, count, started, result.err().map(Unconfirmed::reason));
        result
    }

    /// Waits until this session can't be used any more.
    pub async fn trouble(&mut self) -> Unconfirmed {
        trouble(&mut self.events).await
    }

    /// Waits, after [`Unconfirmed::Blocked`], until the broker takes messages again, or the connection is
    /// gone.
    pub async fn unblocked(&mut self) {
        loop {
            select! {
                event = self.events.next() => match event {
                    Some(Event::ConnectionUnblocked | Event::Error(_)) | None => return,
                    Some(_) => {}
                },
                // If the broker closes the connection in an orderly way, there is no event, so the status is
                // checked.
                () = sleep(Duration::from_secs(1)) => if !self.connection.status().connected() {
                    return;
                },
            }
        }
    }

    /// Closes the connection in an orderly way, which may take at most a second.
    pub async fn close(self) {
        broker::close(&self.connection).await;
    }
}

async fn trouble(events: &mut Events) -> Unconfirmed {
    loop {
        match events.next().await {
            // lapin would hold back the message, and all messages after it, until the broker takes messages
            // again.
            Some(Event::ConnectionBlocked(_)) => return Unconfirmed::Blocked,
            Some(Event::Error(_)) | None => return Unconfirmed::ConnectionBroken,
            Some(_) => {}
        }
    }
}

async fn publish_all(
    channel: &Channel,
    topology: &Topology,
    messages: impl Iterator<Item = &Message>,
) -> Result<(), Unconfirmed> {
    // Each future sends its message when it is first polled, so the messages are sent in order.
    let confirmations = join_all(messages.map(|message| publish_one(channel, topology, message))).await;
    let mut result = Ok(());
    for confirmation in confirmations {
        match confirmation {
            Ok(Confirmation::Ack(None)) => {}
            // The broker returns an unroutable message, and then acknowledges it nevertheless. lapin attaches
            // the returned message to whichever acknowledgement comes next. That need not be its own, so
            // nobody knows which message was unroutable.
            Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))) => {
                return Err(Unconfirmed::Unroutable);
            }
            Ok(Confirmation::Nack(None) | Confirmation::NotRequested) => result = Err(Unconfirmed::Nacked),
            Err(error) => {
                tracing::debug!(%error, "publishing failed");
                result = Err(Unconfirmed::ConnectionBroken);
            }
        }
    }
    result
}

async fn publish_one(
    channel: &Channel,
    topology: &Topology,
    message: &Message,
) -> lapin::Result<Confirmation> {
    let (exchange, routing_key) = (topology.exchange.as_str(), topology.routing_key.as_str());
    // Without `mandatory`, the broker would drop a message that no queue takes.
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let properties = message.properties(SystemTime::now());
    channel
        .basic_publish(exchange.into(), routing_key.into(), options, message.body(), properties)
        .await?
        .await
}
