//! A channel: what a client has going on it, and what it asks for, method by method.

use super::{
    definitions::count,
    delivery::Fate,
    exception::{Exception, Outcome},
    frames::Frame,
    output::Output,
    queue::{Consumer, Entry},
    virtual_host::{ChannelId, QueueId, VirtualHost},
};
use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, access, basic, channel, confirm, exchange, queue},
    types::ShortString,
};
use std::collections::{BTreeMap, HashMap};

/// The highest channel number.
pub const CHANNEL_MAX: u16 = 2047;

/// The largest body of a message, in bytes: that of RabbitMQ 4.
pub const MAX_BODY: u64 = 16 * 1024 * 1024;

/// Bytes of messages that a connection may have begun and not finished, on all its channels.
const MAX_ASSEMBLING: usize = 2 * MAX_BODY as usize;

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
    is_closing: bool,
    delivery_tag: u64,
    confirms: Option<Confirms>,
    content: Option<Content>,
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

/// A message of which parts have come.
#[derive(Debug)]
pub struct Content {
    /// How it is to be published.
    pub publish: basic::Publish,
    /// Its properties.
    pub properties: BasicProperties,
    /// The same as they came.
    pub raw_properties: Vec<u8>,
    /// What has come of its body.
    pub body: Vec<u8>,
    /// How long that will be, once the header has come.
    size: Option<u64>,
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

impl Content {
    fn len(&self) -> usize {
        self.raw_properties.len() + self.body.len()
    }
}

impl Channel {
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

impl VirtualHost {
    /// Takes a frame that a client sent on a channel. An error is one of the connection: one of the channel
    /// closes the channel.
    pub fn channel_frame(&mut self, at: ChannelId, frame: Frame) -> Outcome {
        let method = match &frame {
            Frame::Method(_, method) => (method.get_amqp_class_id(), method.get_amqp_method_id()),
            // What else goes wrong goes wrong with a `basic.publish`.
            _ => (60, 40),
        };
        let outcome = match frame {
            Frame::Method(_, method) => self.method(at, method),
            Frame::Header(_, size, properties, raw_properties) => {
                self.header(at, size, properties, raw_properties)
            }
            Frame::Body(_, part) => self.body(at, &part),
            Frame::Heartbeat => Ok(()),
        };
        let outcome = match outcome.map_err(|exception| exception.of(method)) {
            Err(exception) if !exception.is_hard() => Ok(self.close_with(at, &exception)),
            outcome => outcome,
        };
        self.settle_dead_letters();
        outcome
    }

    pub(super) fn channel(&mut self, at: ChannelId) -> Option<&mut Channel> {
        self.peers.get_mut(&at.connection)?.channels.get_mut(&at.number)
    }

    pub(super) fn reply(&mut self, at: ChannelId, method: AMQPClass) {
        if let Some(peer) = self.peers.get_mut(&at.connection) {
            peer.output.method(at.number, method);
        }
    }

    /// Closes a channel for an error, and remembers its number until the client knows.
    fn close_with(&mut self, at: ChannelId, exception: &Exception) {
        let (class_id, method_id) = exception.method();
        self.flush_confirms(at.connection);
        self.close_channel(at);
        if let Some(peer) = self.peers.get_mut(&at.connection) {
            peer.channels.insert(at.number, Channel { is_closing: true, ..Channel::default() });
        }
        let close = channel::Close {
            reply_code: exception.code(),
            reply_text: exception.text(),
            class_id,
            method_id,
        };
        self.reply(at, AMQPClass::Channel(channel::AMQPMethod::Close(close)));
    }

    fn open(&mut self, at: ChannelId, method: &AMQPClass) -> Outcome {
        if !matches!(method, AMQPClass::Channel(channel::AMQPMethod::Open(_))) {
            return Err(Exception::channel_error("expected 'channel.open'"));
        }
        if at.number > CHANNEL_MAX {
            return Err(Exception::not_allowed(format!("channel numbers end at {CHANNEL_MAX}")));
        }
        if let Some(peer) = self.peers.get_mut(&at.connection) {
            peer.channels.insert(at.number, Channel::default());
        }
        self.reply(at, AMQPClass::Channel(channel::AMQPMethod::OpenOk(channel::OpenOk {})));
        Ok(())
    }

    fn header(
        &mut self,
        at: ChannelId,
        size: u64,
        properties: BasicProperties,
        raw_properties: Vec<u8>,
    ) -> Outcome {
        let Some(peer) = self.peers.get_mut(&at.connection) else {
            return Ok(());
        };
        let Some(channel) = peer.channels.get_mut(&at.number) else {
            return Err(Exception::channel_error("expected 'channel.open'"));
        };
        if channel.is_closing {
            return Ok(());
        }
        let Some(content) = channel.content.as_mut().filter(|content| content.size.is_none()) else {
            return Err(Exception::unexpected_frame("a content header, but no content is due"));
        };
        if size > MAX_BODY {
            let text = format!("message size {size} is larger than configured max size {MAX_BODY}");
            return Err(Exception::precondition_failed(text));
        }
        peer.assembling += raw_properties.len();
        (content.size, content.properties, content.raw_properties) = (Some(size), properties, raw_properties);
        self.publish_if_complete(at)
    }

    fn body(&mut self, at: ChannelId, part: &[u8]) -> Outcome {
        let Some(peer) = self.peers.get_mut(&at.connection) else {
            return Ok(());
        };
        let Some(channel) = peer.channels.get_mut(&at.number) else {
            return Err(Exception::channel_error("expected 'channel.open'"));
        };
        if channel.is_closing {
            return Ok(());
        }
        let Some((content, size)) =
            channel.content.as_mut().and_then(|content| content.size.map(|size| (content, size)))
        else {
            return Err(Exception::unexpected_frame("a content body, but none is due"));
        };
        if (content.body.len() + part.len()) as u64 > size {
            return Err(Exception::unexpected_frame("a body that is longer than its header said"));
        }
        content.body.extend_from_slice(part);
        peer.assembling += part.len();
        if peer.assembling > MAX_ASSEMBLING {
            return Err(Exception::resource_error("too many large messages at once"));
        }
        self.publish_if_complete(at)
    }

    fn publish_if_complete(&mut self, at: ChannelId) -> Outcome {
        let Some(peer) = self.peers.get_mut(&at.connection) else {
            return Ok(());
        };
        let Some(channel) = peer.channels.get_mut(&at.number) else {
            return Ok(());
        };
        match channel.content.take_if(|content| content.size == Some(content.body.len() as u64)) {
            Some(content) => {
                peer.assembling -= content.len();
                self.publish(at, content)
            }
            None => Ok(()),
        }
    }

    fn method(&mut self, at: ChannelId, method: AMQPClass) -> Outcome {
        let Some(channel) = self.channel(at) else {
            return self.open(at, &method);
        };
        if channel.is_closing {
            // The client did not know yet, or does now.
            match method {
                AMQPClass::Channel(channel::AMQPMethod::CloseOk(_)) => self.close_channel(at),
                AMQPClass::Channel(channel::AMQPMethod::Close(_)) => {
                    self.reply(at, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})));
                }
                _ => {}
            }
            return Ok(());
        }
        if channel.content.is_some() {
            return Err(Exception::unexpected_frame("a method, but a message is not complete"));
        }
        if let AMQPClass::Basic(basic::AMQPMethod::Publish(publish)) = method {
            return self.begin_publish(at, publish);
        }
        // What was published before is confirmed before anything else is answered.
        self.flush_confirms(at.connection);
        match method {
            AMQPClass::Basic(method) => self.basic(at, method),
            AMQPClass::Queue(method) => self.queue(at, method),
            AMQPClass::Exchange(method) => self.exchange(at, method),
            AMQPClass::Channel(method) => self.channel_method(at, method),
            AMQPClass::Confirm(confirm::AMQPMethod::Select(select)) => {
                if let Some(channel) = self.channel(at) {
                    channel.confirms.get_or_insert_default();
                }
                if !select.nowait {
                    self.reply(at, AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(confirm::SelectOk {})));
                }
                Ok(())
            }
            // Of AMQP 0-8; some clients still ask.
            AMQPClass::Access(access::AMQPMethod::Request(_)) => {
                self.reply(at, AMQPClass::Access(access::AMQPMethod::RequestOk(access::RequestOk {})));
                Ok(())
            }
            AMQPClass::Tx(_) => Err(Exception::not_implemented("transactions")),
            AMQPClass::Connection(_) | AMQPClass::Confirm(_) | AMQPClass::Access(_) => {
                Err(not_for_a_server())
            }
        }
    }

    fn begin_publish(&mut self, at: ChannelId, publish: basic::Publish) -> Outcome {
        if publish.immediate {
            return Err(Exception::not_implemented("immediate=true"));
        }
        if let Some(peer) = self.peers.get_mut(&at.connection) {
            peer.publishes = true;
        }
        if let Some(channel) = self.channel(at) {
            channel.content = Some(Content {
                publish,
                properties: BasicProperties::default(),
                raw_properties: Vec::new(),
                body: Vec::new(),
                size: None,
            });
        }
        Ok(())
    }

    fn basic(&mut self, at: ChannelId, method: basic::AMQPMethod) -> Outcome {
        use basic::AMQPMethod as Method;

        match method {
            Method::Ack(ack) => self.settle(at, ack.delivery_tag, ack.multiple, Fate::Acked),
            Method::Nack(nack) => self.settle(at, nack.delivery_tag, nack.multiple, unwanted(nack.requeue)),
            Method::Reject(reject) => self.settle(at, reject.delivery_tag, false, unwanted(reject.requeue)),
            Method::Consume(consume) => self.consume(at, consume),
            Method::Get(get) => self.get(at, &get),
            Method::Cancel(cancel) => {
                self.cancel(at, cancel.consumer_tag.as_str());
                if !cancel.nowait {
                    let ok = basic::CancelOk { consumer_tag: cancel.consumer_tag };
                    self.reply(at, AMQPClass::Basic(Method::CancelOk(ok)));
                }
                Ok(())
            }
            Method::Qos(qos) => {
                let Some(channel) = self.channel(at) else { return Ok(()) };
                if qos.global {
                    channel.global_prefetch = qos.prefetch_count;
                } else {
                    channel.prefetch = qos.prefetch_count;
                }
                let queues: Vec<_> = channel.consumed_queues().collect();
                self.reply(at, AMQPClass::Basic(Method::QosOk(basic::QosOk {})));
                for id in queues {
                    self.push(id);
                }
                Ok(())
            }
            Method::Recover(basic::Recover { requeue })
            | Method::RecoverAsync(basic::RecoverAsync { requeue })
                if !requeue =>
            {
                Err(Exception::not_implemented("requeue=false"))
            }
            Method::Recover(_) => {
                let queues = self.recover(at);
                self.reply(at, AMQPClass::Basic(Method::RecoverOk(basic::RecoverOk {})));
                queues.into_iter().for_each(|id| self.push(id));
                Ok(())
            }
            Method::RecoverAsync(_) => {
                self.recover(at).into_iter().for_each(|id| self.push(id));
                Ok(())
            }
            // In answer to one that was sent with `nowait`.
            Method::CancelOk(_) => Ok(()),
            _ => Err(not_for_a_server()),
        }
    }

    fn queue(&mut self, at: ChannelId, method: queue::AMQPMethod) -> Outcome {
        use queue::AMQPMethod as Method;

        let (reply, nowait) = match method {
            Method::Declare(declare) => {
                let nowait = declare.nowait;
                (Method::DeclareOk(self.declare_queue(at, declare)?), nowait)
            }
            Method::Bind(bind) => {
                let nowait = bind.nowait;
                self.bind(at, bind)?;
                (Method::BindOk(queue::BindOk {}), nowait)
            }
            Method::Unbind(unbind) => {
                self.unbind(at, &unbind)?;
                (Method::UnbindOk(queue::UnbindOk {}), false)
            }
            Method::Purge(purge) => {
                let message_count = count(self.purge(at, &purge)?);
                (Method::PurgeOk(queue::PurgeOk { message_count }), purge.nowait)
            }
            Method::Delete(delete) => {
                let message_count = count(self.delete_queue(at, &delete)?);
                (Method::DeleteOk(queue::DeleteOk { message_count }), delete.nowait)
            }
            _ => return Err(not_for_a_server()),
        };
        if !nowait {
            self.reply(at, AMQPClass::Queue(reply));
        }
        Ok(())
    }

    fn exchange(&mut self, at: ChannelId, method: exchange::AMQPMethod) -> Outcome {
        use exchange::AMQPMethod as Method;

        let (reply, nowait) = match method {
            Method::Declare(declare) => {
                let nowait = declare.nowait;
                self.declare_exchange(declare)?;
                (Method::DeclareOk(exchange::DeclareOk {}), nowait)
            }
            Method::Delete(delete) => {
                self.delete_exchange(&delete)?;
                (Method::DeleteOk(exchange::DeleteOk {}), delete.nowait)
            }
            Method::Bind(_) | Method::Unbind(_) => {
                return Err(Exception::not_implemented("bindings between exchanges"));
            }
            _ => return Err(not_for_a_server()),
        };
        if !nowait {
            self.reply(at, AMQPClass::Exchange(reply));
        }
        Ok(())
    }

    fn channel_method(&mut self, at: ChannelId, method: channel::AMQPMethod) -> Outcome {
        use channel::AMQPMethod as Method;

        match method {
            Method::Open(_) => Err(Exception::channel_error("second 'channel.open' seen")),
            Method::Close(_) => {
                self.close_channel(at);
                self.reply(at, AMQPClass::Channel(Method::CloseOk(channel::CloseOk {})));
                Ok(())
            }
            Method::Flow(flow) if flow.active => {
                self.reply(at, AMQPClass::Channel(Method::FlowOk(channel::FlowOk { active: true })));
                Ok(())
            }
            Method::Flow(_) => Err(Exception::not_implemented("active=false")),
            _ => Err(not_for_a_server()),
        }
    }
}

fn unwanted(requeue: bool) -> Fate {
    if requeue { Fate::Requeued } else { Fate::Rejected }
}

fn not_for_a_server() -> Exception {
    Exception::command_invalid("unimplemented method")
}
