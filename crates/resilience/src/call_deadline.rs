//! A gRPC client's deadline, for the whole call with its retries, up to the last byte of the answer.

use crate::Deadline;
use http::{Request, Response};
use opentelemetry::context::{FutureExt, WithContext};
use pin_project_lite::pin_project;
use std::{
    pin::Pin,
    task::{self, Poll, ready},
    time::Duration,
};
use tokio::time::{Timeout, timeout_at};
use tonic::Status;
use tower::{Layer, Service, ServiceExt, util::Oneshot};

/// Limits the time of a call to `limit`, or to the time left for the request that makes the call, whichever is
/// less. At the deadline the call ends with DEADLINE_EXCEEDED, and is cancelled at the server.
#[derive(Clone)]
pub struct CallDeadlineLayer {
    limit: Duration,
}

impl CallDeadlineLayer {
    /// Makes a layer that gives each call at most `limit`.
    pub fn new(limit: Duration) -> Self {
        Self { limit }
    }
}

impl<S> Layer<S> for CallDeadlineLayer {
    type Service = CallDeadline<S>;

    fn layer(&self, inner: S) -> CallDeadline<S> {
        CallDeadline { inner, limit: self.limit }
    }
}

/// A client wrapped in the [`CallDeadlineLayer`].
#[derive(Clone)]
pub struct CallDeadline<S> {
    inner: S,
    limit: Duration,
}

impl<S, R, B> Service<Request<R>> for CallDeadline<S>
where
    S: Service<Request<R>, Response = Response<B>, Error = Status> + Clone,
{
    type Response = Response<B>;
    type Error = Status;
    type Future = ResponseFuture<Oneshot<S, Request<R>>>;

    /// Is always ready, because waiting for the service inside counts as part of the call.
    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let deadline = Deadline::within(self.limit);
        let call = self.inner.clone().oneshot(request).with_context(deadline.context());
        ResponseFuture { call: timeout_at(deadline.0, call) }
    }
}

pin_project! {
    /// The outcome of a call, or DEADLINE_EXCEEDED at the deadline.
    pub struct ResponseFuture<F> {
        #[pin]
        call: Timeout<WithContext<F>>,
    }
}

impl<F, B> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, Status>>,
{
    type Output = Result<Response<B>, Status>;

    fn poll(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        let in_time = ready!(self.project().call.poll(cx));
        Poll::Ready(in_time.unwrap_or_else(|_| Err(Status::deadline_exceeded("the deadline has passed"))))
    }
}
