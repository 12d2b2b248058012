//! A connection to the broker with one channel, for publishing with confirms.
//!
//! A session is used until its first error. After an error, nobody knows which of the session's messages the
//! broker has. So the caller drops the session, opens a new one, which declares the queues again, and
//! publishes all unconfirmed messages again.

use crate::{
    connection::{self, Server},
    opening::{self, OpenError},
    properties,
    topology::Topology,
};
use futures_util::{Stream, StreamExt, future::join_all};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ErrorKind, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
};
use std::{
    pin::{Pin, pin},
    time::Duration,
};
use tokio::{select, time::sleep};

/// An open session.
pub struct Session {
    connection: Connection,
    channel: Channel,
    events: Events,
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send>>;

/// Why messages are not confirmed. The broker may have received them nevertheless.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unconfirmed {
    /// The broker is short of memory or disk, and is not taking messages (`connection.blocked`).
    #[error("the broker is not taking messages at the moment")]
    Blocked,
    /// The broker did not confirm in time.
    #[error("the broker did not confirm in time")]
    Timeout,
    /// The broker refused a message (`basic.nack`).
    #[error("the broker refused the message")]
    Nacked,
    /// The broker closed the channel or the connection because of a message, and would do so again.
    #[error("the broker does not accept the message")]
    NotAccepted,
    /// The queue is missing (`basic.return`).
    #[error("the queue is missing")]
    Unroutable,
    /// The connection or the channel broke.
    #[error("the connection to the broker broke")]
    ConnectionBroken,
}

impl Unconfirmed {
    /// Returns a short name of bounded cardinality, for spans and metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Blocked => "blocked",
            Self::Timeout => "timeout",
            Self::Nacked => "nacked",
            Self::NotAccepted => "not_accepted",
            Self::Unroutable => "unroutable",
            Self::ConnectionBroken => "connection_broken",
        }
    }
}

/// What publishing does while the broker is not taking messages (`connection.blocked`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfBlocked {
    /// Publishing fails at once, because the caller keeps its messages elsewhere.
    Fail,
    /// Publishing waits. When the broker takes messages again, it will also take those that were already
    /// sent, so publishing them on another connection would only duplicate them.
    Wait,
}

impl Session {
    /// Connects under a name that the broker shows. Then asks for confirms, and declares the queues of
    /// `topology`, with a retry queue for each of these delays.
    ///
    /// # Errors
    /// As for [`opening::open`].
    pub async fn open(
        server: &Server,
        name: &'static str,
        topology: &Topology,
        retry_delays: &[Duration],
    ) -> Result<Self, OpenError> {
        opening::open(server, async {
            let connection = connection::connect(server, name).await?;
            let events = Box::pin(connection.events_listener());
            let channel = connection::open_channel(&connection).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            topology.declare(&channel, retry_delays).await?;
            Ok(Self { connection, channel, events })
        })
        .await
    }

    /// Publishes messages to a queue in this order, and waits for at most `limit` until all are confirmed.
    /// Headers that don't fit into a frame are left out ([`properties::fit`]).
    ///
    /// The messages go through the default exchange. With any other exchange, a confirm would only mean that
    /// some queue has the message, and that queue may belong to somebody else.
    ///
    /// # Errors
    /// If a message is not confirmed. After that, the session can't be used any more.
    pub async fn publish<B: AsRef<[u8]>>(
        &mut self,
        queue: &str,
        messages: impl Iterator<Item = (BasicProperties, B)>,
        limit: Duration,
        if_blocked: IfBlocked,
    ) -> Result<(), Unconfirmed> {
        let Self { connection, channel, events } = self;
        let frame_max = connection.configuration().frame_max() as usize;
        let publish_one = async |(properties, body): (BasicProperties, B)| {
            // Without `mandatory`, a message whose queue is missing would vanish.
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let properties = properties::fit(properties, &[], frame_max);
            channel.basic_publish("".into(), queue.into(), options, body.as_ref(), properties).await?.await
        };
        let mut confirmations = pin!(async {
            // A message is handed to lapin when its future is first polled, so the messages keep their order.
            all_confirmed(join_all(messages.map(publish_one)).await)
        });
        loop {
            let why = select! {
                // The confirms may have arrived while nobody polled this future.
                biased;
                confirmed = &mut confirmations => return confirmed,
                why = trouble(events) => why,
                () = sleep(limit) => Unconfirmed::Timeout,
            };
            match (why, connection.status().blocked()) {
                // The event is old. It arrived while the session was idle, and nobody reads the events of an
                // idle session.
                (Unconfirmed::Blocked, false) => {}
                (Unconfirmed::Blocked | Unconfirmed::Timeout, true) if if_blocked == IfBlocked::Wait => {}
                _ => return Err(why),
            }
        }
    }

    /// Waits until this session can't be used any more.
    pub async fn trouble(&mut self) -> Unconfirmed {
        trouble(&mut self.events).await
    }

    /// Waits, after [`Unconfirmed::Blocked`], until the broker takes messages again, or the connection is
    /// lost.
    pub async fn unblocked(&mut self) {
        loop {
            select! {
                event = self.events.next() => match event {
                    Some(Event::ConnectionUnblocked | Event::Error(_)) | None => return,
                    Some(_) => {}
                },
                // There is no event when the broker closes the connection in an orderly way.
                () = sleep(Duration::from_secs(1)) => if !self.connection.status().connected() {
                    return;
                },
            }
        }
    }

    /// Closes the connection in an orderly way, which takes at most a second.
    pub async fn close(self) {
        connection::close(&self.connection).await;
    }
}

async fn trouble(events: &mut Events) -> Unconfirmed {
    loop {
        match events.next().await {
            // lapin would hold back the current message and all later messages until the broker takes
            // messages again.
            Some(Event::ConnectionBlocked(_)) => return Unconfirmed::Blocked,
            Some(Event::Error(error)) => return broken(&error),
            None => return Unconfirmed::ConnectionBroken,
            Some(_) => {}
        }
    }
}

/// Returns why a message is not confirmed after this error. With some codes, the broker closes the channel or
/// the connection because of the message itself, for example because its body is too long for the broker.
fn broken(error: &lapin::Error) -> Unconfirmed {
    use AMQPErrorKind::{Hard, Soft};
    use AMQPHardError::{FRAMEERROR, SYNTAXERROR};
    use AMQPSoftError::{CONTENTTOOLARGE, PRECONDITIONFAILED};

    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            Soft(CONTENTTOOLARGE | PRECONDITIONFAILED) | Hard(FRAMEERROR | SYNTAXERROR) => {
                Unconfirmed::NotAccepted
            }
            _ => Unconfirmed::ConnectionBroken,
        },
        _ => Unconfirmed::ConnectionBroken,
    }
}

fn all_confirmed(confirmations: Vec<lapin::Result<Confirmation>>) -> Result<(), Unconfirmed> {
    let mut result = Ok(());
    for confirmation in confirmations {
        match confirmation {
            Ok(Confirmation::Ack(None)) => {}
            // RabbitMQ returns an unroutable message, and also acknowledges it. lapin attaches the returned
            // message to the next acknowledgement, so nobody knows which message was returned.
            Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))) => {
                return Err(Unconfirmed::Unroutable);
            }
            Ok(Confirmation::Nack(None) | Confirmation::NotRequested) => result = Err(Unconfirmed::Nacked),
            Err(error) => {
                tracing::debug!(%error, "publishing failed");
                result = Err(broken(&error));
            }
        }
    }
    result
}
