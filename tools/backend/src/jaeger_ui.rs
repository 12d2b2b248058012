//! Serves Jaeger's own page with the data of this backend, in addition to this project's page. The crate
//! `otlp-embedded` contains a build of Jaeger's page.

use super::{query, store::Store};
use axum::{Router, http::StatusCode, middleware::map_response, response::Response};
use otlp_embedded::{Config, State};
use std::sync::Arc;

/// Returns the routes of Jaeger's page and of the query APIs that the page calls.
pub(super) fn routes(store: Arc<Store>) -> Router {
    // The crate's own store stays empty, because the page calls `/jaeger/api`, which this backend answers.
    let unused = State::new(Config { max_length: 1, max_memory_usage: 1 });
    let page = Router::new()
        .fallback_service(otlp_embedded::ui_app(unused, "/jaeger/"))
        // The crate sends the page of a trace with status 307, although the response is no redirect.
        .layer(map_response(async |mut response: Response| {
            if response.status() == StatusCode::TEMPORARY_REDIRECT {
                *response.status_mut() = StatusCode::OK;
            }
            response
        }));
    Router::new().nest("/jaeger", query::router(store, page))
}
