//! A queue: its waiting messages, in order, and its consumers.

use super::{
    arguments::{Arguments, Overflow},
    memory::Held,
    message::Message,
    virtual_host::{ChannelId, ConnectionId},
};
use amq_protocol::types::ShortString;
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::time::Instant;

/// A queue.
#[derive(Debug)]
pub struct Queue {
    /// The name of the queue.
    pub name: ShortString,
    /// Whether the queue survives [`Broker::crash`](super::Broker::crash). No queue survives the process.
    pub durable: bool,
    /// Whether the queue is deleted with its last consumer.
    pub auto_delete: bool,
    /// The only connection that may use the queue. The queue is deleted with this connection.
    pub owner: Option<ConnectionId>,
    /// The arguments of the queue's declaration.
    pub arguments: Arguments,
    /// How many messages may wait according to the operator's policy, if there is such a policy.
    pub longest: Option<usize>,
    /// The consumers. The first consumer is the next to get a delivery.
    pub consumers: VecDeque<Consumer>,
    /// The time at which the queue was last declared, read with `basic.get`, or left by a consumer.
    pub last_used: Instant,
    /// When the clock will check the queue next.
    pub due: Option<Instant>,
    /// The queue's share of the broker's memory.
    pub _held: Held,
    ready: VecDeque<Entry>,
    next_position: u64,
}

/// A message in a queue, or a delivery that is not acknowledged.
#[derive(Debug)]
pub struct Entry {
    /// The message.
    pub message: Arc<Message>,
    /// Whether the message has been delivered before.
    pub redelivered: bool,
    returns: usize,
    position: u64,
    expires: Option<Instant>,
    _held: Held,
}

/// A consumer of a queue.
#[derive(Debug)]
pub struct Consumer {
    /// The channel of the consumer, which gets its deliveries.
    pub channel: ChannelId,
    /// The name of the consumer on that channel.
    pub tag: ShortString,
    /// Whether deliveries count as acknowledged as soon as they are sent.
    pub no_ack: bool,
    /// Whether the queue may have no other consumer.
    pub exclusive: bool,
    /// The highest number of unacknowledged deliveries; 0 means no limit.
    pub prefetch: u16,
    /// The number of unacknowledged deliveries.
    pub unacked: usize,
    /// The consumer's share of the broker's memory.
    pub _held: Held,
}

impl Consumer {
    /// Returns whether the consumer may get another delivery.
    pub fn has_room(&self) -> bool {
        self.no_ack || self.prefetch == 0 || self.unacked < self.prefetch.into()
    }
}

impl Queue {
    /// Creates an empty queue.
    pub fn new(
        name: ShortString,
        durable: bool,
        auto_delete: bool,
        owner: Option<ConnectionId>,
        arguments: Arguments,
        held: Held,
    ) -> Self {
        Self {
            name,
            durable,
            auto_delete,
            owner,
            arguments,
            longest: None,
            consumers: VecDeque::new(),
            last_used: Instant::now(),
            due: None,
            _held: held,
            ready: VecDeque::new(),
            next_position: 0,
        }
    }

    /// Returns the number of waiting messages.
    pub fn len(&self) -> usize {
        self.ready.len()
    }

    /// Appends a message. Returns false if the queue is full and refuses new messages.
    pub fn append(&mut self, message: Arc<Message>, held: Held) -> bool {
        if self.refuses() {
            return false;
        }
        let ttl = match (message.expiration, self.arguments.message_ttl) {
            (Some(message), Some(queue)) => Some(message.min(queue)),
            (message, queue) => message.or(queue),
        };
        let expires = ttl.map(|ttl| Instant::now() + ttl);
        let position = self.next_position;
        let entry = Entry { message, redelivered: false, returns: 0, position, expires, _held: held };
        self.next_position += 1;
        self.ready.push_back(entry);
        true
    }

    /// Puts a delivered message back into its position in the queue. If the message was requeued too often,
    /// this function returns the message as an error instead.
    pub fn requeue(&mut self, mut entry: Entry) -> Result<(), Entry> {
        entry.redelivered = true;
        entry.returns += 1;
        if self.arguments.most_returns().is_some_and(|most| entry.returns > most) {
            return Err(entry);
        }
        let at = self.ready.partition_point(|other| other.position < entry.position);
        self.ready.insert(at, entry);
        Ok(())
    }

    /// Takes the oldest waiting message.
    pub fn take(&mut self) -> Option<Entry> {
        let entry = self.ready.pop_front()?;
        // The queue frees the memory that a long backlog took.
        if self.ready.capacity() > 1024 && self.ready.len() < self.ready.capacity() / 4 {
            self.ready.shrink_to(self.ready.capacity() / 2);
        }
        Some(entry)
    }

    /// Takes the oldest waiting message if it has expired. As in RabbitMQ, only the first message in the
    /// queue expires. A later message that has expired is removed when it becomes the first message.
    pub fn take_expired(&mut self, now: Instant) -> Option<Entry> {
        self.ready.front()?.expires.filter(|expires| *expires <= now)?;
        self.take()
    }

    /// Takes the oldest waiting message if the queue is too long, unless its `x-overflow` is
    /// `reject-publish`.
    pub fn take_excess(&mut self) -> Option<Entry> {
        let is_too_long = self.max_length().is_some_and(|most| self.ready.len() > most);
        if is_too_long && self.arguments.overflow != Some(Overflow::RejectPublish) {
            self.take()
        } else {
            None
        }
    }

    fn max_length(&self) -> Option<usize> {
        self.arguments.max_length.into_iter().chain(self.longest).min()
    }

    fn refuses(&self) -> bool {
        self.arguments.overflow == Some(Overflow::RejectPublish)
            && self.max_length().is_some_and(|most| self.ready.len() >= most)
    }

    /// Keeps only the waiting messages for which `wanted` returns true.
    pub fn retain(&mut self, wanted: impl Fn(&Message) -> bool) {
        self.ready.retain(|entry| wanted(&entry.message));
    }

    /// Removes all waiting messages, and returns how many there were.
    pub fn purge(&mut self) -> usize {
        std::mem::take(&mut self.ready).len()
    }

    /// Returns the earliest time at which the first message in the queue, or the queue itself, can expire.
    pub fn next_due(&self) -> Option<Instant> {
        let of_head = self.ready.front().and_then(|entry| entry.expires);
        let own = self
            .arguments
            .expires
            .filter(|_| self.consumers.is_empty())
            .map(|expires| self.last_used + expires);
        of_head.into_iter().chain(own).min()
    }

    /// Returns whether the queue has been unused for as long as `x-expires` allows.
    pub fn is_expired(&self, now: Instant) -> bool {
        let unused = |expires: Duration| self.consumers.is_empty() && self.last_used + expires <= now;
        self.arguments.expires.is_some_and(unused)
    }

    /// Returns the consumer with this tag on this channel.
    pub fn consumer(&mut self, channel: ChannelId, tag: &str) -> Option<&mut Consumer> {
        self.consumers.iter_mut().find(|consumer| consumer.channel == channel && consumer.tag.as_str() == tag)
    }

    /// Returns whether the queue has an exclusive consumer.
    pub fn has_exclusive_consumer(&self) -> bool {
        self.consumers.iter().any(|consumer| consumer.exclusive)
    }
}
