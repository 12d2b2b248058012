//! The pause before another attempt to connect.

use std::time::Duration;

/// The pause before the next attempt to connect. It grows from a tenth of a second to two seconds, with
/// jitter, so that services don't all reconnect at the same moment. The attempts never end.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(2);

    /// Starts with the shortest pause.
    #[expect(clippy::new_without_default, reason = "nothing needs a default backoff")]
    pub fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// Waits, and makes the next pause twice as long.
    pub async fn pause(&mut self) {
        let pause = self.next.mul_f64(0.5 + 0.5 * fastrand::f64());
        self.next = (self.next * 2).min(Self::LONGEST);
        tokio::time::sleep(pause).await;
    }

    /// Starts with the shortest pause again if a connection lasted longer than the longest pause. If each
    /// connection is lost at once, the pauses keep growing.
    pub fn connection_lasted(&mut self, time: Duration) {
        if time > Self::LONGEST {
            *self = Self::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pauses_start_anew_only_after_a_connection_that_lasted() {
        let mut backoff = Backoff { next: Backoff::LONGEST };
        backoff.connection_lasted(Backoff::LONGEST);
        assert_eq!(backoff.next, Backoff::LONGEST);
        backoff.connection_lasted(Backoff::LONGEST * 2);
        assert_eq!(backoff.next, Backoff::FIRST);
    }
}
