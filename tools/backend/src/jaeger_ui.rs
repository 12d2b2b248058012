//! Jaeger's own page over this backend, from the crate `otlp-embedded`, which ships a build of it.

use axum::Router;
use otlp_embedded::{Config, State};

/// Everything that the queries leave free.
pub(super) fn page() -> Router {
    // The crate has a store of its own, which stays empty: the page asks `/api`, and that is ours.
    let unused = State::new(Config { max_length: 1, max_memory_usage: 1 });
    Router::new().fallback_service(otlp_embedded::ui_app(unused, "/"))
}
