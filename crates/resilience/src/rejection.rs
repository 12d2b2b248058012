//! Why a server's layer answers in place of the handler. The service decides what the answer looks like, for
//! example problem+json or a gRPC status.

use http::Response;
use telemetry::ErrorType;

/// Why a request was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// The number of requests in flight has reached its limit.
    Overloaded,
    /// The handler did not finish in time, and was dropped.
    DeadlineExceeded,
    /// The handler panicked.
    Panic,
}

impl Rejection {
    /// Returns the `error.type` for the server span.
    pub fn error_type(self) -> &'static str {
        match self {
            Self::Overloaded => "overloaded",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Panic => telemetry::semconv::PANIC,
        }
    }

    /// Makes the answer, and adds its `error.type` for the span around this layer.
    pub(crate) fn answer<B>(self, answer: &impl Fn(Self) -> Response<B>) -> Response<B> {
        let mut response = answer(self);
        response.extensions_mut().insert(ErrorType(self.error_type()));
        response
    }
}
