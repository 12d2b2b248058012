//! A channel: its consumers, its unacknowledged deliveries, and its confirms.

use super::{
    content::Content,
    exception::{Exception, Outcome},
    output::Output,
    queue::Entry,
    virtual_host::QueueId,
};
use amq_protocol::{
    protocol::{AMQPClass, basic},
    types::ShortString,
};
use std::collections::{BTreeMap, HashMap};

/// The highest channel number.
pub const CHANNEL_MAX: u16 = 2047;

/// A channel that is open, or that the broker has closed, but for which the client has not sent `close-ok`
/// yet.
#[derive(Debug, Default)]
pub struct Channel {
    /// Deliveries that the client has not acknowledged, by their delivery tag.
    pub unacked: BTreeMap<u64, Unacked>,
    /// The prefetch count of each future consumer; 0 means no limit.
    pub prefetch: u16,
    /// The queue that was declared last on this channel. An empty queue name stands for this queue.
    pub last_queue: ShortString,
    /// The queue of each consumer, by consumer tag.
    pub consumers: HashMap<ShortString, QueueId>,
    /// Whether the broker closed the channel because of an error, and `close-ok` is still due.
    pub is_closing: bool,
    delivery_tag: u64,
    /// The message that the client is publishing.
    pub content: Option<Content>,
    confirms: Option<Confirms>,
}

/// A delivery that the client has not acknowledged.
#[derive(Debug)]
pub struct Unacked {
    /// The queue of the message.
    pub queue: QueueId,
    /// The consumer that got the delivery, or `None` after `basic.get`.
    pub consumer: Option<ShortString>,
    /// The message as its queue held it.
    pub entry: Entry,
}

#[derive(Debug, Default)]
struct Confirms {
    published: u64,
    pending: Vec<Confirm>,
}

/// A confirm of `count` consecutive messages with the same outcome. `last` is the number of the last message.
#[derive(Debug)]
struct Confirm {
    last: u64,
    count: usize,
    is_taken: bool,
}

impl Channel {
    /// Creates the state of a channel that the broker has closed because of an error.
    pub(super) fn closing() -> Self {
        Self { is_closing: true, ..Self::default() }
    }

    pub(super) fn next_delivery_tag(&mut self) -> u64 {
        self.delivery_tag += 1;
        self.delivery_tag
    }

    pub(super) fn consumes(&self, tag: &str) -> bool {
        self.consumers.contains_key(tag)
    }

    pub(super) fn consumed_queues(&self) -> impl Iterator<Item = QueueId> {
        self.consumers.values().copied()
    }

    pub(super) fn remember_consumer(&mut self, tag: ShortString, queue: QueueId) {
        self.consumers.insert(tag, queue);
    }

    pub(super) fn forget_consumer(&mut self, tag: &str) -> Option<QueueId> {
        self.consumers.remove(tag)
    }

    /// Returns how many bytes of an incomplete message have been received.
    pub(super) fn assembling(&self) -> usize {
        self.content.as_ref().map_or(0, Content::len)
    }

    /// Removes and returns the deliveries that a tag settles: one delivery or, with `multiple`, all
    /// deliveries up to the tag. With `multiple` and tag 0, these are all deliveries of the channel.
    pub(super) fn take_unacked(&mut self, tag: u64, multiple: bool) -> Outcome<Vec<Unacked>> {
        if multiple && tag == 0 {
            return Ok(std::mem::take(&mut self.unacked).into_values().collect());
        }
        if !self.unacked.contains_key(&tag) {
            return Err(Exception::precondition_failed(format!("unknown delivery tag {tag}")));
        }
        if multiple {
            let later = self.unacked.split_off(&(tag + 1));
            return Ok(std::mem::replace(&mut self.unacked, later).into_values().collect());
        }
        Ok(self.unacked.remove(&tag).into_iter().collect())
    }

    /// Puts the channel into confirm mode.
    pub(super) fn select_confirms(&mut self) {
        self.confirms.get_or_insert_default();
    }

    /// Records whether the queues took a published message, so that the broker can confirm the message later.
    /// Returns false if the channel is not in confirm mode.
    pub(super) fn confirm(&mut self, is_taken: bool) -> bool {
        let Some(confirms) = &mut self.confirms else {
            return false;
        };
        confirms.published += 1;
        let last = confirms.published;
        match confirms.pending.last_mut() {
            Some(confirm) if confirm.is_taken == is_taken => {
                confirm.last = last;
                confirm.count += 1;
            }
            _ => confirms.pending.push(Confirm { last, count: 1, is_taken }),
        }
        true
    }

    /// Sends the pending confirms. Consecutive messages with the same outcome share a confirm (`multiple`).
    pub(super) fn flush_confirms(&mut self, number: u16, output: &mut Output) {
        for Confirm { last, count, is_taken } in self.confirms.iter_mut().flat_map(|c| c.pending.drain(..)) {
            let multiple = count > 1;
            output.method(
                number,
                AMQPClass::Basic(if is_taken {
                    basic::AMQPMethod::Ack(basic::Ack { delivery_tag: last, multiple })
                } else {
                    basic::AMQPMethod::Nack(basic::Nack { delivery_tag: last, multiple, requeue: false })
                }),
            );
        }
    }
}
