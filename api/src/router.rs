//! Every route and every layer of the HTTP service.

use crate::{health, login, problem::Problem, publisher::Publisher, token::TokenIssuer};
use axum::{
    Router,
    extract::DefaultBodyLimit,
    routing::{get, post},
};
use proto::usercenter::v1::usercenter_client::UsercenterClient;
use std::{sync::Arc, time::Duration};
use telemetry::{grpc::GrpcClient, http::HttpServerLayer};
use tonic::transport::Channel;
use tonic_health::pb::health_client::HealthClient;

/// What the handlers use.
pub struct App {
    /// Traced.
    pub usercenter: UsercenterClient<GrpcClient<Channel>>,
    /// How long a call of it may take.
    pub usercenter_timeout: Duration,
    /// The same connection, without spans.
    pub usercenter_health: HealthClient<Channel>,
    /// Access tokens.
    pub tokens: TokenIssuer,
    /// Logins go there.
    pub publisher: Publisher,
}

/// The largest request body, in bytes.
const BODY_LIMIT: usize = 1024 * 1024;

/// The service, ready to be served or to be called in memory.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/usercenter/v1/user/login", post(login::login))
        .method_not_allowed_fallback(async || Problem::MethodNotAllowed)
        .fallback(async || Problem::NoSuchRoute)
        // A request passes the layers from the last one to the first.
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(HttpServerLayer::new()) // the server span
        // Not traced: routes added after the layers.
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(health::ready))
        .with_state(app)
}
