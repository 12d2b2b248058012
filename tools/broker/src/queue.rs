//! A queue: the messages that wait in it, in order, and the consumers that wait for them.

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
    /// Its name.
    pub name: ShortString,
    /// Survives [`Broker::crash`](super::Broker::crash), though not the process.
    pub durable: bool,
    /// Goes with its last consumer.
    pub auto_delete: bool,
    /// The only connection that may use it, and with which it goes.
    pub owner: Option<ConnectionId>,
    /// How it was declared.
    pub arguments: Arguments,
    /// The next to be delivered to comes first.
    pub consumers: VecDeque<Consumer>,
    /// When it was last declared, read or left by a consumer.
    pub last_used: Instant,
    /// When the clock looks at it next.
    pub due: Option<Instant>,
    /// What it takes of the broker's memory.
    pub _held: Held,
    ready: VecDeque<Entry>,
    ready_bytes: usize,
    next_position: u64,
}

/// A message in a queue, or on its way to a consumer.
#[derive(Debug)]
pub struct Entry {
    /// The message.
    pub message: Arc<Message>,
    /// Whether a consumer has had it before.
    pub redelivered: bool,
    position: u64,
    expires: Option<Instant>,
    _held: Held,
}

/// A consumer of a queue.
#[derive(Debug)]
pub struct Consumer {
    /// Where it was made, and where its deliveries go.
    pub channel: ChannelId,
    /// Its name on that channel.
    pub tag: ShortString,
    /// Whether deliveries count as acknowledged when they are sent.
    pub no_ack: bool,
    /// Whether it is to be the only one.
    pub exclusive: bool,
    /// The most deliveries without acknowledgement; 0 is no limit.
    pub prefetch: u16,
    /// Deliveries without acknowledgement.
    pub unacked: usize,
    /// What it takes of the broker's memory.
    pub _held: Held,
}

impl Queue {
    /// An empty queue.
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
            consumers: VecDeque::new(),
            last_used: Instant::now(),
            due: None,
            _held: held,
            ready: VecDeque::new(),
            ready_bytes: 0,
            next_position: 0,
        }
    }

    /// Messages that wait.
    pub fn len(&self) -> usize {
        self.ready.len()
    }

    /// Appends a message; gives it back if the queue is full and refuses new ones.
    pub fn append(&mut self, message: Arc<Message>, held: Held) -> Result<(), Entry> {
        let ttl = match (message.expiration, self.arguments.message_ttl) {
            (Some(message), Some(queue)) => Some(message.min(queue)),
            (message, queue) => message.or(queue),
        };
        let expires = ttl.map(|ttl| Instant::now() + ttl);
        let position = self.next_position;
        let entry = Entry { message, redelivered: false, position, expires, _held: held };
        if self.refuses() {
            return Err(entry);
        }
        self.next_position += 1;
        self.ready_bytes += entry.message.body.len();
        self.ready.push_back(entry);
        Ok(())
    }

    /// Puts back, where it was, what a consumer has had.
    pub fn requeue(&mut self, mut entry: Entry) {
        entry.redelivered = true;
        self.ready_bytes += entry.message.body.len();
        let at = self.ready.partition_point(|other| other.position < entry.position);
        self.ready.insert(at, entry);
    }

    /// Takes the message that has waited longest.
    pub fn take(&mut self) -> Option<Entry> {
        let entry = self.ready.pop_front()?;
        self.ready_bytes -= entry.message.body.len();
        // A queue that was long once doesn't hold the room for ever.
        if self.ready.capacity() > 1024 && self.ready.len() < self.ready.capacity() / 4 {
            self.ready.shrink_to(self.ready.capacity() / 2);
        }
        Some(entry)
    }

    /// Takes the message that has waited longest, if its time is over. Only the head expires: a message
    /// behind it that should have gone before goes when it gets there, as in RabbitMQ.
    pub fn take_expired(&mut self, now: Instant) -> Option<Entry> {
        self.ready.front()?.expires.filter(|expires| *expires <= now)?;
        self.take()
    }

    /// Takes the message that has waited longest, if there are too many.
    pub fn take_excess(&mut self) -> Option<Entry> {
        if matches!(self.arguments.overflow, None | Some(Overflow::DropHead))
            && (self.arguments.max_length.is_some_and(|most| self.ready.len() > most)
                || self.arguments.max_length_bytes.is_some_and(|most| self.ready_bytes > most))
        {
            return self.take();
        }
        None
    }

    fn refuses(&self) -> bool {
        matches!(self.arguments.overflow, Some(Overflow::RejectPublish | Overflow::RejectPublishDlx))
            && (self.arguments.max_length.is_some_and(|most| self.ready.len() >= most)
                || self.arguments.max_length_bytes.is_some_and(|most| self.ready_bytes >= most))
    }

    /// Removes the messages that wait and are not wanted.
    pub fn retain(&mut self, wanted: impl Fn(&Message) -> bool) {
        self.ready.retain(|entry| wanted(&entry.message));
        self.ready_bytes = self.ready.iter().map(|entry| entry.message.body.len()).sum();
    }

    /// Removes all messages that wait; how many there were.
    pub fn purge(&mut self) -> usize {
        self.ready_bytes = 0;
        std::mem::take(&mut self.ready).len()
    }

    /// The next moment at which something may be over: its first message's time, or its own.
    pub fn next_due(&self) -> Option<Instant> {
        let of_head = self.ready.front().and_then(|entry| entry.expires);
        let own = self
            .arguments
            .expires
            .filter(|_| self.consumers.is_empty())
            .map(|expires| self.last_used + expires);
        of_head.into_iter().chain(own).min()
    }

    /// Whether it has been unused for as long as it may be.
    pub fn is_expired(&self, now: Instant) -> bool {
        let unused = |expires: Duration| self.consumers.is_empty() && self.last_used + expires <= now;
        self.arguments.expires.is_some_and(unused)
    }

    /// A consumer of it.
    pub fn consumer(&mut self, channel: ChannelId, tag: &str) -> Option<&mut Consumer> {
        self.consumers.iter_mut().find(|consumer| consumer.channel == channel && consumer.tag.as_str() == tag)
    }

    /// Whether some consumer insists on being the only one.
    pub fn has_exclusive_consumer(&self) -> bool {
        self.consumers.iter().any(|consumer| consumer.exclusive)
    }
}
