//! A gRPC client's deadline, for the whole call with its retries, up to the last byte of the answer.

use crate::deadline::Deadline;
use futures_util::{TryFutureExt, future::UnwrapOrElse};
use http::{Request, Response};
use opentelemetry::context::{FutureExt, WithContext};
use std::{
    task::{self, Poll},
    time::Duration,
};
use tokio::time::{Timeout, error::Elapsed, timeout_at};
use tonic::Status;
use tower::{Layer, Service, ServiceExt, util::Oneshot};

/// Limits the time of a call to `limit`, or to the time left for the request that makes the call, whichever
/// is less. At the deadline the call ends with DEADLINE_EXCEEDED, and is cancelled at the server.
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
    type Future = InTime<Oneshot<S, Request<R>>, B>;

    /// Is always ready, because waiting for the inner service counts as part of the call.
    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let deadline = Deadline::within(self.limit);
        let call = self.inner.clone().oneshot(request).with_context(deadline.context());
        timeout_at(deadline.0, call)
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("the deadline has passed")))
    }
}

/// The outcome of a call, or else the outcome at the deadline.
type InTime<F, B> = UnwrapOrElse<Timeout<WithContext<F>>, fn(Elapsed) -> Result<Response<B>, Status>>;
