//! Publishes copies of logins for other consumers, on a separate connection. A login never waits for its
//! copy, and a copy that can't be published is dropped.

use super::message::Message;
use amqp::{
    Backoff, Failures, OpenError, Server, Topology,
    connection::{self, connect, open_channel},
    opening, properties,
};
use lapin::{Channel, Connection, options::BasicPublishOptions};
use proto::topology::COPY_ROUTING_KEY;
use std::time::SystemTime;
use telemetry::amqp::Broker;
use tokio::sync::mpsc;

/// The name of the connection on the broker.
const CLIENT_ID: &str = "api-copies";

/// The largest number of rounds whose copies are waiting to be published.
const MAX_WAITING: usize = 16;

/// Takes messages that the broker has confirmed, and publishes copies of them.
pub struct Copies(mpsc::Sender<Vec<Message>>);

impl Copies {
    /// Starts publishing. Connects to the broker in the background, and connects again whenever the
    /// connection breaks.
    pub fn start(server: Server, topology: Topology) -> Self {
        let (sender, rounds) = mpsc::channel(MAX_WAITING);
        tokio::spawn(publish(server, topology, rounds));
        Self(sender)
    }

    /// Hands over the messages of a round. They are dropped if too many rounds are already waiting.
    pub fn send(&self, round: Vec<Message>) {
        let _ = self.0.try_send(round);
    }
}

async fn publish(server: Server, topology: Topology, mut rounds: mpsc::Receiver<Vec<Message>>) {
    let broker = Broker::of_hosts(&server.hosts, server.current.clone(), CLIENT_ID);
    let (mut backoff, mut failures) = (Backoff::new(), Failures::default());
    loop {
        match opening::open(&server, open(&server, &topology)).await {
            Ok((connection, channel)) => {
                let frame_max = connection.configuration().frame_max() as usize;
                match publish_rounds(&channel, &topology.exchange, frame_max, &mut rounds).await {
                    Ok(()) => return connection::close(&connection).await,
                    Err(error) => tracing::warn!(%broker, %error, "copies of logins were not published"),
                }
            }
            Err(error) => failures.log(&server, &error),
        }
        backoff.pause().await;
    }
}

async fn open(server: &Server, topology: &Topology) -> Result<(Connection, Channel), OpenError> {
    let connection = connect(server, CLIENT_ID).await?;
    let channel = open_channel(&connection).await?;
    topology.declare_exchange(&channel).await?;
    Ok((connection, channel))
}

/// Publishes the copies of each round until [`Copies`] is dropped.
async fn publish_rounds(
    channel: &Channel,
    exchange: &str,
    frame_max: usize,
    rounds: &mut mpsc::Receiver<Vec<Message>>,
) -> lapin::Result<()> {
    while let Some(round) = rounds.recv().await {
        for message in round {
            let properties = properties::fit(message.properties(SystemTime::now()), &[], frame_max);
            let (exchange, key) = (exchange.into(), COPY_ROUTING_KEY.into());
            let options = BasicPublishOptions::default();
            channel.basic_publish(exchange, key, options, &message.body(), properties).await?;
        }
    }
    Ok(())
}
