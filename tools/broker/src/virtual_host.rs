//! The state that all connections share: the connections, the exchanges, the queues, and the times at which
//! messages or queues expire. The state has no sockets. Frames for a peer are appended to the peer's output.
//!
//! The other methods of [`VirtualHost`] are in `methods` (the methods of clients), `definitions` (exchanges
//! and queues), `content` and `publishing` (incoming messages) and `delivery` (outgoing messages).

use super::{
    channel::Channel,
    exchange::{Exchange, Kind},
    handshake::Capabilities,
    memory::Memory,
    output::Output,
    publishing::DeadLetter,
    queue::Queue,
};
use amq_protocol::types::ShortString;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};
use tokio::{sync::Notify, time::Instant};

/// The number of a connection. No other connection ever gets the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(u64);

/// The number of a queue. No other queue ever gets the same number, even if it gets the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(u64);

/// The identity of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChannelId {
    /// The connection of the channel.
    pub connection: ConnectionId,
    /// The number of the channel on that connection.
    pub number: u16,
}

/// The only virtual host, `/`.
#[derive(Debug)]
pub struct VirtualHost {
    pub(super) peers: HashMap<ConnectionId, Peer>,
    pub(super) exchanges: HashMap<ShortString, Exchange>,
    pub(super) queues: HashMap<QueueId, Queue>,
    pub(super) queue_ids: HashMap<ShortString, QueueId>,
    pub(super) dead_letters: VecDeque<DeadLetter>,
    /// Dead letters that no queue took, and that their original queues keep. Each dead letter has the time of
    /// the next attempt to publish it.
    pub(super) kept: VecDeque<(Instant, DeadLetter)>,
    pub(super) memory: Arc<Memory>,
    due: BTreeSet<(Instant, QueueId)>,
    clock: Arc<Notify>,
    next_id: u64,
}

/// The state of a connection.
#[derive(Debug)]
pub struct Peer {
    /// The frames that wait to be written to the client.
    pub output: Output,
    /// Whether the client has published. The broker does not read from such a connection while the memory is
    /// full.
    pub publishes: bool,
    /// The notifications that the client understands.
    pub capabilities: Capabilities,
    /// How many bytes of incomplete messages have been received.
    pub assembling: usize,
    pub(super) channels: BTreeMap<u16, Channel>,
    /// Channels with confirms that have not been sent yet.
    pub(super) confirming: BTreeSet<u16>,
}

impl VirtualHost {
    /// Creates a virtual host with nothing but the predeclared exchanges.
    pub fn new(memory: Arc<Memory>) -> Self {
        let predeclared = |kind: Kind| {
            let exchange = Exchange {
                kind,
                durable: true,
                auto_delete: false,
                internal: false,
                alternate: None,
                bindings: Vec::new(),
                _held: memory.hold(0),
            };
            (format!("amq.{}", kind.as_str()).into(), exchange)
        };
        Self {
            peers: HashMap::new(),
            exchanges: [Kind::Direct, Kind::Fanout, Kind::Topic].map(predeclared).into(),
            queues: HashMap::new(),
            queue_ids: HashMap::new(),
            dead_letters: VecDeque::new(),
            kept: VecDeque::new(),
            memory,
            due: BTreeSet::new(),
            clock: Arc::default(),
            next_id: 0,
        }
    }

    /// Adds a connection.
    pub fn connect(&mut self, output: Output, capabilities: Capabilities) -> ConnectionId {
        let id = ConnectionId(self.next_id());
        let peer = Peer {
            output,
            publishes: false,
            capabilities,
            assembling: 0,
            channels: BTreeMap::new(),
            confirming: BTreeSet::new(),
        };
        self.peers.insert(id, peer);
        id
    }

    /// Removes a connection, requeues its unacknowledged deliveries, and deletes its exclusive queues.
    /// Returns its remaining output.
    pub fn disconnect(&mut self, connection: ConnectionId) -> Option<Output> {
        let numbers: Vec<u16> =
            self.peers.get(&connection).into_iter().flat_map(|peer| peer.channels.keys().copied()).collect();
        for number in numbers {
            self.close_channel(ChannelId { connection, number });
        }
        let peer = self.peers.remove(&connection);
        let owned = self.queues.iter().filter(|(_, queue)| queue.owner == Some(connection));
        let owned = owned.map(|(id, _)| *id).collect();
        self.delete_queues(&owned);
        self.settle_dead_letters();
        peer.map(|peer| peer.output)
    }

    /// Delivers waiting messages to the consumers of a connection, because its output has room again.
    pub fn resume(&mut self, connection: ConnectionId) {
        let channels = self.peers.get(&connection).into_iter().flat_map(|peer| peer.channels.values());
        let queues: BTreeSet<QueueId> = channels.flat_map(Channel::consumed_queues).collect();
        for queue in queues {
            self.push(queue);
        }
        self.settle_dead_letters();
    }

    /// Sends the confirms of the messages that a connection has published.
    pub fn flush_confirms(&mut self, connection: ConnectionId) {
        if let Some(peer) = self.peers.get_mut(&connection) {
            for number in std::mem::take(&mut peer.confirming) {
                if let Some(channel) = peer.channels.get_mut(&number) {
                    channel.flush_confirms(number, &mut peer.output);
                }
            }
        }
    }

    /// Expires the messages and queues whose time is over at `now`, and returns when to call `tick` again. If
    /// dead letters are left, it returns `now`.
    pub fn tick(&mut self, now: Instant) -> Option<Instant> {
        while let Some(&(due, id)) = self.due.first().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, id));
            let Some(queue) = self.queues.get_mut(&id) else { continue };
            queue.due = None;
            if queue.is_expired(now) {
                self.delete_queues(&[id].into());
            } else {
                self.push(id);
            }
        }
        let next_kept = self.retry_kept(now);
        self.settle_dead_letters();
        if !self.dead_letters.is_empty() {
            return Some(now);
        }
        self.due.first().map(|(due, _)| *due).into_iter().chain(next_kept).min()
    }

    /// Returns the `Notify` that is notified when [`VirtualHost::tick`] must be called before the time that
    /// `tick` last returned.
    pub fn clock(&self) -> Arc<Notify> {
        Arc::clone(&self.clock)
    }

    /// Makes the clock check this queue at the time when the queue or its first message may expire.
    pub(super) fn schedule(&mut self, id: QueueId) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        let Some(next) = queue.next_due() else { return };
        // If an earlier check is scheduled, it stays, because a check costs little, and most messages are
        // consumed before they expire.
        if queue.due.is_some_and(|due| due <= next) {
            return;
        }
        if let Some(due) = queue.due.replace(next) {
            self.due.remove(&(due, id));
        }
        self.due.insert((next, id));
        if self.due.first() == Some(&(next, id)) {
            self.clock.notify_one();
        }
    }

    pub(super) fn unschedule(&mut self, id: QueueId, queue: &Queue) {
        if let Some(due) = queue.due {
            self.due.remove(&(due, id));
        }
    }

    pub(super) fn wake_clock(&self) {
        self.clock.notify_one();
    }

    pub(super) fn next_queue_id(&mut self) -> QueueId {
        QueueId(self.next_id())
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}
