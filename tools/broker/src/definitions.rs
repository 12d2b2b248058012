//! Declaring, finding and deleting exchanges, queues and bindings.

use super::{
    arguments::{self, Arguments, QueueType},
    exception::{Exception, Outcome},
    exchange::{Binding, Exchange, Kind},
    memory::Held,
    queue::Queue,
    virtual_host::{ChannelId, ConnectionId, QueueId, VirtualHost},
};
use amq_protocol::{
    protocol::{AMQPClass, basic, exchange, queue},
    types::ShortString,
};
use std::collections::HashSet;
use tokio::time::Instant;
use uuid::Uuid;

/// The highest number of queues. The number is limited because some operations go through all queues.
const MAX_QUEUES: usize = 10_000;

impl VirtualHost {
    pub(super) fn declare_exchange(&mut self, declare: exchange::Declare) -> Outcome {
        let name = declare.exchange.as_str();
        if name.is_empty() {
            return Err(on_default_exchange());
        }
        let existing = self.exchanges.get(name);
        if declare.passive {
            return existing.map(drop).ok_or_else(|| no_exchange(name));
        }
        let kind = Kind::parse(declare.kind.as_str())?;
        let alternate = match declare.arguments.inner().get("alternate-exchange") {
            None => None,
            Some(value) => Some(arguments::string(value).ok_or_else(|| {
                let text = format!("invalid arg 'alternate-exchange' for exchange '{name}' in vhost '/'");
                Exception::precondition_failed(text)
            })?),
        };
        if let Some(exchange) = existing {
            let difference = [
                ("type", exchange.kind == kind),
                ("durable", exchange.durable == declare.durable),
                ("auto_delete", exchange.auto_delete == declare.auto_delete),
                ("internal", exchange.internal == declare.internal),
                ("alternate-exchange", exchange.alternate == alternate),
            ];
            let difference = difference.into_iter().find(|(_, is_same)| !is_same);
            return difference.map_or(Ok(()), |(arg, _)| Err(inequivalent(arg, "exchange", name)));
        }
        check_reserved("exchange", name)?;
        let held = self.hold_definition()?;
        let exchange = Exchange {
            kind,
            durable: declare.durable,
            auto_delete: declare.auto_delete,
            internal: declare.internal,
            alternate,
            bindings: Vec::new(),
            _held: held,
        };
        self.exchanges.insert(declare.exchange, exchange);
        Ok(())
    }

    pub(super) fn delete_exchange(&mut self, delete: &exchange::Delete) -> Outcome {
        let name = delete.exchange.as_str();
        if name.is_empty() {
            return Err(on_default_exchange());
        }
        check_reserved("exchange", name)?;
        let Some(exchange) = self.exchanges.get(name) else {
            return Ok(());
        };
        if delete.if_unused && !exchange.bindings.is_empty() {
            return Err(Exception::precondition_failed(format!("exchange '{name}' in vhost '/' in use")));
        }
        self.exchanges.remove(name);
        Ok(())
    }

    pub(super) fn declare_queue(
        &mut self,
        at: ChannelId,
        declare: queue::Declare,
    ) -> Outcome<queue::DeclareOk> {
        let name = if declare.queue.as_str().is_empty() && !declare.passive {
            ShortString::from(format!("amq.gen-{}", Uuid::new_v4().simple()))
        } else {
            declare.queue.clone()
        };
        let id = match self.queue_ids.get(name.as_str()) {
            Some(&id) => {
                let declared = (!declare.passive).then_some(&declare);
                self.check_declared(at.connection, id, declared)?;
                id
            }
            None if declare.passive => return Err(no_queue(name.as_str())),
            None => self.add_queue(at.connection, name.clone(), &declare)?,
        };
        if let Some(channel) = self.channel(at) {
            channel.last_queue = name.clone();
        }
        self.schedule(id);
        let (messages, consumers) =
            self.queues.get(&id).map_or((0, 0), |queue| (queue.len(), queue.consumers.len()));
        Ok(queue::DeclareOk { queue: name, message_count: count(messages), consumer_count: count(consumers) })
    }

    /// Checks that an existing queue may be declared again with `declare`. `None` stands for a passive
    /// declaration.
    fn check_declared(
        &mut self,
        connection: ConnectionId,
        id: QueueId,
        declare: Option<&queue::Declare>,
    ) -> Outcome {
        let Some(queue) = self.queues.get_mut(&id) else {
            return Ok(());
        };
        let name = queue.name.as_str();
        let is_locked = queue.owner.is_some_and(|owner| owner != connection);
        if is_locked || declare.is_some_and(|declare| declare.exclusive != queue.owner.is_some()) {
            return Err(locked(name));
        }
        queue.last_used = Instant::now();
        let Some(declare) = declare else {
            return Ok(());
        };
        let arguments = Arguments::parse(name, &declare.arguments)?;
        let difference = if queue.durable != is_durable(declare) {
            Some("durable")
        } else if queue.auto_delete != declare.auto_delete {
            Some("auto_delete")
        } else {
            queue.arguments.difference(&arguments)
        };
        difference.map_or(Ok(()), |arg| Err(inequivalent(arg, "queue", name)))
    }

    fn add_queue(
        &mut self,
        connection: ConnectionId,
        name: ShortString,
        declare: &queue::Declare,
    ) -> Outcome<QueueId> {
        check_reserved("queue", declare.queue.as_str())?;
        let arguments = Arguments::parse(name.as_str(), &declare.arguments)?;
        if arguments.queue_type == QueueType::Quorum {
            let unfit = [
                ("durable", !is_durable(declare)),
                ("exclusive-owner", declare.exclusive),
                ("auto-delete", declare.auto_delete),
            ];
            if let Some((property, _)) = unfit.into_iter().find(|(_, is_unfit)| *is_unfit) {
                let text = format!("invalid property '{property}' for queue '{name}' in vhost '/'");
                return Err(Exception::precondition_failed(text));
            }
        }
        if self.queues.len() >= MAX_QUEUES {
            return Err(Exception::resource_error("too many queues"));
        }
        let held = self.hold_definition()?;
        let owner = declare.exclusive.then_some(connection);
        let id = self.next_queue_id();
        let queue =
            Queue::new(name.clone(), is_durable(declare), declare.auto_delete, owner, arguments, held);
        self.queues.insert(id, queue);
        self.queue_ids.insert(name, id);
        Ok(id)
    }

    pub(super) fn bind(&mut self, at: ChannelId, bind: queue::Bind) -> Outcome {
        let queue = self.named_queue(at, bind.queue.as_str())?;
        // If the method names neither a queue nor a routing key, the routing key is the name of the queue.
        let key = if bind.queue.as_str().is_empty() && bind.routing_key.as_str().is_empty() {
            self.queues.get(&queue).map(|queue| queue.name.clone()).unwrap_or_default()
        } else {
            bind.routing_key
        };
        let held = self.hold_definition();
        let bindings = self.bindings(bind.exchange.as_str())?;
        if !bindings.iter().any(|binding| binding.queue == queue && binding.key == key) {
            bindings.push(Binding { queue, key, _held: held? });
        }
        Ok(())
    }

    pub(super) fn unbind(&mut self, at: ChannelId, unbind: &queue::Unbind) -> Outcome {
        let queue = self.named_queue(at, unbind.queue.as_str())?;
        let bindings = self.bindings(unbind.exchange.as_str())?;
        let before = bindings.len();
        bindings.retain(|binding| binding.queue != queue || binding.key != unbind.routing_key);
        let was_last = bindings.is_empty() && before > 0;
        if was_last
            && self.exchanges.get(unbind.exchange.as_str()).is_some_and(|exchange| exchange.auto_delete)
        {
            self.exchanges.remove(unbind.exchange.as_str());
        }
        Ok(())
    }

    fn bindings(&mut self, exchange: &str) -> Outcome<&mut Vec<Binding>> {
        if exchange.is_empty() {
            return Err(on_default_exchange());
        }
        let exchange = self.exchanges.get_mut(exchange).ok_or_else(|| no_exchange(exchange))?;
        Ok(&mut exchange.bindings)
    }

    pub(super) fn purge(&mut self, at: ChannelId, purge: &queue::Purge) -> Outcome<usize> {
        let id = self.named_queue(at, purge.queue.as_str())?;
        Ok(self.queues.get_mut(&id).map_or(0, Queue::purge))
    }

    pub(super) fn delete_queue(&mut self, at: ChannelId, delete: &queue::Delete) -> Outcome<usize> {
        let id = match self.named_queue(at, delete.queue.as_str()) {
            Ok(id) => id,
            // A queue that does not exist need not be deleted.
            Err(exception) if exception.code() == 404 && !delete.queue.as_str().is_empty() => return Ok(0),
            Err(exception) => return Err(exception),
        };
        let Some(queue) = self.queues.get(&id) else {
            return Ok(0);
        };
        let name = queue.name.as_str();
        if delete.if_unused && !queue.consumers.is_empty() {
            return Err(Exception::precondition_failed(format!("queue '{name}' in vhost '/' in use")));
        }
        if delete.if_empty && queue.len() > 0 {
            return Err(Exception::precondition_failed(format!("queue '{name}' in vhost '/' is not empty")));
        }
        let messages = queue.len();
        self.delete_queues(&[id].into());
        Ok(messages)
    }

    /// Deletes queues and their bindings, and cancels their consumers.
    pub(super) fn delete_queues(&mut self, ids: &HashSet<QueueId>) {
        if ids.is_empty() {
            return;
        }
        for &id in ids {
            let Some(queue) = self.queues.remove(&id) else { continue };
            self.queue_ids.remove(queue.name.as_str());
            self.unschedule(id, &queue);
            for consumer in queue.consumers {
                let ChannelId { connection, number } = consumer.channel;
                let Some(peer) = self.peers.get_mut(&connection) else { continue };
                let Some(channel) = peer.channels.get_mut(&number) else { continue };
                channel.forget_consumer(consumer.tag.as_str());
                if peer.capabilities.takes_cancel {
                    let cancel = basic::Cancel { consumer_tag: consumer.tag, nowait: true };
                    peer.output.method(number, AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel)));
                }
            }
        }
        self.exchanges.retain(|_, exchange| {
            let before = exchange.bindings.len();
            exchange.bindings.retain(|binding| !ids.contains(&binding.queue));
            !exchange.auto_delete || before == 0 || !exchange.bindings.is_empty()
        });
    }

    /// Returns the queue of this name, if the connection may use it. An empty name stands for the queue that
    /// was declared last on the channel.
    pub(super) fn named_queue(&mut self, at: ChannelId, name: &str) -> Outcome<QueueId> {
        let name = if name.is_empty() {
            let last = self.channel(at).map(|channel| channel.last_queue.clone()).unwrap_or_default();
            if last.as_str().is_empty() {
                return Err(Exception::not_found("no previously declared queue"));
            }
            last
        } else {
            ShortString::from(name)
        };
        let id = self.queue_ids.get(name.as_str()).copied().ok_or_else(|| no_queue(name.as_str()))?;
        let owner = self.queues.get(&id).and_then(|queue| queue.owner);
        if owner.is_some_and(|owner| owner != at.connection) {
            return Err(locked(name.as_str()));
        }
        Ok(id)
    }

    /// Reserves memory for a queue, an exchange, a binding or a consumer.
    pub(super) fn hold_definition(&self) -> Outcome<Held> {
        /// Enough for names of up to 255 bytes and the structures around them.
        const SIZE: usize = 1024;

        if self.memory.is_exhausted() {
            return Err(Exception::resource_error("the broker's memory is full"));
        }
        Ok(self.memory.hold(SIZE))
    }
}

/// Returns whether a queue is durable. An exclusive queue is never durable, because it is deleted with its
/// connection.
fn is_durable(declare: &queue::Declare) -> bool {
    declare.durable && !declare.exclusive
}

/// Converts a number of messages or consumers to the type that methods use.
pub(super) fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

pub(super) fn no_exchange(name: &str) -> Exception {
    Exception::not_found(format!("no exchange '{name}' in vhost '/'"))
}

fn no_queue(name: &str) -> Exception {
    Exception::not_found(format!("no queue '{name}' in vhost '/'"))
}

fn locked(name: &str) -> Exception {
    Exception::resource_locked(format!(
        "cannot obtain exclusive access to locked queue '{name}' in vhost '/'"
    ))
}

fn on_default_exchange() -> Exception {
    Exception::access_refused("operation not permitted on the default exchange")
}

fn inequivalent(arg: &str, kind: &str, name: &str) -> Exception {
    Exception::precondition_failed(format!("inequivalent arg '{arg}' for {kind} '{name}' in vhost '/'"))
}

fn check_reserved(kind: &str, name: &str) -> Outcome {
    if name.starts_with("amq.") {
        return Err(Exception::access_refused(format!(
            "{kind} name '{name}' contains reserved prefix 'amq.*'"
        )));
    }
    Ok(())
}
