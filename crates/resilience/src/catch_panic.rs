//! Answers the caller when a handler panics, so that the connection and the process survive.
//!
//! The panic is logged where it happens, by the hook that [`telemetry::Telemetry::start`] sets. tower-http
//! also has a layer for panics, but that layer boxes every body, and logs the panic's message, whatever the
//! message contains.

use crate::rejection::{AnswerOrRejection, Rejection};
use futures_util::{FutureExt, future::CatchUnwind};
use http::{Request, Response};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    task::{self, Poll},
};
use tower::{Layer, Service};

/// Answers in place of a handler that panics. If a body panics while it is being sent, the answer breaks off.
#[derive(Clone)]
pub struct CatchPanicLayer<A> {
    answer: A,
}

impl<A> CatchPanicLayer<A> {
    /// Makes a layer that answers with `answer`.
    pub fn new(answer: A) -> Self {
        Self { answer }
    }
}

impl<S, A: Clone> Layer<S> for CatchPanicLayer<A> {
    type Service = CatchPanic<S, A>;

    fn layer(&self, inner: S) -> CatchPanic<S, A> {
        CatchPanic { inner, answer: self.answer.clone() }
    }
}

/// A service wrapped in the [`CatchPanicLayer`].
#[derive(Clone)]
pub struct CatchPanic<S, A> {
    inner: S,
    answer: A,
}

impl<S, A, R, B> Service<Request<R>> for CatchPanic<S, A>
where
    S: Service<Request<R>, Response = Response<B>>,
    A: Fn(Rejection) -> Response<B> + Clone,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = AnswerOrRejection<CatchUnwind<AssertUnwindSafe<S::Future>>, A>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        // The state that a panic leaves behind belongs only to this request, and is dropped with the request.
        let called = catch_unwind(AssertUnwindSafe(|| self.inner.call(request)));
        let handler = called.ok().map(|future| AssertUnwindSafe(future).catch_unwind());
        AnswerOrRejection { handler, rejection: Rejection::Panic, answer: self.answer.clone() }
    }
}
