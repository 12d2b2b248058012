//! The way of a message through an exchange into queues. The message comes from a publisher, or from a queue
//! that dead-letters it.

use super::{
    content::Content,
    definitions::no_exchange,
    exception::{Exception, Outcome},
    message::{self, Message, Reason},
    queue::Entry,
    virtual_host::{ChannelId, QueueId, VirtualHost},
};
use amq_protocol::{
    protocol::{AMQPClass, AMQPSoftError, basic},
    types::ShortString,
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// A message that its queue has removed, on its way to the queue's dead-letter exchange.
#[derive(Debug)]
pub struct DeadLetter {
    entry: Entry,
    queue: ShortString,
    reason: Reason,
    exchange: ShortString,
    routing_key: Option<ShortString>,
    /// Whether the queue keeps the message until another queue has accepted it.
    is_kept: bool,
}

/// How long the broker waits after a failed attempt to publish a kept dead letter. RabbitMQ waits for three
/// minutes (`dead_letter_worker_publisher_confirm_timeout`).
const KEPT_PAUSE: Duration = Duration::from_secs(1);

impl VirtualHost {
    /// Routes a complete message to its queues, and then records its confirm at once, because nothing remains
    /// to be done for the message.
    pub(super) fn publish(&mut self, at: ChannelId, content: Content) -> Outcome {
        let Content { publish, properties, raw_properties, body, .. } = content;
        if properties
            .headers()
            .as_ref()
            .is_some_and(|headers| headers.contains_key("CC") || headers.contains_key("BCC"))
        {
            return Err(Exception::not_implemented("the headers CC and BCC"));
        }
        if let Some(user) = properties.user_id().as_ref().filter(|user| user.as_str() != super::USER) {
            let text =
                format!("user_id property set to '{user}' but authenticated user was '{}'", super::USER);
            return Err(Exception::precondition_failed(text));
        }
        let message = Arc::new(Message {
            expiration: message::expiration(&properties)?,
            exchange: publish.exchange,
            routing_key: publish.routing_key,
            properties: raw_properties,
            body: body.into(),
        });
        let name = message.exchange.as_str();
        if self.exchanges.get(name).is_some_and(|exchange| exchange.internal) {
            let text = format!("cannot publish to internal exchange '{name}' in vhost '/'");
            return Err(Exception::access_refused(text));
        }
        let queues = self.route(name, message.routing_key.as_str()).ok_or_else(|| no_exchange(name))?;
        if queues.is_empty() && publish.mandatory {
            self.return_unroutable(at, &message);
        }
        let mut is_taken = true;
        for queue in queues {
            is_taken &= self.enqueue(queue, &message);
        }
        if let Some(peer) = self.peers.get_mut(&at.connection)
            && let Some(channel) = peer.channels.get_mut(&at.number)
            && channel.confirm(is_taken)
        {
            peer.confirming.insert(at.number);
        }
        Ok(())
    }

    fn return_unroutable(&mut self, at: ChannelId, message: &Message) {
        let returned = basic::Return {
            reply_code: AMQPSoftError::NOROUTE.get_id(),
            reply_text: "NO_ROUTE".into(),
            exchange: message.exchange.clone(),
            routing_key: message.routing_key.clone(),
        };
        if let Some(peer) = self.peers.get_mut(&at.connection) {
            let returned = AMQPClass::Basic(basic::AMQPMethod::Return(returned));
            peer.output.content(at.number, returned, message);
        }
    }

    /// Returns the queues that a message goes to, or `None` if there is no such exchange.
    fn route(&self, exchange: &str, routing_key: &str) -> Option<Vec<QueueId>> {
        /// The highest number of alternate exchanges to follow. It is limited because alternate exchanges may
        /// form a long chain, or a loop.
        const MOST_ALTERNATES: usize = 16;

        if exchange.is_empty() {
            // Every queue is bound to the default exchange by its name.
            return Some(self.queue_ids.get(routing_key).copied().into_iter().collect());
        }
        let mut exchange = self.exchanges.get(exchange)?;
        let mut queues = exchange.route(routing_key);
        for _ in 0..MOST_ALTERNATES {
            let Some(alternate) = exchange.alternate.as_ref().filter(|_| queues.is_empty()) else { break };
            let Some(next) = self.exchanges.get(alternate.as_str()) else { break };
            exchange = next;
            queues = exchange.route(routing_key);
        }
        Some(queues)
    }

    /// Appends a message to a queue, or delivers it at once. Returns whether the queue took the message.
    fn enqueue(&mut self, id: QueueId, message: &Arc<Message>) -> bool {
        let held = self.memory.hold(message.size());
        let now = Instant::now();
        self.expire(id, now);
        let Some(queue) = self.queues.get_mut(&id) else {
            return true;
        };
        let is_taken = queue.append(Arc::clone(message), held);
        if is_taken {
            // A new message expires only after the attempt to deliver it, because even with a time to live of
            // 0 it must reach a waiting consumer.
            self.deliver(id, now);
            self.expire(id, Instant::now());
            self.drop_excess(id);
        }
        self.schedule(id);
        is_taken
    }

    /// Delivers as many messages as a queue's consumers have room for, and removes expired and excess
    /// messages.
    pub(super) fn push(&mut self, id: QueueId) {
        let now = Instant::now();
        self.expire(id, now);
        self.deliver(id, now);
        self.drop_excess(id);
        self.schedule(id);
    }

    pub(super) fn expire(&mut self, id: QueueId, now: Instant) {
        while let Some(entry) = self.queues.get_mut(&id).and_then(|queue| queue.take_expired(now)) {
            self.dead_letter(id, entry, Reason::Expired);
        }
    }

    fn drop_excess(&mut self, id: QueueId) {
        while let Some(entry) = self.queues.get_mut(&id).and_then(|queue| queue.take_excess()) {
            self.dead_letter(id, entry, Reason::MaxLen);
        }
    }

    /// Records a removed message as a dead letter, if its queue has a dead-letter exchange.
    pub(super) fn dead_letter(&mut self, id: QueueId, entry: Entry, reason: Reason) {
        let Some(queue) = self.queues.get(&id) else { return };
        let Some(exchange) = queue.arguments.dead_letter_exchange.clone() else {
            return;
        };
        let routing_key = queue.arguments.dead_letter_routing_key.clone();
        let is_kept = queue.arguments.keeps_dead_letters();
        let queue = queue.name.clone();
        self.dead_letters.push_back(DeadLetter { entry, queue, reason, exchange, routing_key, is_kept });
    }

    /// Prepares the kept dead letters whose pause is over at `now` for another attempt, and returns when the
    /// next pause will be over. Dead letters of deleted queues are dropped.
    pub(super) fn retry_kept(&mut self, now: Instant) -> Option<Instant> {
        while self.kept.front().is_some_and(|(due, _)| *due <= now) {
            let letter = self.kept.pop_front().map(|(_, letter)| letter);
            let queues = &self.queue_ids;
            self.dead_letters.extend(letter.filter(|letter| queues.contains_key(letter.queue.as_str())));
        }
        self.kept.front().map(|(due, _)| *due)
    }

    /// Publishes at most a few dead letters, because their new queues may dead-letter them again at once,
    /// into ever more queues. The clock publishes the rest, so that connections get their turn in between.
    pub(super) fn settle_dead_letters(&mut self) {
        const AT_ONCE: usize = 16;

        for _ in 0..AT_ONCE {
            let Some(letter) = self.dead_letters.pop_front() else {
                return;
            };
            let DeadLetter { entry, queue, reason, exchange, routing_key, is_kept } = &letter;
            let Some(message) =
                entry.message.after_death(*reason, queue.as_str(), exchange, routing_key.as_ref())
            else {
                continue;
            };
            let mut is_taken = false;
            if !self.memory.is_exhausted() {
                // A rejected message may cycle, because each cycle needs a consumer that rejects the message
                // again.
                let gone_through =
                    if *reason == Reason::Rejected { Vec::new() } else { message.queues_gone_through() };
                let message = Arc::new(message);
                // If the dead-letter exchange does not exist, no queue takes the message. As in RabbitMQ, the
                // message is then lost, unless its queue keeps it.
                let queues = self.route(exchange.as_str(), message.routing_key.as_str()).unwrap_or_default();
                is_taken = !queues.is_empty();
                for id in queues {
                    let name = self.queues.get(&id).map(|queue| queue.name.as_str().as_bytes());
                    if !gone_through.iter().any(|queue| Some(queue.as_bytes()) == name) {
                        is_taken &= self.enqueue(id, &message);
                    }
                }
            }
            if *is_kept && !is_taken {
                self.kept.push_back((Instant::now() + KEPT_PAUSE, letter));
                self.wake_clock();
            }
        }
        self.wake_clock();
    }
}
