//! Lets an operator handle messages that were given up: `mq dead-letters list|show|replay`.
//!
//! AMQP has no way to look into a queue. So each command takes all messages without acknowledging them, and
//! gives them back at the end. (A quorum queue appends messages that come back, so their order is kept only
//! if all messages are taken.) Until then, no other consumer gets these messages.

use crate::{
    attempt,
    config::{Config, DeadLetters},
    forwarder::Forwarder,
    properties,
};
use ::amqp::{Topology, connection};
use anyhow::{Context as _, ensure};
use lapin::{
    Channel, Connection,
    message::Delivery,
    options::{BasicAckOptions, BasicGetOptions, BasicNackOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use opentelemetry::{
    Context, KeyValue,
    trace::{SpanKind, Status, TraceContextExt, TraceId, Tracer},
};
use proto::{
    login::LoginMessage,
    topology::{EXCHANGE, QUEUE, ROUTING_KEY},
};
use std::{
    io::{self, Write},
    time::Duration,
};
use telemetry::{
    amqp::{self, Broker, HeadersMut},
    semconv,
};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

/// The name of the connection on the broker.
const CLIENT_ID: &str = "mq-dead-letters";

/// How long the broker may take for one step.
const PATIENCE: Duration = Duration::from_secs(30);

/// Carries out the command, and prints its result.
///
/// # Errors
/// If the broker can't be reached, or if there is no such message.
pub async fn run(config: &Config, command: &DeadLetters) -> anyhow::Result<()> {
    let server = config.amqp.server().map_err(anyhow::Error::msg)?;
    let broker = Broker::of_hosts(&server.hosts, server.current.clone(), CLIENT_ID);
    let topology = config.amqp.topology(EXCHANGE, ROUTING_KEY, QUEUE);
    let connection = connection::connect(&server, CLIENT_ID).await;
    let connection = connection.with_context(|| format!("connecting to the broker at {server}"))?;
    let mut letters = Letters::open(&connection, topology.dead_letter_queue.clone()).await?;

    let done = match command {
        DeadLetters::List => list(&mut letters).await,
        DeadLetters::Show { message_id, body } => show(&mut letters, message_id, *body).await,
        DeadLetters::Replay { message_id, .. } => {
            // The forwarder needs no retry queues, because it publishes only to the main queue.
            let forwarder = Forwarder::new(server, topology.clone(), Vec::new());
            let replay = Replay { forwarder, topology, broker };
            let done = replay.run(&mut letters, message_id.as_deref()).await;
            replay.forwarder.close().await;
            done
        }
    };
    letters.give_back().await;
    connection::close(&connection).await;
    done
}

async fn list(letters: &mut Letters) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let mut line = |[id, reason, attempts, since, trace_id]: [&str; 5]| {
        writeln!(out, "{id:<36}  {reason:<21}  {attempts:>8}  {since:<24}  {trace_id}")
    };
    line(["MESSAGE ID", "REASON", "ATTEMPTS", "SINCE", "TRACE ID"])?;
    while let Some(letter) = letters.next().await? {
        line(letter.summary().each_ref().map(String::as_str))?;
    }
    Ok(())
}

async fn show(letters: &mut Letters, message_id: &str, with_body: bool) -> anyhow::Result<()> {
    let mut is_found = false;
    while let Some(letter) = letters.next().await? {
        if is_found || !letter.has_id(message_id) {
            continue;
        }
        is_found = true;
        let mut out = io::stdout().lock();
        let names = ["message id", "reason", "attempts", "since", "trace id"];
        for (name, value) in names.into_iter().zip(letter.summary()) {
            writeln!(out, "{name:<10}  {value}")?;
        }
        writeln!(out, "body        {} bytes", letter.0.data.len())?;
        writeln!(out, "\nproperties")?;
        for (name, value) in letter.properties() {
            writeln!(out, "  {name}: {}", printable(&value))?;
        }
        writeln!(out, "\nheaders")?;
        for (name, value) in letter.0.properties.headers().iter().flat_map(FieldTable::inner) {
            let value = match value {
                AMQPValue::LongString(text) => text.to_string(),
                other => format!("{other:?}"),
            };
            writeln!(out, "  {}: {}", printable(name.as_str()), printable(&value))?;
        }
        if with_body {
            writeln!(out, "\n{}", printable(&String::from_utf8_lossy(&letter.0.data)))?;
        }
    }
    ensure!(is_found, "there is no dead letter with this message id");
    Ok(())
}

/// Publishes dead letters to the main queue.
struct Replay {
    forwarder: Forwarder,
    topology: Topology,
    broker: Broker,
}

impl Replay {
    /// Replays the dead letters with this id, or all of them.
    async fn run(&self, letters: &mut Letters, message_id: Option<&str>) -> anyhow::Result<()> {
        let mut count = 0;
        while let Some(letter) = letters.next().await? {
            if message_id.is_some_and(|wanted| !letter.has_id(wanted)) {
                continue;
            }
            self.publish(letters, &letter).await.with_context(|| format!("after {count} replays"))?;
            count += 1;
            let [id, ..] = letter.summary();
            writeln!(io::stdout(), "replayed {id}")?;
        }
        ensure!(count > 0 || message_id.is_none(), "there is no dead letter with this message id");
        Ok(())
    }

    /// Publishes a dead letter in the trace of its message. The span is a child of the last producer's span,
    /// and the parent of the next attempt's span.
    async fn publish(&self, letters: &mut Letters, Letter(letter): &Letter) -> anyhow::Result<()> {
        let producer = Letter::producer(letter);
        let message_id = attempt::own_id(&letter.properties).unwrap_or_else(|| Uuid::new_v4().to_string());
        let queue = self.topology.queue.as_str();
        let tracer = telemetry::tracer("mq", env!("CARGO_PKG_VERSION"));
        let builder = tracer.span_builder("replay_msg_mq").with_kind(SpanKind::Producer);
        let builder = builder.with_attributes(self.broker.producer_attributes("", queue, &message_id));
        let cx = producer.with_span(builder.start_with_context(&tracer, &producer));

        let mut headers = FieldTable::default();
        telemetry::inject(&cx, &mut HeadersMut(&mut headers));
        let headers = headers.inner().iter().map(|(name, value)| (name.as_str(), value.clone()));
        let frame_max = self.forwarder.frame_max();
        let properties = properties::again(&letter.properties, &message_id, headers, frame_max);
        let publish = self.forwarder.publish(queue, properties, &letter.data);
        let published = timeout(PATIENCE, publish).await;
        let published = published.context("waiting for the broker's confirm").flatten();
        if let Err(error) = &published {
            cx.span().set_attribute(KeyValue::new(semconv::ERROR_TYPE, "publish_failed"));
            cx.span().set_status(Status::error(telemetry::causes(&**error)));
        }
        cx.span().end();
        published?;
        // If this fails, the message is in both queues. If the message has its own id, its login is applied
        // only once.
        let acked = letters.channel.basic_ack(letter.delivery_tag, BasicAckOptions::default()).await;
        acked.context("acknowledging the dead letter, which was published but may still be in its queue")?;
        letters.taken -= 1;
        Ok(())
    }
}

/// The dead letters that were in the queue at the start, the oldest first.
struct Letters {
    channel: Channel,
    queue: String,
    left: u32,
    /// The number of messages that were taken and not acknowledged.
    taken: u32,
}

impl Letters {
    async fn open(connection: &Connection, queue: String) -> anyhow::Result<Self> {
        let channel = connection::open_channel(connection).await?;
        let left = waiting(&channel, &queue).await.context("looking for the dead-letter queue")?;
        Ok(Self { channel, queue, left, taken: 0 })
    }

    /// Takes the next dead letter that was in the queue at the start. A replayed message that is already back
    /// in the queue is not one of these.
    async fn next(&mut self) -> anyhow::Result<Option<Letter>> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        let got = self.channel.basic_get(self.queue.as_str().into(), BasicGetOptions::default());
        let got = timeout(PATIENCE, got).await.context("waiting for the broker")??;
        self.taken += u32::from(got.is_some());
        Ok(got.map(|message| Letter(message.delivery)))
    }

    /// Gives back the messages that were taken and not replayed, in their order. (If the end of the
    /// connection gave them back, a quorum queue would put them in another order.) Waits until the queue has
    /// the messages again, because a quorum queue answers before that, and the next command might not see
    /// them.
    async fn give_back(&self) {
        let everything = BasicNackOptions { multiple: true, requeue: true };
        let given_back = async {
            self.channel.basic_nack(0, everything).await?;
            while waiting(&self.channel, &self.queue).await? < self.taken {
                sleep(Duration::from_millis(20)).await;
            }
            lapin::Result::Ok(())
        };
        // If this fails, the messages go back when the connection ends.
        let _ = timeout(Duration::from_secs(2), given_back).await;
    }
}

/// Returns the number of messages that are waiting in a queue.
async fn waiting(channel: &Channel, queue: &str) -> lapin::Result<u32> {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let declared = channel.queue_declare(queue.into(), passive, FieldTable::default()).await?;
    Ok(declared.message_count())
}

/// A dead letter, with methods that return its parts in a form that is safe to print.
struct Letter(Delivery);

impl Letter {
    fn producer(delivery: &Delivery) -> Context {
        let (carrier, _) = LoginMessage::from_json(&delivery.data);
        amqp::extract(delivery.properties.headers().as_ref(), &carrier).0
    }

    fn has_id(&self, message_id: &str) -> bool {
        self.0.properties.message_id().as_ref().is_some_and(|id| id.as_str() == message_id)
    }

    /// Returns the message id, the reason, the number of attempts, the time of the last, and the trace id.
    fn summary(&self) -> [String; 5] {
        let properties = &self.0.properties;
        let trace_id = Self::producer(&self.0).span().span_context().trace_id();
        [
            properties.message_id().as_ref().map(|id| printable(id.as_str())),
            properties::dead_letter_reason(properties).map(|reason| printable(&reason)),
            properties::dead_letter_attempts(properties).map(|attempts| attempts.to_string()),
            properties::published_at(properties).map(|at| humantime::format_rfc3339_millis(at).to_string()),
            (trace_id != TraceId::INVALID).then(|| trace_id.to_string()),
        ]
        .map(|part| part.unwrap_or_else(|| "-".to_owned()))
    }

    /// Returns the properties to print, without the headers and the message id.
    fn properties(&self) -> Vec<(&'static str, String)> {
        let properties = &self.0.properties;
        let texts = [
            ("content-type", properties.content_type()),
            ("content-encoding", properties.content_encoding()),
            ("correlation-id", properties.correlation_id()),
            ("reply-to", properties.reply_to()),
            ("type", properties.kind()),
            ("app-id", properties.app_id()),
            ("cluster-id", properties.cluster_id()),
        ];
        let numbers = [
            ("delivery-mode", (*properties.delivery_mode()).map(u64::from)),
            ("priority", (*properties.priority()).map(u64::from)),
            ("timestamp", *properties.timestamp()),
        ];
        let texts = texts.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?.to_string())));
        let numbers = numbers.into_iter().filter_map(|(name, value)| Some((name, value?.to_string())));
        texts.chain(numbers).collect()
    }
}

/// Escapes control characters, by which a message could take over the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_not_printed() {
        assert_eq!(printable("a\x1b[2Jb\r\nü\u{9b}"), "a\\u{1b}[2Jb\\r\\nü\\u{9b}");
    }
}
