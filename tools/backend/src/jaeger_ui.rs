//! Jaeger's own page over this backend, from the crate `otlp-embedded`, which ships a build of it.

use axum::Router;
use otlp_embedded::{Config, State};

/// Returns a router that serves Jaeger's page on every path that the query APIs don't use.
pub(super) fn page() -> Router {
    // The crate's own store stays empty, because the page asks `/api`, which this backend answers.
    let unused = State::new(Config { max_length: 1, max_memory_usage: 1 });
    Router::new().fallback_service(otlp_embedded::ui_app(unused, "/"))
}
