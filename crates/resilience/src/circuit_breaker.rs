//! Puts a circuit around a gRPC client, and decides which statuses are failures and how refused calls end.

use crate::circuit::{Circuit, CircuitOpen};
use http::{Request, Response};
use opentelemetry::{KeyValue, trace::get_active_span};
use std::{
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
};
use telemetry::semconv;
use tonic::{Code, Status};
use tower::{Layer, Service, ServiceExt};

/// Lets calls pass while the circuit is closed. While it is open, calls end at once with UNAVAILABLE, and
/// with [`CircuitOpen`] as the source.
#[derive(Clone)]
pub struct CircuitBreakerLayer {
    circuit: Arc<Circuit>,
}

impl CircuitBreakerLayer {
    /// Makes a layer with one circuit for all clients that it wraps.
    pub fn new(circuit: Circuit) -> Self {
        let circuit = Arc::new(circuit);
        let observed = circuit.clone();
        telemetry::meter("resilience", env!("CARGO_PKG_VERSION"))
            .u64_observable_gauge("throughline.circuit.state")
            .with_description("1 for the current state of the circuit, 0 for the others.")
            .with_callback(move |observer| {
                for state in ["closed", "open", "half_open"] {
                    let is_now = state == observed.state_name();
                    let name = KeyValue::new("throughline.circuit.name", observed.name());
                    let state = KeyValue::new("throughline.circuit.state", state);
                    observer.observe(u64::from(is_now), &[name, state]);
                }
            })
            .build();
        Self { circuit }
    }
}

impl<S> Layer<S> for CircuitBreakerLayer {
    type Service = CircuitBreaker<S>;

    fn layer(&self, inner: S) -> CircuitBreaker<S> {
        CircuitBreaker { inner, circuit: self.circuit.clone() }
    }
}

/// A client wrapped in the [`CircuitBreakerLayer`].
#[derive(Clone)]
pub struct CircuitBreaker<S> {
    inner: S,
    circuit: Arc<Circuit>,
}

impl<S, R, B> Service<Request<R>> for CircuitBreaker<S>
where
    S: Service<Request<R>, Response = Response<B>, Error = Status> + Clone + Send + 'static,
    S::Future: Send,
    R: Send + 'static,
{
    type Response = Response<B>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, Status>> + Send>>;

    /// Is always ready, because nobody should wait for a connection while the circuit is open.
    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let permission = self.circuit.enter();
        let call = self.inner.clone().oneshot(request);
        Box::pin(async move {
            let permission = permission.map_err(refusal)?;
            let outcome = call.await;
            match &outcome {
                Err(status) if is_failure(status.code()) => permission.failed(),
                Ok(_) | Err(_) => permission.succeeded(),
            }
            outcome
        })
    }
}

fn refusal(open: CircuitOpen) -> Status {
    let retry_after = i64::try_from(open.retry_after.as_millis()).unwrap_or(i64::MAX);
    get_active_span(|span| {
        span.add_event("circuit_open", vec![KeyValue::new(semconv::CIRCUIT_RETRY_AFTER, retry_after)]);
    });
    let mut status = Status::unavailable(open.to_string());
    status.set_source(Arc::new(open));
    status
}

/// Whether a status shows that the server does not work. Any other status shows that the server works,
/// because the server has judged the request. RESOURCE_EXHAUSTED does not count, because a caller can cause
/// it. gRPC libraries return this status if the headers or the message are too large.
fn is_failure(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown | Code::DeadlineExceeded | Code::Internal | Code::Unavailable | Code::DataLoss
    )
}
