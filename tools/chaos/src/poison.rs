//! Messages that can't be processed. Each of these messages must become a dead letter, and no other message may
//! become one.

use super::{
    history::History,
    ledger::TraceId,
    system::{LAST_RETRY_DELAY, System},
};
use amqp::Topology;
use anyhow::{Result, ensure};
use harness::poll;
use lapin::{
    BasicProperties, Channel, Confirmation,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use uuid::Uuid;

/// The poison messages that were published, and the dead letters that were found, by message id.
#[derive(Default)]
pub struct Poison {
    published: BTreeMap<String, TraceId>,
    dead: BTreeSet<String>,
    /// The traces of published messages that must be applied: large messages, and retries.
    to_apply: Vec<TraceId>,
}

/// The body of a login without a context.
const LOGIN: &str = r#"{"Carrier":{},"Msg":"13800138000"}"#;

impl Poison {
    /// Publishes two messages as api would: an unreadable message, and a login that the database refuses.
    ///
    /// # Errors
    /// If the broker refuses the messages.
    pub async fn publish(&mut self, system: &System, history: &mut History) -> Result<()> {
        let refused: TraceId = Uuid::new_v4().as_u128();
        history.refuse(refused).await?;
        for (trace, body) in [(Uuid::new_v4().as_u128(), "no login"), (refused, LOGIN)] {
            let id = publish(system, None, trace, FieldTable::default(), body).await?;
            self.published.insert(id, trace);
        }
        Ok(())
    }

    /// Publishes logins to the last retry queue, as mq does after an attempt that failed. These logins must
    /// take effect.
    ///
    /// # Errors
    /// If the broker refuses the messages.
    pub async fn publish_retries(&mut self, system: &System) -> Result<()> {
        // The control has no retries.
        for _ in 0..if system.is_control { 0 } else { 10 } {
            let trace = Uuid::new_v4().as_u128();
            let queue = system.topology.retry_queue(LAST_RETRY_DELAY);
            publish(system, Some(&queue), trace, FieldTable::default(), LOGIN).await?;
            self.to_apply.push(trace);
        }
        Ok(())
    }

    /// Returns how many of the messages that must take effect have not taken effect yet.
    pub fn owed(&self, history: &History) -> usize {
        self.to_apply.iter().filter(|trace| !history.has(**trace)).count()
    }

    /// Publishes a message whose body is longer than mq accepts, and a login with a header that is longer than
    /// a frame of mq. The login must still take effect.
    ///
    /// # Errors
    /// If the broker refuses the messages.
    pub async fn publish_too_large(&mut self, system: &System) -> Result<()> {
        let trace = Uuid::new_v4().as_u128();
        let body = LOGIN.replace('{', &format!("{{{}", " ".repeat(300 * 1024)));
        self.published.insert(publish(system, None, trace, FieldTable::default(), &body).await?, trace);
        if !system.is_control {
            let trace = Uuid::new_v4().as_u128();
            let mut headers = FieldTable::default();
            headers.insert("x-large".into(), AMQPValue::LongString("x".repeat(16 * 1024).into()));
            publish(system, None, trace, headers, LOGIN).await?;
            self.to_apply.push(trace);
        }
        Ok(())
    }

    /// Empties the dead-letter queue. Returns whether all poison messages have been found there so far.
    ///
    /// # Errors
    /// If the queue can't be read.
    pub async fn is_dead(&mut self, channel: &Channel, system: &System) -> Result<bool> {
        let queue = system.topology.dead_letter_queue.as_str();
        while let Some(letter) = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await? {
            let message_id = letter.properties.message_id().as_ref().map(ToString::to_string);
            self.dead.insert(message_id.unwrap_or_default());
        }
        Ok(self.published.keys().all(|message_id| self.dead.contains(message_id)))
    }

    /// Waits for the dead letters that are still missing; returns what is wrong. A message may become two
    /// dead letters, because mq may be killed between publishing the dead letter and acknowledging the
    /// message.
    ///
    /// # Errors
    /// If the broker can't be reached.
    pub async fn judge(
        &mut self,
        system: &System,
        history: &History,
        limit: Duration,
    ) -> Result<Vec<String>> {
        let (connection, channel) = system.broker.connect().await?;
        poll(limit, async || self.is_dead(&channel, system).await.ok()?.then_some(())).await;
        connection.close(200, "done".into()).await?;
        let missing = self.published.keys().filter(|id| !self.dead.contains(*id)).count();
        let strange = self.dead.iter().filter(|id| !self.published.contains_key(*id)).count();
        let mut wrong = Vec::new();
        if missing > 0 {
            let all = self.published.len();
            wrong.push(format!("{missing} of {all} poison messages did not become dead letters"));
        }
        if strange > 0 {
            wrong.push(format!("{strange} dead letters were not poison messages"));
        }
        let owed = self.owed(history);
        if owed > 0 {
            wrong.push(format!("{owed} logins with a long header, or from a retry queue, took no effect"));
        }
        Ok(wrong)
    }

    /// Returns the traces of the published messages.
    pub fn traces(&self) -> impl Iterator<Item = TraceId> {
        self.published.values().chain(&self.to_apply).copied()
    }
}

/// Publishes a message to this queue, or, without a queue, to the exchange as api does. Returns the message id.
async fn publish(
    system: &System,
    queue: Option<&str>,
    trace: TraceId,
    mut headers: FieldTable,
    body: &str,
) -> Result<String> {
    let (connection, channel) = system.broker.connect().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let message_id = Uuid::new_v4().to_string();
    let traceparent = format!("00-{trace:032x}-{:016x}-01", 1);
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(message_id.as_str().into())
        .with_headers(headers);
    let Topology { exchange, routing_key, .. } = &system.topology;
    let (exchange, key) = queue.map_or((exchange.as_str(), routing_key.as_str()), |queue| ("", queue));
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let published = channel
        .basic_publish(exchange.into(), key.into(), options, body.as_bytes(), properties)
        .await?
        .await?;
    ensure!(published == Confirmation::Ack(None), "the broker did not accept the message");
    connection.close(200, "done".into()).await?;
    Ok(message_id)
}
