//! A bound on the requests in flight. More are refused at once: a queue would only make all of them late.
//!
//! tower's own pair for this, `ConcurrencyLimit` in `LoadShed`, refuses by an error in a box, for which
//! axum and tonic know no answer; and tonic's setting for it stands outside of the span.

use crate::Rejection;
use http::{Request, Response};
use pin_project_lite::pin_project;
use std::{
    pin::Pin,
    sync::Arc,
    task::{self, Poll, ready},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::{Layer, Service};

/// Refuses requests while as many as there may be are in flight: from the call until the head of the answer.
///
/// gRPC's own services are never refused: a service that has much to do is not a dead one.
#[derive(Clone)]
pub struct ShedLayer<A> {
    in_flight: Arc<Semaphore>,
    answer: A,
}

impl<A> ShedLayer<A> {
    /// For at most so many requests at a time, in all the services made by this layer together.
    pub fn new(max_in_flight: u32, answer: A) -> Self {
        Self { in_flight: Arc::new(Semaphore::new(max_in_flight as usize)), answer }
    }
}

impl<S, A: Clone> Layer<S> for ShedLayer<A> {
    type Service = Shed<S, A>;

    fn layer(&self, inner: S) -> Shed<S, A> {
        Shed { inner, in_flight: self.in_flight.clone(), answer: self.answer.clone() }
    }
}

/// A service in the [`ShedLayer`].
#[derive(Clone)]
pub struct Shed<S, A> {
    inner: S,
    in_flight: Arc<Semaphore>,
    answer: A,
}

impl<S, A, R, B> Service<Request<R>> for Shed<S, A>
where
    S: Service<Request<R>, Response = Response<B>>,
    A: Fn(Rejection) -> Response<B> + Clone,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, A>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let permit = self.in_flight.clone().try_acquire_owned().ok();
        let is_served = permit.is_some() || request.uri().path().starts_with("/grpc.");
        let future = is_served.then(|| self.inner.call(request));
        ResponseFuture { future, _permit: permit, answer: self.answer.clone() }
    }
}

pin_project! {
    /// An answer to come, or the refusal.
    pub struct ResponseFuture<F, A> {
        #[pin]
        future: Option<F>,
        _permit: Option<OwnedSemaphorePermit>,
        answer: A,
    }
}

impl<F, A, B, E> Future for ResponseFuture<F, A>
where
    F: Future<Output = Result<Response<B>, E>>,
    A: Fn(Rejection) -> Response<B>,
{
    type Output = Result<Response<B>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        Poll::Ready(match this.future.as_pin_mut() {
            Some(future) => ready!(future.poll(cx)),
            None => Ok(Rejection::Overloaded.answer(this.answer)),
        })
    }
}
