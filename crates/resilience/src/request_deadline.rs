//! A server's deadline, by which either the handler or this layer answers the caller.

use crate::{
    deadline::Deadline,
    rejection::{AnswerOrRejection, Rejection},
};
use http::{Request, Response};
use opentelemetry::context::{FutureExt, WithContext};
use std::{
    task::{self, Poll},
    time::Duration,
};
use tokio::time::{Timeout, timeout_at};
use tower::{Layer, Service};

/// Gives a handler a limited time. The handler, and the layers of the clients that it uses, read the deadline
/// from [`Deadline::current`]. At the deadline the handler is dropped, which ends its spans, and this layer
/// answers the caller.
#[derive(Clone)]
pub struct DeadlineLayer<A> {
    limit: Duration,
    asks_caller: bool,
    answer: A,
}

impl<A> DeadlineLayer<A> {
    /// Makes a layer that allows at most `limit` from the end of a request's headers to the headers of its
    /// answer.
    pub fn new(limit: Duration, answer: A) -> Self {
        Self { limit, asks_caller: false, answer }
    }

    /// Does the same for a gRPC server, whose callers may allow less time by `grpc-timeout`. An HTTP server
    /// ignores that header, because anybody can call an HTTP server, and calls with too little time could
    /// open circuits.
    pub fn grpc(limit: Duration, answer: A) -> Self {
        Self { limit, asks_caller: true, answer }
    }
}

impl<S, A: Clone> Layer<S> for DeadlineLayer<A> {
    type Service = RequestDeadline<S, A>;

    fn layer(&self, inner: S) -> RequestDeadline<S, A> {
        RequestDeadline { inner, layer: self.clone() }
    }
}

/// A service wrapped in the [`DeadlineLayer`].
#[derive(Clone)]
pub struct RequestDeadline<S, A> {
    inner: S,
    layer: DeadlineLayer<A>,
}

/// How long before the end of `grpc-timeout` this layer answers. At the end of `grpc-timeout`, tonic's own
/// server, outside all layers, drops the call and reports CANCELLED. So this layer has to answer earlier.
const BEFORE_TONIC: Duration = Duration::from_millis(3);

impl<S, A, R, B> Service<Request<R>> for RequestDeadline<S, A>
where
    S: Service<Request<R>, Response = Response<B>>,
    A: Fn(Rejection) -> Response<B> + Clone,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = AnswerOrRejection<Timeout<WithContext<S::Future>>, A>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let DeadlineLayer { limit, asks_caller, ref answer } = self.layer;
        let asked = asks_caller.then(|| Deadline::read(request.headers())).flatten();
        let asked = asked.map_or(limit, |asked| asked.saturating_sub(BEFORE_TONIC));
        let deadline = Deadline::within(asked.min(limit));
        let cx = deadline.context();
        let answer = answer.clone();
        // If the deadline has already passed, the handler is not started. The time-out polls a handler before it
        // checks the time, so a handler that never waits would finish in spite of the deadline.
        let handler = (!deadline.remaining().is_zero()).then(|| {
            let _attached = cx.clone().attach();
            timeout_at(deadline.0, self.inner.call(request).with_context(cx))
        });
        AnswerOrRejection { handler, rejection: Rejection::DeadlineExceeded, answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{convert::Infallible, future};
    use tower::{ServiceExt, service_fn};

    #[tokio::test]
    async fn what_is_over_already_is_never_begun() {
        for (timeout, expected) in [("1S", "served"), ("3m", "over"), ("0n", "over")] {
            let handler =
                service_fn(|_: Request<()>| future::ready(Ok::<_, Infallible>(Response::new("served"))));
            let layer = DeadlineLayer::grpc(Duration::from_secs(1), |_| Response::new("over"));
            let request = Request::get("/").header("grpc-timeout", timeout).body(()).expect("a request");
            assert_eq!(
                layer.layer(handler).oneshot(request).await.expect("an answer").body(),
                &expected,
                "{timeout}"
            );
        }
    }
}
