//! Keeps events that happen many times a second from filling the log.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The shortest time between two log lines.
const INTERVAL: Duration = Duration::from_secs(60);

/// Allows one log line per minute, for all clones together.
#[derive(Debug, Clone, Default)]
pub struct Seldom(Arc<Mutex<Option<Instant>>>);

impl Seldom {
    /// Whether a line may be written now. If so, that line counts as written.
    pub fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| last.elapsed() >= INTERVAL);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}
