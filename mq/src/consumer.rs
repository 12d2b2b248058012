//! The delivery loop, which opens a connection, takes chunks of deliveries and acknowledges them. `attempt`
//! processes each delivery.
//!
//! [`Consumer::run`] opens a session, that is, a connection that consumes, and opens another one when that
//! connection is lost. A session takes the waiting deliveries as one chunk, and lets the next deliveries
//! gather for a few milliseconds. It processes all deliveries of a chunk at the same time, so that the
//! history commits them together. But messages that are redelivered for at least the second time are
//! processed after the others, one at a time, because one of them may have killed the process. A delivery
//! that succeeded is acknowledged at once. A delivery that failed is handed on, that is, published to a retry
//! queue or to the dead-letter queue, and acknowledged after that. The loop goes on meanwhile, so that a
//! failed delivery does not delay others. When the service stops, the session takes no more deliveries, and
//! finishes those that have arrived.
//!
//! ```text
//!   delivered ──▶ processing ──▶ settled ──────────────────────▶ acknowledged
//!       ▲             │ │                                            ▲
//!       │             │ └──────▶ failed ──▶ handed on and confirmed ─┘
//!       └─────────────┘ not acknowledged when the connection ends
//! ```

use crate::{
    attempt::{Attempts, Chunk, Failed, Outcome, Redelivered},
    claim::claim,
    history::{Login, Processed},
};
use amqp::{
    Backoff, Failures, OpenError, Server,
    connection::{self, connect, open_channel},
    opening,
};
use anyhow::{anyhow, bail};
use futures_util::{FutureExt, StreamExt, future::join_all, stream::FuturesUnordered};
use lapin::{
    Channel,
    message::Delivery,
    options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use std::time::Duration;
use tokio::{
    select,
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tower::{BoxError, Service};

/// The name of this service's connection on the broker.
pub const CLIENT_ID: &str = "mq";

/// The largest number of deliveries that are processed, made durable and acknowledged together.
const MAX_CHUNK: usize = 64;

/// Consumes login messages.
pub struct Consumer<S> {
    /// The broker.
    pub server: Server,
    /// How many unacknowledged messages the broker may send to mq.
    pub prefetch: u16,
    /// The time from the start of one chunk to the start of the next, in which deliveries gather.
    pub commit_interval: Duration,
    /// Processes each delivery.
    pub attempts: Attempts<S>,
    /// Reports whether there is a connection that is consuming.
    pub consuming: watch::Sender<bool>,
}

impl<S> Consumer<S>
where
    S: Service<Login, Response = Processed, Error: Into<BoxError>> + Clone,
{
    /// Consumes until `stop` is ready and the deliveries that have arrived by then are finished. Connects
    /// again as often as needed.
    pub async fn run(&self, stop: impl Future<Output = ()>) {
        let stop = stop.shared();
        let broker = &self.attempts.broker;
        let mut backoff = Backoff::new();
        let mut failures = Failures::default();
        // Whether this process has bound the queue to the exchange, through which other producers' messages
        // reach the queue.
        let mut has_bound = false;
        // The id of the history is known only once the database has been available.
        let history = select! {
            secret = self.attempts.history.secret() => secret.id_of(&[b"history"]),
            () = stop.clone() => return,
        };
        loop {
            let opened = select! {
                opened = opening::open(&self.server, self.open(has_bound, &history)) => opened,
                () = stop.clone() => return,
            };
            match opened {
                Ok(session) => {
                    let start = Instant::now();
                    let Err(error) = self.session(session, stop.clone()).await else { return };
                    let why = telemetry::causes(&*error);
                    tracing::warn!(%broker, "lost the connection to the broker: {why}");
                    failures = Failures::default();
                    has_bound = true;
                    backoff.connection_lasted(start.elapsed());
                }
                Err(error) => failures.log(&self.server, &error),
            }
            select! {
                () = backoff.pause() => {}
                () = stop.clone() => return,
            }
        }
    }

    /// Consumes on one connection until the connection ends. Returns `Ok` if `stop` ended it, and otherwise
    /// an error that says why it ended.
    async fn session(
        &self,
        (connection, channel, deliveries): (lapin::Connection, Channel, lapin::Consumer),
        stop: impl Future<Output = ()> + Clone,
    ) -> anyhow::Result<()> {
        tracing::info!(broker = %self.attempts.broker, queue = self.attempts.topology.queue, "consuming");
        self.consuming.send_replace(true);
        let ended = select! {
            biased;
            ended = self.consume(&channel, deliveries, stop) => ended,
            () = lost(&connection) => Err(anyhow!("it ended while deliveries were being processed")),
        };
        self.consuming.send_replace(false);
        if ended.is_ok() {
            // Messages that are not acknowledged go back to the queue.
            connection::close(&connection).await;
            self.attempts.forwarder.close().await;
        }
        ended
    }

    async fn open(
        &self,
        has_bound: bool,
        history: &str,
    ) -> Result<(lapin::Connection, Channel, lapin::Consumer), OpenError> {
        let Attempts { topology, retry_delays, .. } = &self.attempts;
        let connection = connect(&self.server, CLIENT_ID).await?;
        let channel = open_channel(&connection).await?;
        channel.basic_qos(self.prefetch, BasicQosOptions::default()).await?;
        topology.declare(&channel, retry_delays).await?;
        // While a node of a cluster is frozen, binding may take longer than the connection lasts, even if the
        // queue is bound already.
        if !has_bound || !topology.is_bound(&connection).await? {
            topology.bind(&channel).await?;
        }
        claim(&channel, topology, history).await?;
        let deliveries = channel
            .basic_consume(
                topology.queue.as_str().into(),
                CLIENT_ID.into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        Ok((connection, channel, deliveries))
    }

    async fn consume(
        &self,
        channel: &Channel,
        deliveries: lapin::Consumer,
        stop: impl Future<Output = ()> + Clone,
    ) -> anyhow::Result<()> {
        let tag = deliveries.tag();
        // All deliveries that are waiting are taken together.
        let mut deliveries = deliveries.ready_chunks(MAX_CHUNK);
        let hand_on = async |(delivery, failed): (Delivery, Failed)| {
            self.attempts.hand_on(&delivery, failed).await;
            acknowledge(channel, &delivery, false).await
        };
        // Deliveries that failed are handed on separately, because they must not delay the others.
        let mut handing_on = FuturesUnordered::new();
        // Deliveries gather before they are taken, because a commit costs the same for one login as for many.
        let (mut idle_since, mut not_before) = (Instant::now(), Instant::now());
        loop {
            let gathered = async {
                sleep_until(not_before).await;
                match deliveries.next().now_or_never() {
                    Some(chunk) => (chunk, not_before.saturating_duration_since(idle_since)),
                    None => (deliveries.next().await, Duration::ZERO),
                }
            };
            select! {
                (chunk, pause) = gathered => match chunk {
                    Some(chunk) => {
                        not_before = Instant::now();
                        // After a full chunk, more deliveries are waiting already.
                        if chunk.len() < MAX_CHUNK.min(self.prefetch.into()) {
                            not_before += self.commit_interval;
                        }
                        let failed = self.deliver_all(channel, chunk, pause, handing_on.is_empty()).await?;
                        handing_on.extend(failed.into_iter().map(hand_on));
                        idle_since = Instant::now();
                    }
                    // For example, the queue was deleted.
                    None => bail!("the broker cancelled the consumer"),
                },
                Some(acked) = handing_on.next() => acked?,
                () = stop.clone() => break,
            }
        }
        tracing::info!("stopping: finishing deliveries in hand");
        channel.basic_cancel(tag, BasicCancelOptions::default()).await?;
        while let Some(chunk) = deliveries.next().await {
            let failed = self.deliver_all(channel, chunk, Duration::ZERO, handing_on.is_empty()).await?;
            handing_on.extend(failed.into_iter().map(hand_on));
        }
        while let Some(acked) = handing_on.next().await {
            acked?;
        }
        Ok(())
    }

    /// Processes deliveries and acknowledges them, except for those that failed, which it returns. If the
    /// future is dropped, deliveries stay in the queue and will be delivered again.
    ///
    /// `pause` is how long the deliveries gathered. `all_before` tells if all earlier deliveries are
    /// acknowledged.
    async fn deliver_all(
        &self,
        channel: &Channel,
        chunk: Vec<lapin::Result<Delivery>>,
        pause: Duration,
        all_before: bool,
    ) -> anyhow::Result<Vec<(Delivery, Failed)>> {
        let deliveries = chunk.into_iter().collect::<lapin::Result<Vec<_>>>()?;
        let chunk = Chunk { size: deliveries.len(), pause };
        // All redeliveries are marked at the same time, so that the history commits the marks together.
        let redelivered =
            join_all(deliveries.iter().map(|delivery| self.attempts.redelivered(delivery))).await;
        let (mut suspects, together): (Vec<_>, Vec<_>) = deliveries
            .into_iter()
            .zip(redelivered)
            .partition(|(_, redelivered)| matches!(redelivered, Redelivered::Suspect { .. }));
        let all_before = all_before && suspects.is_empty();
        let processing = together
            .iter()
            .map(|(delivery, redelivered)| self.attempts.process(delivery, *redelivered, chunk));
        let outcomes = join_all(processing).await;
        let mut failed = Vec::new();
        let mut settled = Vec::with_capacity(together.len());
        for ((delivery, _), outcome) in together.into_iter().zip(outcomes) {
            match outcome {
                Outcome::Settled => settled.push(delivery),
                Outcome::Failed(why) => failed.push((delivery, why)),
            }
        }
        if all_before && failed.is_empty() {
            // One acknowledgement for all is cheaper for both sides. But it also acknowledges all earlier
            // deliveries, so none of these may still be unfinished.
            if let Some(last) = settled.last() {
                acknowledge(channel, last, true).await?;
            }
        } else {
            for delivery in settled {
                acknowledge(channel, &delivery, false).await?;
            }
        }
        // One of these messages may have killed the process. They are processed one by one, to find out which
        // message did that. Messages with the fewest redeliveries come first.
        suspects.sort_by_key(|(_, redelivered)| *redelivered);
        for (delivery, redelivered) in suspects {
            match self.attempts.process(&delivery, redelivered, chunk).await {
                Outcome::Settled => acknowledge(channel, &delivery, false).await?,
                Outcome::Failed(why) => failed.push((delivery, why)),
            }
        }
        Ok(failed)
    }
}

/// Waits until the connection is lost. Otherwise, nobody would notice the loss while processing waits for the
/// database. (lapin has no event for a connection that the broker closes in an orderly way.)
async fn lost(connection: &lapin::Connection) {
    while connection.status().connected() {
        sleep(Duration::from_secs(1)).await;
    }
}

/// Acknowledges through the channel instead of `Delivery::ack`. If the connection is lost during an `ack`,
/// lapin 4.12 may leave the request in the queue of a task that has ended, and never answer it.
async fn acknowledge(channel: &Channel, delivery: &Delivery, multiple: bool) -> lapin::Result<()> {
    channel.basic_ack(delivery.delivery_tag, BasicAckOptions { multiple }).await
}
