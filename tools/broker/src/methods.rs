//! The methods that a client sends on a channel.

use super::{
    channel::{CHANNEL_MAX, Channel},
    definitions::count,
    delivery::Fate,
    exception::{Exception, Outcome},
    frames::Frame,
    virtual_host::{ChannelId, VirtualHost},
};
use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, exchange, queue};

impl VirtualHost {
    /// Handles a frame that a client sent on a channel. Returns only errors that end the connection. For an
    /// error that ends only the channel, this function closes the channel.
    pub fn channel_frame(&mut self, at: ChannelId, frame: Frame) -> Outcome {
        let method = match &frame {
            Frame::Method(_, method) => (method.get_amqp_class_id(), method.get_amqp_method_id()),
            // Headers and bodies belong to a `basic.publish`, so their errors name this method.
            _ => (60, 40),
        };
        let outcome = match frame {
            Frame::Method(_, method) => self.method(at, method),
            Frame::Header(_, size, properties, raw_properties) => {
                self.header(at, size, *properties, raw_properties)
            }
            Frame::Body(_, part) => self.body(at, &part),
            Frame::Heartbeat => Ok(()),
        };
        let outcome = match outcome.map_err(|exception| exception.of(method)) {
            Err(exception) if !exception.is_hard() => {
                self.close_with(at, &exception);
                Ok(())
            }
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

    /// Closes a channel because of an error, and keeps its number reserved until the client sends `close-ok`.
    fn close_with(&mut self, at: ChannelId, exception: &Exception) {
        let (class_id, method_id) = exception.method();
        self.flush_confirms(at.connection);
        self.close_channel(at);
        if let Some(peer) = self.peers.get_mut(&at.connection) {
            peer.channels.insert(at.number, Channel::closing());
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

    fn method(&mut self, at: ChannelId, method: AMQPClass) -> Outcome {
        let Some(channel) = self.channel(at) else {
            return self.open(at, &method);
        };
        if channel.is_closing {
            // Until `close-ok` arrives, the client may still send methods on the closed channel.
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
            return Err(Exception::unexpected_frame("a method, although a message is still incomplete"));
        }
        if let AMQPClass::Basic(basic::AMQPMethod::Publish(publish)) = method {
            return self.begin_publish(at, publish);
        }
        // Confirms of earlier messages precede the answer to this method.
        self.flush_confirms(at.connection);
        match method {
            AMQPClass::Basic(method) => self.basic(at, method),
            AMQPClass::Queue(method) => self.queue(at, method),
            AMQPClass::Exchange(method) => self.exchange(at, method),
            AMQPClass::Channel(method) => self.channel_method(at, method),
            AMQPClass::Confirm(confirm::AMQPMethod::Select(select)) => {
                if let Some(channel) = self.channel(at) {
                    channel.select_confirms();
                }
                if !select.nowait {
                    self.reply(at, AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(confirm::SelectOk {})));
                }
                Ok(())
            }
            AMQPClass::Access(_) => Err(Exception::not_implemented("access.request")),
            AMQPClass::Tx(_) => Err(Exception::not_implemented("transactions")),
            AMQPClass::Connection(_) | AMQPClass::Confirm(_) => Err(not_for_a_server()),
        }
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
            Method::Qos(qos) if qos.global => Err(Exception::not_implemented("global=true")),
            Method::Qos(qos) => {
                if let Some(channel) = self.channel(at) {
                    channel.prefetch = qos.prefetch_count;
                }
                self.reply(at, AMQPClass::Basic(Method::QosOk(basic::QosOk {})));
                Ok(())
            }
            Method::Recover(_) | Method::RecoverAsync(_) => Err(Exception::not_implemented("basic.recover")),
            // The client answers a `basic.cancel`, although the broker sent it with `nowait`.
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
            Method::Flow(_) => Err(Exception::not_implemented("channel.flow")),
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
