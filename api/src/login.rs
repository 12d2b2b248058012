//! Handles a login: steps 1 to 4 of the flow in ARCHITECTURE.md, each with its span.

use crate::{app::App, problem::Problem, publisher::LoginEvent, token::Token, tracer::TRACER};
use axum::{
    Json,
    extract::{State, rejection::JsonRejection},
};
use opentelemetry::trace::Tracer;
use proto::{login::MobileNumber, usercenter::v1::GetUserByMobileRequest};
use serde::{Deserialize, de::IgnoredAny};
use std::sync::Arc;
use tonic::Code;
use tower::ServiceExt;

/// The body of a login.
#[derive(Debug, Deserialize)]
pub struct LoginRequest {
    mobile: MobileNumber,
    /// Other members of the object are allowed. Because this field reads them, serde refuses an array as a
    /// login. Without this field, serde would accept `["13800138000"]` as this struct.
    #[serde(flatten)]
    _others: IgnoredAny,
}

/// `POST /usercenter/v1/user/login`
///
/// # Errors
/// See [`Problem`].
pub async fn login(
    State(app): State<Arc<App>>,
    request: Result<Json<LoginRequest>, JsonRejection>,
) -> Result<Json<Token>, Problem> {
    // The texts of axum's rejections may quote the body, so they are not used.
    let Json(request) = request.map_err(|rejection| match rejection {
        JsonRejection::JsonSyntaxError(_) => Problem::NotJson,
        JsonRejection::JsonDataError(_) => Problem::InvalidMobile,
        JsonRejection::MissingJsonContentType(_) => Problem::UnsupportedMediaType,
        _ => Problem::UnreadableBody,
    })?;

    // A layer has already opened the server span.

    // Layers also make the client span, the server span at the other end, the deadline and the retries.
    let mobile = request.mobile.as_str().to_owned();
    let found = app.usercenter.clone().get_user_by_mobile(GetUserByMobileRequest { mobile }).await;
    let found = found.map_err(|status| match status.code() {
        Code::NotFound => Problem::UnknownUser,
        Code::InvalidArgument => Problem::InvalidMobile,
        _ => Problem::of_usercenter(&status),
    });
    let user = found?.into_inner().user.ok_or(Problem::UsercenterFailed)?;

    // No layer can know about a local function, so its span is written by hand.
    let token = TRACER.in_span("local", |_| app.tokens.issue(user.id));

    // `publisher` publishes the message, in a hand-written span. The login succeeds if the broker confirms
    // the message, or if the message is in the spool.
    app.publisher.clone().oneshot(LoginEvent { mobile: request.mobile }).await?;

    tracing::info!(%user.id, "logged in");
    Ok(Json(token))
}
