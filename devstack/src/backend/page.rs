//! What a browser sees at `/`.

use axum::{Router, routing::get};

pub(crate) fn page() -> Router {
    Router::new().route("/", get(async || "Traces are at /api: see /api/recent, and Jaeger's query API.\n"))
}
