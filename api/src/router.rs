//! Every route and every layer of the HTTP service.

use crate::{app::App, body, bounds::MAX_BODIES, health, host, login, problem::Problem};
use axum::{
    Router,
    middleware::{from_fn, from_fn_with_state},
    routing::{get, post},
};
use resilience::{CatchPanicLayer, DeadlineLayer, InFlight, ShedLayer};
use std::{sync::Arc, time::Duration};
use telemetry::http::HttpServerLayer;
use tokio::sync::Semaphore;
use tower::ServiceBuilder;

/// The limits that the layers enforce.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// How many requests may be in flight.
    pub max_in_flight: u32,
    /// How long a request may take.
    pub deadline: Duration,
}

/// Makes the service, which can be served on a socket or called in memory.
pub fn router(app: Arc<App>, limits: RequestLimits) -> Router {
    let routes = Router::new()
        .route("/usercenter/v1/user/login", post(login::login))
        .method_not_allowed_fallback(async || Problem::MethodNotAllowed)
        .fallback(async || Problem::NoSuchRoute);
    // The health routes are outside the layers. They are not traced, and their only check is that of `Host`.
    let health = Router::new()
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(health::ready))
        .layer(from_fn(host::named_once));
    in_layers(routes, limits).merge(health).with_state(app)
}

/// Puts the layers around routes. A request passes them from the first to the last, and its answer from the
/// last to the first. (If each layer had its own call of [`Router::layer`], the order would be reversed.)
pub fn in_layers<S: Clone + Send + Sync + 'static>(routes: Router<S>, limits: RequestLimits) -> Router<S> {
    // The bytes that all bodies together may take.
    let memory = Arc::new(Semaphore::new(MAX_BODIES));
    routes.layer(
        ServiceBuilder::new()
            .layer(HttpServerLayer::new()) // the server span, around all that follows
            .layer(from_fn(host::named_once)) // exactly one host in an HTTP/1.1 request
            .layer(CatchPanicLayer::new(Problem::rejected)) // a panic is answered like any failure
            .layer(DeadlineLayer::new(limits.deadline, Problem::rejected)) // an answer in time, or a refusal
            .layer(from_fn_with_state(memory, body::read_first)) // reads the whole body, unless it is too large
            .layer(ShedLayer::new(InFlight::at_most(limits.max_in_flight), Problem::rejected)), // a bound on requests in flight
    )
}
