//! A bound on the requests in flight. Further requests are refused at once, because a queue would only make
//! all requests late.
//!
//! tower's own pair of layers for this, `ConcurrencyLimit` in `LoadShed`, refuses with a boxed error, which
//! axum and tonic can't turn into an answer. tonic's own limit acts outside the server span.

use crate::rejection::Rejection;
use http::{Request, Response};
use pin_project_lite::pin_project;
use std::{
    pin::Pin,
    sync::Arc,
    task::{self, Poll, ready},
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tower::{Layer, Service};

/// The requests in flight, and the limit on their number. A request is in flight from the call until the
/// headers of its answer.
#[derive(Debug, Clone)]
pub struct InFlight {
    free: Arc<Semaphore>,
    most: usize,
}

impl InFlight {
    /// Allows at most `most` requests at a time.
    pub fn at_most(most: u32) -> Self {
        let most = most as usize;
        Self { free: Arc::new(Semaphore::new(most)), most }
    }

    /// Waits until half a second has passed without a request in flight. In that time, the last answer
    /// reaches its caller. After that, a server that is stopping need not wait for its connections.
    pub async fn ended(&self) {
        let mut quiet = 0;
        while quiet < 25 {
            sleep(Duration::from_millis(20)).await;
            quiet = if self.free.available_permits() == self.most { quiet + 1 } else { 0 };
        }
    }
}

/// Refuses requests while the maximum number of requests is in flight.
///
/// Calls to gRPC's own services, such as health checks, are never refused, because a busy service is not
/// dead.
#[derive(Clone)]
pub struct ShedLayer<A> {
    in_flight: InFlight,
    answer: A,
}

impl<A> ShedLayer<A> {
    /// Makes a layer. All services that it wraps share the limit.
    pub fn new(in_flight: InFlight, answer: A) -> Self {
        Self { in_flight, answer }
    }
}

impl<S, A: Clone> Layer<S> for ShedLayer<A> {
    type Service = Shed<S, A>;

    fn layer(&self, inner: S) -> Shed<S, A> {
        Shed { inner, in_flight: self.in_flight.clone(), answer: self.answer.clone() }
    }
}

/// A service wrapped in the [`ShedLayer`].
#[derive(Clone)]
pub struct Shed<S, A> {
    inner: S,
    in_flight: InFlight,
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
        let permit = self.in_flight.free.clone().try_acquire_owned().ok();
        let is_served = permit.is_some() || request.uri().path().starts_with("/grpc.");
        let future = is_served.then(|| self.inner.call(request));
        ResponseFuture { future, _permit: permit, answer: self.answer.clone() }
    }
}

pin_project! {
    /// The service's answer, or a refusal.
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
