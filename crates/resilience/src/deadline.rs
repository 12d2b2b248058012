//! The time by which an answer is needed. It is a value in OpenTelemetry's context, which follows the request
//! through awaits and, with `with_context`, into tasks. On the wire it is gRPC's `grpc-timeout`.

use http::{HeaderMap, HeaderValue};
use opentelemetry::Context;
use std::time::Duration;
use tokio::time::Instant;

/// The time by which the caller needs the answer. A later answer is of no use to anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

const GRPC_TIMEOUT: &str = "grpc-timeout";

impl Deadline {
    /// Returns the deadline at `limit` from now, or the current deadline if that is sooner.
    pub fn within(limit: Duration) -> Self {
        let own = Self(Instant::now() + limit);
        Self::current().map_or(own, |asked| asked.min(own))
    }

    /// Returns the deadline of the current context.
    pub fn current() -> Option<Self> {
        Context::map_current(|cx| cx.get::<Self>().copied())
    }

    /// Returns the current context with this deadline.
    pub fn context(self) -> Context {
        Context::current_with_value(self)
    }

    /// Returns how much time is left, which is zero after the deadline.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Tells the server how much time is left, by the header `grpc-timeout`.
    pub(crate) fn write(self, headers: &mut HeaderMap) {
        // The value has at most 8 digits: enough for 99 seconds in microseconds, or for a day in
        // milliseconds.
        let micros = self.remaining().as_micros();
        let value = match micros {
            0..100_000_000 => format!("{micros}u"),
            _ => format!("{}m", (micros / 1000).min(99_999_999)),
        };
        if let Ok(mut value) = HeaderValue::try_from(value) {
            // Each value is used only once, so HTTP/2 must not keep it in its table of headers, where it
            // would displace useful entries.
            value.set_sensitive(true);
            headers.insert(GRPC_TIMEOUT, value);
        }
    }

    /// Reads how much time the caller allows, or returns `None` if the caller doesn't say.
    pub(crate) fn read(headers: &HeaderMap) -> Option<Duration> {
        grpc_protocol::parse_timeout(headers.get(GRPC_TIMEOUT)?.to_str().ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_sooner_of_two_deadlines_holds() {
        let outer = Deadline::within(Duration::from_secs(3));
        let _attached = outer.context().attach();
        assert_eq!(Deadline::within(Duration::from_secs(5)), outer);
        assert_eq!(Deadline::within(Duration::from_secs(1)).remaining(), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_written_is_what_is_read() {
        let limits = [0, 1, 1999, 99_999_999, 100_000_000, 86_400_000_000];
        for limit in limits.map(Duration::from_micros) {
            let mut headers = HeaderMap::new();
            Deadline(Instant::now() + limit).write(&mut headers);
            assert_eq!(Deadline::read(&headers), Some(limit));
        }
    }
}
