//! Outgoing messages: how they are delivered to consumers that have room, and how deliveries are settled.

use super::{
    channel::Unacked,
    definitions::count,
    exception::{Exception, Outcome},
    message::Reason,
    queue::Consumer,
    virtual_host::{ChannelId, QueueId, VirtualHost},
};
use amq_protocol::{
    protocol::{AMQPClass, basic},
    types::ShortString,
};
use std::collections::BTreeSet;
use tokio::time::Instant;
use uuid::Uuid;

/// The outcome of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The consumer has processed the message.
    Acked,
    /// The message goes back to its position in the queue.
    Requeued,
    /// The message goes to the dead-letter exchange, if the queue has one.
    Rejected,
}

impl VirtualHost {
    pub(super) fn consume(&mut self, at: ChannelId, consume: basic::Consume) -> Outcome {
        if consume.queue.as_str() == "amq.rabbitmq.reply-to" {
            return Err(Exception::not_implemented("direct reply-to"));
        }
        if consume.arguments.contains_key("x-priority") {
            return Err(Exception::not_implemented("consumer priorities"));
        }
        let id = self.named_queue(at, consume.queue.as_str())?;
        let held = self.hold_definition()?;
        let Some(channel) = self.channel(at) else {
            return Ok(());
        };
        let tag = match consume.consumer_tag {
            tag if tag.as_str().is_empty() => {
                ShortString::from(format!("amq.ctag-{}", Uuid::new_v4().simple()))
            }
            tag => tag,
        };
        if channel.consumes(tag.as_str()) {
            return Err(Exception::not_allowed(format!("attempt to reuse consumer tag '{tag}'")));
        }
        let prefetch = channel.prefetch;
        let Some(queue) = self.queues.get_mut(&id) else {
            return Ok(());
        };
        if queue.has_exclusive_consumer() || (consume.exclusive && !queue.consumers.is_empty()) {
            let name = &queue.name;
            return Err(Exception::access_refused(format!("queue '{name}' in vhost '/' in exclusive use")));
        }
        queue.consumers.push_back(Consumer {
            channel: at,
            tag: tag.clone(),
            no_ack: consume.no_ack,
            exclusive: consume.exclusive,
            prefetch,
            unacked: 0,
            _held: held,
        });
        if let Some(channel) = self.channel(at) {
            channel.remember_consumer(tag.clone(), id);
        }
        if !consume.nowait {
            self.reply(
                at,
                AMQPClass::Basic(basic::AMQPMethod::ConsumeOk(basic::ConsumeOk { consumer_tag: tag })),
            );
        }
        self.push(id);
        Ok(())
    }

    pub(super) fn cancel(&mut self, at: ChannelId, tag: &str) {
        if let Some(id) = self.channel(at).and_then(|channel| channel.forget_consumer(tag)) {
            self.remove_consumer(at, id, tag);
        }
    }

    fn remove_consumer(&mut self, at: ChannelId, id: QueueId, tag: &str) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        queue.consumers.retain(|consumer| consumer.channel != at || consumer.tag.as_str() != tag);
        queue.last_used = Instant::now();
        if queue.auto_delete && queue.consumers.is_empty() {
            self.delete_queues(&[id].into());
        } else {
            self.schedule(id);
        }
    }

    pub(super) fn get(&mut self, at: ChannelId, get: &basic::Get) -> Outcome {
        let id = self.named_queue(at, get.queue.as_str())?;
        let now = Instant::now();
        self.expire(id, now);
        let Some(queue) = self.queues.get_mut(&id) else {
            return Ok(());
        };
        queue.last_used = now;
        let Some(entry) = queue.take() else {
            self.reply(at, AMQPClass::Basic(basic::AMQPMethod::GetEmpty(basic::GetEmpty {})));
            return Ok(());
        };
        let message_count = count(queue.len());
        if let Some(peer) = self.peers.get_mut(&at.connection)
            && let Some(channel) = peer.channels.get_mut(&at.number)
        {
            let get_ok = basic::GetOk {
                delivery_tag: channel.next_delivery_tag(),
                redelivered: entry.redelivered,
                exchange: entry.message.exchange.clone(),
                routing_key: entry.message.routing_key.clone(),
                message_count,
            };
            let delivery_tag = get_ok.delivery_tag;
            let get_ok = AMQPClass::Basic(basic::AMQPMethod::GetOk(get_ok));
            peer.output.content(at.number, get_ok, &entry.message);
            if !get.no_ack {
                channel.unacked.insert(delivery_tag, Unacked { queue: id, consumer: None, entry });
            }
        }
        self.schedule(id);
        Ok(())
    }

    /// Delivers messages to the consumers in turn, one message at a time, while they have room.
    pub(super) fn deliver(&mut self, id: QueueId, now: Instant) {
        let mut without_room = 0;
        loop {
            self.expire(id, now);
            let Self { queues, peers, .. } = self;
            let Some(queue) = queues.get_mut(&id) else { return };
            if queue.len() == 0 || without_room == queue.consumers.len() {
                return;
            }
            let consumer = &mut queue.consumers[0];
            let peer = peers.get_mut(&consumer.channel.connection);
            let number = consumer.channel.number;
            let room = peer.and_then(|peer| {
                let channel = peer.channels.get_mut(&number)?;
                let has_room = consumer.has_room() && peer.output.has_room();
                has_room.then_some((channel, &mut peer.output))
            });
            let Some((channel, output)) = room else {
                without_room += 1;
                queue.consumers.rotate_left(1);
                continue;
            };
            without_room = 0;
            let (tag, no_ack) = (consumer.tag.clone(), consumer.no_ack);
            consumer.unacked += usize::from(!no_ack);
            queue.consumers.rotate_left(1);
            let Some(entry) = queue.take() else { return };
            let deliver = basic::Deliver {
                consumer_tag: tag.clone(),
                delivery_tag: channel.next_delivery_tag(),
                redelivered: entry.redelivered,
                exchange: entry.message.exchange.clone(),
                routing_key: entry.message.routing_key.clone(),
            };
            let delivery_tag = deliver.delivery_tag;
            output.content(number, AMQPClass::Basic(basic::AMQPMethod::Deliver(deliver)), &entry.message);
            if !no_ack {
                channel.unacked.insert(delivery_tag, Unacked { queue: id, consumer: Some(tag), entry });
            }
        }
    }

    /// Settles one delivery or, with `multiple`, all deliveries up to a tag. With `multiple` and tag 0,
    /// settles all deliveries of the channel.
    pub(super) fn settle(&mut self, at: ChannelId, tag: u64, multiple: bool, fate: Fate) -> Outcome {
        let Some(channel) = self.channel(at) else {
            return Ok(());
        };
        let settled = channel.take_unacked(tag, multiple)?;
        let queues = self.settle_all(at, settled, fate);
        for id in queues {
            self.push(id);
        }
        Ok(())
    }

    /// Settles these deliveries, and returns their queues, which may now be able to deliver more messages.
    fn settle_all(&mut self, at: ChannelId, settled: Vec<Unacked>, fate: Fate) -> BTreeSet<QueueId> {
        let mut queues = BTreeSet::new();
        for Unacked { queue: id, consumer, entry } in settled {
            // A deleted queue has no messages, so the delivery is forgotten.
            let Some(queue) = self.queues.get_mut(&id) else { continue };
            if let Some(consumer) = consumer.and_then(|tag| queue.consumer(at, tag.as_str())) {
                consumer.unacked = consumer.unacked.saturating_sub(1);
            }
            queues.insert(id);
            match fate {
                Fate::Acked => {}
                Fate::Requeued => {
                    if let Err(entry) = queue.requeue(entry) {
                        self.dead_letter(id, entry, Reason::DeliveryLimit);
                    }
                }
                Fate::Rejected => self.dead_letter(id, entry, Reason::Rejected),
            }
        }
        queues
    }

    /// Removes a channel, requeues its unacknowledged deliveries, and removes its consumers.
    pub(super) fn close_channel(&mut self, at: ChannelId) {
        let Some(peer) = self.peers.get_mut(&at.connection) else { return };
        let Some(channel) = peer.channels.remove(&at.number) else { return };
        peer.assembling -= channel.assembling();
        peer.confirming.remove(&at.number);
        let consumers = channel.consumers;
        // Requeueing comes first, because an auto-delete queue is deleted with its last consumer.
        let unacked = channel.unacked.into_values().collect();
        let queues = self.settle_all(at, unacked, Fate::Requeued);
        for (tag, id) in consumers {
            self.remove_consumer(at, id, tag.as_str());
        }
        for id in queues {
            self.push(id);
        }
    }
}
