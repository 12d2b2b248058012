//! Why a server's layer answers in place of the handler. The service decides what the answer looks like, for
//! example problem+json or a gRPC status.

use http::Response;
use pin_project_lite::pin_project;
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
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

pin_project! {
    /// The handler's answer, or else the answer of a layer.
    pub struct AnswerOrRejection<F, A> {
        // `None` if the handler was not started, or panicked at once. A handler that fails gives no answer.
        #[pin]
        pub handler: Option<F>,
        // The reason for the layer's answer, if the handler gives no answer.
        pub rejection: Rejection,
        pub answer: A,
    }
}

impl<F, A, B, E, X> Future for AnswerOrRejection<F, A>
where
    F: Future<Output = Result<Result<Response<B>, E>, X>>,
    A: Fn(Rejection) -> Response<B>,
{
    type Output = Result<Response<B>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = match this.handler.as_pin_mut() {
            Some(handler) => ready!(handler.poll(cx)).ok(),
            None => None,
        };
        Poll::Ready(answer.unwrap_or_else(|| Ok(this.rejection.answer(this.answer))))
    }
}
