//! Decides which connection is closed when a new connection finds no room.
//!
//! Each connection has a [`Place`]. Connections without a request wait in a queue, in the order in which they
//! began to wait. When there is one connection too many, [`Waiting::let_go`] tells the connection at the head
//! of the queue to close. So only idle connections make room for new ones, and a client with a request gets
//! in, however many idle clients there are. A connection that has a request is never told to close. When its
//! request is answered, the connection waits again, at the end of the queue. If no connection is waiting when
//! one must close, `one_is_owed` is set, and the first connection whose request is answered closes. If any
//! connection is closed before that, there is room, and no other connection has to close.
//!
//! ```text
//!             a request comes
//!   waiting ─────────────────▶ has a request
//!      │    ◀─────────────────       │
//!      │      it is answered         │ it is answered, and one is owed
//!      │ let_go()                    │
//!      └──────────▶ must go ◀────────┘
//! ```

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;

/// The connections that wait, in the order in which they began to wait.
#[derive(Clone, Default)]
pub struct Waiting(Arc<Mutex<Queue>>);

#[derive(Default)]
struct Queue {
    next: u64,
    waiting: BTreeMap<u64, Arc<Notify>>,
    /// Whether a connection had to close while no connection was waiting. In that case, the next connection
    /// whose request is answered must close.
    one_is_owed: bool,
}

/// The place of one connection in the queue.
pub struct Place {
    queue: Waiting,
    /// The number of the place in the queue, or `None` while the connection has a request.
    number: Mutex<Option<u64>>,
    go: Arc<Notify>,
}

impl Waiting {
    /// Makes the place of a new connection, which waits for its first request.
    pub fn enter(&self) -> Arc<Place> {
        let place = Place { queue: self.clone(), number: Mutex::new(None), go: Arc::default() };
        place.wait(&mut lock(&self.0));
        Arc::new(place)
    }

    /// Tells the connection at the head of the queue to close. If no connection is waiting, the first
    /// connection whose request is answered closes.
    pub fn let_go(&self) {
        if !self.make_room() {
            lock(&self.0).one_is_owed = true;
        }
    }

    /// Tells the connection at the head of the queue to close. Returns `false` if no connection is waiting.
    fn make_room(&self) -> bool {
        let longest = lock(&self.0).waiting.pop_first();
        longest.inspect(|(_, go)| go.notify_one()).is_some()
    }

    /// Returns the number of places, each of which has a clone of the queue.
    fn len(&self) -> usize {
        Arc::strong_count(&self.0) - 1
    }
}

/// A queue for each address, so that the connections of one address push out only each other.
pub struct ByAddress {
    /// How many connections an address may have.
    most: usize,
    queues: HashMap<IpAddr, Waiting>,
    /// When there are this many queues, the queues without a connection are removed.
    sweep_at: usize,
}

impl ByAddress {
    /// Makes the queues. Each address may have at most this many connections.
    pub fn new(most: usize) -> Self {
        Self { most, queues: HashMap::new(), sweep_at: 64 }
    }

    /// Makes the place of a new connection from this address. All addresses of an IPv6 /64 count as one
    /// address. If the address already has its maximum number of connections, tells the connection at the
    /// head of its queue to close, and also returns `true`. Returns `None` if none of these connections is
    /// waiting.
    pub fn enter(&mut self, peer: IpAddr) -> Option<(Arc<Place>, bool)> {
        if self.queues.len() >= self.sweep_at {
            self.queues.retain(|_, queue| queue.len() > 0);
            self.sweep_at = (2 * self.queues.len()).max(64);
        }
        let queue = self.queues.entry(network(peer)).or_default();
        let is_full = queue.len() >= self.most;
        (!is_full || queue.make_room()).then(|| (queue.enter(), is_full))
    }
}

/// Returns the network of one caller: an IPv4 address, or the /64 of an IPv6 address.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        address => address,
    }
}

impl Place {
    /// Removes the connection from the queue because a request has arrived. The connection waits again when
    /// the returned guard is dropped.
    pub fn has_request(self: &Arc<Self>) -> HasRequest {
        self.leave();
        HasRequest(self.clone())
    }

    /// Waits until this connection must close.
    pub async fn must_go(&self) {
        self.go.notified().await;
    }

    fn wait(&self, queue: &mut Queue) {
        let number = queue.next;
        queue.next += 1;
        queue.waiting.insert(number, self.go.clone());
        *lock(&self.number) = Some(number);
    }

    fn leave(&self) {
        let mut queue = lock(&self.queue.0);
        if let Some(number) = lock(&self.number).take() {
            queue.waiting.remove(&number);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
        // Now there is room, so no other connection has to close.
        lock(&self.queue.0).one_is_owed = false;
    }
}

/// The guard that a connection has while its request is being answered.
pub struct HasRequest(Arc<Place>);

impl Drop for HasRequest {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue.0);
        match std::mem::take(&mut queue.one_is_owed) {
            true => self.0.go.notify_one(),
            false => self.0.wait(&mut queue),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn went(place: &Place) -> bool {
        place.must_go().now_or_never().is_some()
    }

    #[test]
    fn the_one_that_has_waited_longest_goes() {
        let waiting = Waiting::default();
        let [first, second] = [waiting.enter(), waiting.enter()];
        // The first connection begins to wait again, so now the second has waited longest.
        drop(first.has_request());
        waiting.let_go();
        assert!(went(&second) && !went(&first));
        waiting.let_go();
        assert!(went(&first));
    }

    #[test]
    fn connections_of_one_address_make_room_only_for_each_other() {
        let mut queues = ByAddress::new(2);
        let mut made_room = 0;
        let mut enter = |address: &str| {
            let (place, has_made_room) = queues.enter(address.parse().unwrap())?;
            made_room += usize::from(has_made_room);
            Some(place)
        };
        let other = enter("10.0.0.2").unwrap();
        // These are two spellings of the same IPv4 address.
        let [first, second] = ["10.0.0.1", "::ffff:10.0.0.1"].map(|address| enter(address).unwrap());
        let requests = [first.has_request(), second.has_request()];
        assert!(enter("10.0.0.1").is_none());
        drop(requests);
        let third = enter("10.0.0.1").unwrap();
        assert!(went(&first) && !went(&second) && !went(&third) && !went(&other));

        let [one, two] = ["2001:db8::1", "2001:db8::ffff:0:0:1"].map(|address| enter(address).unwrap());
        let neighbour = enter("2001:db8:0:1::1").unwrap();
        let three = enter("2001:db8::2").unwrap();
        assert!(went(&one) && !went(&two) && !went(&three) && !went(&neighbour));
        assert_eq!(made_room, 2);
    }

    #[test]
    fn addresses_without_a_connection_are_forgotten() {
        let mut queues = ByAddress::new(2);
        for i in 0..10_000_u32 {
            drop(queues.enter(IpAddr::V4(i.into())));
        }
        assert!(queues.queues.len() <= 64);
    }

    #[test]
    fn if_all_have_requests_the_first_that_is_done_goes() {
        let waiting = Waiting::default();
        let [first, second] = [waiting.enter(), waiting.enter()];
        let requests = [first.has_request(), second.has_request()];
        waiting.let_go();
        drop(requests);
        assert!(went(&first) && !went(&second));

        // The second connection does not close if another connection has closed by itself.
        let request = second.has_request();
        waiting.let_go();
        drop(first);
        drop(request);
        assert!(!went(&second));
    }

    #[test]
    fn one_that_has_a_request_or_is_closed_does_not_go() {
        let waiting = Waiting::default();
        let [busy, closed] = [waiting.enter(), waiting.enter()];
        let request = busy.has_request();
        drop(closed);
        waiting.let_go();
        assert!(!went(&busy));
        drop(request);
        waiting.let_go();
        assert!(went(&busy));
        drop(busy);
        assert!(lock(&waiting.0).waiting.is_empty());
    }
}
