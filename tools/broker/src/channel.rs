//! A channel: what a client has going on it.

use super::{
    content::Content,
    exception::{Exception, Outcome},
    output::Output,
    queue::{Consumer, Entry},
    virtual_host::QueueId,
};
use amq_protocol::{
    protocol::{AMQPClass, basic},
    types::ShortString,
};
use std::collections::{BTreeMap, HashMap};

/// The highest channel number.
pub const CHANNEL_MAX: u16 = 2047;

/// A channel that is open, or of which the client has not yet said that it knows it to be closed.
#[derive(Debug, Default)]
pub struct Channel {
    /// Deliveries that were not acknowledged, by their tag.
    pub unacked: BTreeMap<u64, Unacked>,
    /// How many of them went to consumers.
    pub unacked_of_consumers: usize,
    /// For consumers to come; 0 is no limit.
    pub prefetch: u16,
    /// For all consumers together; 0 is no limit.
    pub global_prefetch: u16,
    /// What an empty queue name stands for.
    pub last_queue: ShortString,
    /// Which queue each consumer is at, by its tag.
    pub consumers: HashMap<ShortString, QueueId>,
    /// Whether it was closed for an error, and the client does not know yet.
    pub is_closing: bool,
    delivery_tag: u64,
    /// What is being published.
    pub content: Option<Content>,
    confirms: Option<Confirms>,
}

/// A delivery that was not acknowledged.
#[derive(Debug)]
pub struct Unacked {
    /// Where it came from.
    pub queue: QueueId,
    /// Who got it, unless it was asked for by `basic.get`.
    pub consumer: Option<ShortString>,
    /// What it was.
    pub entry: Entry,
}

#[derive(Debug, Default)]
struct Confirms {
    published: u64,
    pending: Vec<Confirm>,
}

/// So many messages up to this one, with the same outcome.
#[derive(Debug)]
struct Confirm {
    last: u64,
    count: usize,
    is_taken: bool,
}

impl Channel {
    /// One that was closed for an error.
    pub(super) fn closing() -> Self {
        Self { is_closing: true, ..Self::default() }
    }

    pub(super) fn next_delivery_tag(&mut self) -> u64 {
        self.delivery_tag += 1;
        self.delivery_tag
    }

    pub(super) fn has_room_for(&self, consumer: &Consumer) -> bool {
        let below = |most: u16, unacked: usize| most == 0 || unacked < most.into();
        consumer.no_ack
            || (below(consumer.prefetch, consumer.unacked)
                && below(self.global_prefetch, self.unacked_of_consumers))
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

    /// Bytes of a message of which parts have come.
    pub(super) fn assembling(&self) -> usize {
        self.content.as_ref().map_or(0, Content::len)
    }

    /// Takes deliveries that are settled now: one, or all up to it, or (tag 0) all.
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

    /// Wants confirms from now on.
    pub(super) fn select_confirms(&mut self) {
        self.confirms.get_or_insert_default();
    }

    /// Notes what became of a message; whether anyone wants to know.
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

    /// Tells what became of messages, of several at once if it was the same: `multiple`.
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
