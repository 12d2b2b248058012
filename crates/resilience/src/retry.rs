//! Repeats calls that are safe to repeat, within the deadline and within a budget.
//!
//! The layer uses tower's budget, but not tower's `Retry`, which needs a request that can be cloned before it
//! is sent. Tower's backoff is also cloned for each call, so all calls would have the same "random" pauses.

use crate::{circuit::CircuitOpen, deadline::Deadline, unary::MAX_MESSAGE};
use bytes::Bytes;
use grpc_protocol::code_name;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Limited};
use opentelemetry::{KeyValue, metrics::Counter, trace::get_active_span};
use std::{
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
    time::Duration,
};
use telemetry::semconv;
use tokio::time::sleep;
use tonic::{Code, Status};
use tower::{
    BoxError, Layer, Service, ServiceExt,
    retry::budget::{Budget, TpsBudget},
};

/// Repeats calls that ended with UNAVAILABLE. The server may have served such a call, so only methods that
/// are declared idempotent are repeated. The pauses between attempts grow, and differ from caller to caller.
/// The call has one span, with an event `retry` for each attempt after the first.
#[derive(Clone)]
pub struct RetryLayer {
    idempotent: &'static [&'static str],
    attempts: u32,
    budget: Arc<TpsBudget>,
    retries: Counter<u64>,
}

/// The average pause before the second attempt. Each later pause is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(25);

impl RetryLayer {
    /// Makes a layer that repeats the methods in `idempotent` (`/package.Service/Method`), with at most
    /// `attempts` attempts in all.
    pub fn new(idempotent: &'static [&'static str], attempts: u32) -> Self {
        // The budget allows one retry for every five calls, and ten more retries per second. So retries don't
        // make an outage worse.
        let budget = Arc::new(TpsBudget::new(Duration::from_secs(10), 10, 0.2));
        let retries = telemetry::meter("resilience", env!("CARGO_PKG_VERSION"))
            .u64_counter("throughline.rpc.retries")
            .with_unit("{attempt}")
            .build();
        Self { idempotent, attempts, budget, retries }
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Retry<S> {
        Retry { inner, layer: self.clone() }
    }
}

/// A client wrapped in the [`RetryLayer`].
#[derive(Clone)]
pub struct Retry<S> {
    inner: S,
    layer: RetryLayer,
}

impl<S, B, R> Service<Request<B>> for Retry<S>
where
    S: Service<Request<Bytes>, Response = Response<R>, Error = Status> + Clone + Send + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<R>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, Status>> + Send>>;

    /// Is always ready, because each attempt itself waits for the connection.
    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Self { inner, layer } = self.clone();
        Box::pin(async move {
            let (head, message) = request.into_parts();
            let message = Limited::new(message, MAX_MESSAGE).collect().await.map_err(Status::from_error)?;
            let request = Request::from_parts(head, message.to_bytes());
            if !layer.idempotent.contains(&request.uri().path()) {
                return inner.oneshot(request).await;
            }

            let mut attempt = 1;
            loop {
                let failed = match inner.clone().oneshot(request.clone()).await {
                    Err(status) if status.code() == Code::Unavailable => status,
                    outcome => {
                        layer.budget.deposit();
                        return outcome;
                    }
                };
                let Some(pause) = layer.pause_after(attempt, &failed) else {
                    return Err(failed);
                };
                attempt += 1;
                let method = request.uri().path().trim_start_matches('/').to_owned();
                layer.retries.add(1, &[KeyValue::new(semconv::RPC_METHOD, method)]);
                get_active_span(|span| {
                    let failure = KeyValue::new(semconv::RPC_STATUS_CODE, code_name(failed.code()));
                    let pause = KeyValue::new(
                        semconv::RETRY_PAUSE,
                        i64::try_from(pause.as_millis()).unwrap_or(i64::MAX),
                    );
                    span.add_event(
                        "retry",
                        vec![KeyValue::new(semconv::RETRY_ATTEMPT, i64::from(attempt)), failure, pause],
                    );
                });
                sleep(pause).await;
            }
        })
    }
}

impl RetryLayer {
    /// Returns how long to wait after an attempt that `failed`, or `None` if no other attempt may follow.
    fn pause_after(&self, attempt: u32, failed: &Status) -> Option<Duration> {
        if attempt >= self.attempts || CircuitOpen::of(failed).is_some() {
            return None;
        }
        let pause = FIRST_PAUSE.mul_f64(2_f64.powi(attempt as i32 - 1) * (0.5 + fastrand::f64()));
        if Deadline::current().is_some_and(|deadline| deadline.remaining() <= pause) {
            return None;
        }
        self.budget.withdraw().then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CallDeadlineLayer;
    use http_body_util::Empty;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tower::{ServiceBuilder, service_fn};

    #[tokio::test(start_paused = true)]
    async fn there_are_no_attempts_beyond_the_deadline_and_the_last_one_says_what_failed() {
        // The shortest pauses between five attempts add up to 187 ms.
        for (time, expected) in [(10, 1..2), (150, 2..5), (1000, 5..6)] {
            let attempts = Arc::new(AtomicU32::new(0));
            let counted = attempts.clone();
            let failing = service_fn(move |_: Request<Bytes>| {
                counted.fetch_add(1, Ordering::Relaxed);
                std::future::ready(Err::<Response<()>, _>(Status::unavailable("")))
            });
            let client = ServiceBuilder::new()
                .layer(CallDeadlineLayer::new(Duration::from_millis(time)))
                .layer(RetryLayer::new(&["/Service/Method"], 5))
                .service(failing);
            let request = Request::get("/Service/Method").body(Empty::<Bytes>::new()).expect("a request");
            let status = client.oneshot(request).await.expect_err("a failure");
            assert_eq!(status.code(), Code::Unavailable);
            assert!(expected.contains(&attempts.load(Ordering::Relaxed)), "{attempts:?} in {time} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_not_multiplied_and_successes_earn_retries() {
        let layer = RetryLayer::new(&[], 5);
        let failed = Status::unavailable("");
        let retries = || (0..1000).filter(|_| layer.pause_after(1, &failed).is_some()).count();
        // The budget allows ten retries per second, for the ten seconds that it covers.
        assert_eq!(retries(), 100);
        (0..50).for_each(|_| layer.budget.deposit());
        assert_eq!(retries(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_differ_and_fit_into_the_time_that_is_left() {
        let layer = RetryLayer::new(&[], 5);
        let failed = Status::unavailable("");
        for (attempt, average) in [(1, 25), (2, 50), (3, 100), (4, 200)] {
            let average = Duration::from_millis(average);
            let pauses: Vec<_> = (0..10).filter_map(|_| layer.pause_after(attempt, &failed)).collect();
            assert_eq!(pauses.len(), 10);
            assert!(pauses.iter().all(|pause| (average / 2..average * 3 / 2).contains(pause)), "{pauses:?}");
            assert!(pauses.iter().any(|pause| *pause != pauses[0]), "{pauses:?}");
        }
        assert_eq!(layer.pause_after(5, &failed), None, "the fifth was the last");

        let _attached = Deadline::within(Duration::from_millis(12)).context().attach();
        assert_eq!(layer.pause_after(1, &failed), None);
    }
}
