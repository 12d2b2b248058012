//! The router of the query side: Jaeger's API, the page's own endpoints, and the page.

use super::{jaeger, logs, parameters::Refusal, recent, store::Store};
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
        .merge(recent::routes())
        .merge(logs::routes())
        .with_state(store)
        .merge(page)
}

/// Answers a query on a blocking thread, because a search takes so long that it would delay incoming spans.
pub(super) async fn blocking(work: impl FnOnce() -> Result<Response, Refusal> + Send + 'static) -> Response {
    let failed = || Refusal(StatusCode::INTERNAL_SERVER_ERROR, "the query failed".to_owned());
    spawn_blocking(work).await.unwrap_or_else(|_| Err(failed())).into_response()
}

/// Returns the document as a JSON response.
pub(super) fn json(document: &impl Serialize) -> Response {
    Json(document).into_response()
}
