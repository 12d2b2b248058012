//! The memory that the broker's state takes, in bytes, and its limit.

use super::content::MAX_BODY;
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
};
use tokio::sync::Notify;

/// The total memory of messages, queues, bindings and so on. When the memory reaches `limit`, the broker
/// stops reading from connections that publish, as RabbitMQ does at its watermark. At twice the limit, the
/// broker refuses declarations.
#[derive(Debug)]
pub struct Memory {
    held: AtomicUsize,
    limit: usize,
    alarm: AtomicBool,
    longest_body: AtomicU64,
    relieved: Notify,
}

/// A share of the memory, which is released when this value is dropped.
#[derive(Debug)]
pub struct Held {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Memory {
    /// Creates a `Memory` that holds nothing, with a limit of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        let (held, alarm) = (AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Self { held, limit, alarm, longest_body: MAX_BODY.into(), relieved: Notify::new() })
    }

    /// Takes `bytes` bytes, even beyond the limit. Callers that can wait call [`Memory::is_full`] first.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Held {
        self.held.fetch_add(bytes, Relaxed);
        Held { memory: Arc::clone(self), bytes }
    }

    /// Returns whether twice the limit is reached. In this state, the broker refuses declarations and
    /// publishes no dead letters. A dead letter is then lost, unless its queue keeps it.
    pub fn is_exhausted(&self) -> bool {
        self.held.load(Relaxed) / 2 >= self.limit
    }

    /// Returns whether the limit is reached, or an alarm is set.
    pub fn is_full(&self) -> bool {
        self.held.load(Relaxed) >= self.limit || self.alarm.load(Relaxed)
    }

    /// Sets or clears an alarm. During an alarm, the memory counts as full, even if it is almost empty.
    pub fn set_alarm(&self, on: bool) {
        self.alarm.store(on, Relaxed);
        self.relieved.notify_waiters();
    }

    /// Returns the longest body that a message may have.
    pub fn longest_body(&self) -> u64 {
        self.longest_body.load(Relaxed)
    }

    /// Sets the longest body that a message may have.
    pub fn set_longest_body(&self, bytes: u64) {
        self.longest_body.store(bytes, Relaxed);
    }

    /// Waits until the memory is not full.
    pub async fn has_room(&self) {
        loop {
            let mut relieved = std::pin::pin!(self.relieved.notified());
            // From here on, no notification is missed.
            relieved.as_mut().enable();
            if !self.is_full() {
                return;
            }
            relieved.await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let before = self.memory.held.fetch_sub(self.bytes, Relaxed);
        if before >= self.memory.limit && before - self.bytes < self.memory.limit {
            self.memory.relieved.notify_waiters();
        }
    }
}
