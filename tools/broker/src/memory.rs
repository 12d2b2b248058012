//! What the broker holds, in bytes, and its bound.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};
use tokio::sync::Notify;

/// All that queues, bindings and the like take together. Beyond `limit`, connections that publish are not
/// read, as RabbitMQ does at its watermark; beyond twice as much nothing new can be declared.
#[derive(Debug)]
pub struct Memory {
    held: AtomicUsize,
    limit: usize,
    alarm: AtomicBool,
    relieved: Notify,
}

/// A part of the memory. It is given back with its owner.
#[derive(Debug)]
pub struct Held {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Memory {
    /// Empty, and full at `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        let (held, alarm) = (AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Self { held, limit, alarm, relieved: Notify::new() })
    }

    /// Takes so many bytes: beyond the limit, too. Whoever can wait asks [`Memory::is_full`] first.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Held {
        self.held.fetch_add(bytes, Relaxed);
        Held { memory: Arc::clone(self), bytes }
    }

    /// Whether twice the limit is reached: what can't wait, as publishers can, is refused or lost.
    pub fn is_exhausted(&self) -> bool {
        self.held.load(Relaxed) / 2 >= self.limit
    }

    /// Whether the limit is reached, or it was said to be.
    pub fn is_full(&self) -> bool {
        self.held.load(Relaxed) >= self.limit || self.alarm.load(Relaxed)
    }

    /// Says that the limit is reached, or no longer, whatever is held.
    pub fn set_alarm(&self, on: bool) {
        self.alarm.store(on, Relaxed);
        self.relieved.notify_waiters();
    }

    /// Ends when the limit is not reached, or no longer.
    pub async fn has_room(&self) {
        loop {
            let mut relieved = std::pin::pin!(self.relieved.notified());
            // From here on no notification is missed.
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
