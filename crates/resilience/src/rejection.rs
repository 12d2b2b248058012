//! Why a layer of a server answers in place of the handler. What that answer looks like is the service's
//! affair: problem+json here, a gRPC status there.

use http::Response;
use telemetry::ErrorType;

/// Why a request was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// There are as many requests in flight as there may be.
    Overloaded,
    /// The handler was not done in time, and was dropped.
    DeadlineExceeded,
    /// The handler panicked.
    Panic,
}

impl Rejection {
    /// Its `error.type` on the server span.
    pub fn error_type(self) -> &'static str {
        match self {
            Self::Overloaded => "overloaded",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Panic => telemetry::semconv::PANIC,
        }
    }

    /// The answer, with the reason for the span around.
    pub(crate) fn answer<B>(self, answer: &impl Fn(Self) -> Response<B>) -> Response<B> {
        let mut response = answer(self);
        response.extensions_mut().insert(ErrorType(self.error_type()));
        response
    }
}
