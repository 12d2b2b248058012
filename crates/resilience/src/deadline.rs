//! By when an answer is needed: a value in OpenTelemetry's context, which follows the request through
//! awaits and, with `with_context`, into tasks. On the wire it is gRPC's `grpc-timeout`.

use http::{HeaderMap, HeaderValue};
use opentelemetry::Context;
use std::time::Duration;
use tokio::time::Instant;

/// By when whoever asked needs the answer; later it is of no use to anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

const GRPC_TIMEOUT: &str = "grpc-timeout";

impl Deadline {
    /// `limit` from now, or sooner if whoever asked needs it sooner.
    pub fn within(limit: Duration) -> Self {
        let own = Self(Instant::now() + limit);
        Self::current().map_or(own, |asked| asked.min(own))
    }

    /// That of the current context.
    pub fn current() -> Option<Self> {
        Context::map_current(|cx| cx.get::<Self>().copied())
    }

    /// The current context, with this deadline.
    pub fn context(self) -> Context {
        Context::current_with_value(self)
    }

    /// How much time is left; none if it has passed.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Tells the server how much time is left.
    pub(crate) fn write(self, headers: &mut HeaderMap) {
        // At most 8 digits: so many microseconds are 99 seconds, so many milliseconds a day.
        let micros = self.remaining().as_micros();
        let value = match micros {
            0..100_000_000 => format!("{micros}u"),
            _ => format!("{}m", (micros / 1000).min(99_999_999)),
        };
        if let Ok(mut value) = HeaderValue::try_from(value) {
            // No two are the same: HTTP/2's table is for what comes again.
            value.set_sensitive(true);
            headers.insert(GRPC_TIMEOUT, value);
        }
    }

    /// How much time the caller gives, if it says so.
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
        for limit in [0, 1, 1999, 99_999, 100_000, 86_400_000].map(Duration::from_millis) {
            let mut headers = HeaderMap::new();
            Deadline(Instant::now() + limit).write(&mut headers);
            assert_eq!(Deadline::read(&headers), Some(limit));
        }
    }
}
