//! Every route and every layer of the HTTP service.

use crate::{
    body::{self, BodyMemory},
    health, host, login,
    problem::Problem,
    publisher::Publisher,
    token::TokenIssuer,
    usercenter::{Health, Usercenter},
};
use axum::{
    Router,
    middleware::{from_fn, from_fn_with_state},
    routing::{get, post},
};
use resilience::{CatchPanicLayer, DeadlineLayer, ShedLayer};
use serving::shutdown::Shutdown;
use std::{sync::Arc, time::Duration};
use telemetry::http::HttpServerLayer;
use tower::ServiceBuilder;

/// What the handlers use.
pub struct App {
    /// In its layers.
    pub usercenter: Usercenter,
    /// On the same connection.
    pub usercenter_health: Health,
    /// Whether this instance is on its way out.
    pub shutdown: Shutdown,
    /// Access tokens.
    pub tokens: TokenIssuer,
    /// Logins go there.
    pub publisher: Publisher,
}

/// What the layers hold to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many requests may be in flight.
    pub max_in_flight: u32,
    /// How long one may take.
    pub deadline: Duration,
}

/// The service, ready to be served or to be called in memory.
pub fn router(app: Arc<App>, limits: Limits) -> Router {
    let routes = Router::new()
        .route("/usercenter/v1/user/login", post(login::login))
        .method_not_allowed_fallback(async || Problem::MethodNotAllowed)
        .fallback(async || Problem::NoSuchRoute);
    // Outside of the layers: not traced, and refused only what is no HTTP.
    let health = Router::new()
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(health::ready))
        .layer(from_fn(host::named_once));
    in_layers(routes, limits).merge(health).with_state(app)
}

/// Puts the layers around routes: a request passes them from the first to the last, its answer from the last
/// to the first. (Of several calls of [`Router::layer`] the last would be the first.)
pub fn in_layers<S: Clone + Send + Sync + 'static>(routes: Router<S>, limits: Limits) -> Router<S> {
    routes.layer(
        ServiceBuilder::new()
            .layer(HttpServerLayer::new()) // the server span: all that follows is in it, refusals too
            .layer(from_fn(host::named_once)) // HTTP/1.1 that names its host, once
            .layer(CatchPanicLayer::new(Problem::rejected)) // a panic is answered like any failure
            .layer(DeadlineLayer::new(limits.deadline, Problem::rejected)) // an answer in time, or none
            .layer(from_fn_with_state(BodyMemory::new(), body::read_first)) // all of it, if not too large
            .layer(ShedLayer::new(limits.max_in_flight, Problem::rejected)), // no more at a time than it can do
    )
}
