//! The router of the query side: Jaeger's two APIs, the page's own endpoints, and the page.

use super::{jaeger, jaeger_v3, logs, parameters::Refusal, recent, store::Store};
use axum::{
    Json, Router,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::sync::Arc;
use tokio::task::spawn_blocking;

pub(super) fn router(store: Arc<Store>, page: Router) -> Router {
    Router::new()
        .merge(jaeger::routes())
        .merge(jaeger_v3::routes())
        .merge(recent::routes())
        .merge(logs::routes())
        .with_state(store)
        .merge(page)
}

/// Answers a query on a blocking thread, because a search takes long enough to delay incoming spans.
pub(super) async fn blocking(work: impl FnOnce() -> Result<Response, Refusal> + Send + 'static) -> Response {
    blocking_or(work, Refusal::into_response).await
}

/// Does the same as [`blocking`], but makes the response to a refused query by `refusal`.
pub(super) async fn blocking_or(
    work: impl FnOnce() -> Result<Response, Refusal> + Send + 'static,
    refusal: fn(Refusal) -> Response,
) -> Response {
    let failed = || Refusal(StatusCode::INTERNAL_SERVER_ERROR, "the query failed".to_owned());
    spawn_blocking(work).await.unwrap_or_else(|_| Err(failed())).unwrap_or_else(refusal)
}

/// Returns the document as a JSON response.
pub(super) fn json(document: &impl Serialize) -> Response {
    Json(document).into_response()
}
