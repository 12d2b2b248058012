//! Maps each failure to its answer: problem+json (RFC 9457), with the trace id as a member.

use crate::outbox::PublishError;
use axum::{
    Json,
    http::{
        StatusCode,
        header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use opentelemetry::{Context, KeyValue, metrics::Counter, trace::TraceContextExt};
use resilience::{CircuitOpen, Rejection};
use serde_json::json;
use std::sync::LazyLock;
use telemetry::semconv;
use tonic::{Code, Status};

/// Counts the requests that were answered with a problem, by the kind of problem.
static REFUSED: LazyLock<Counter<u64>> = LazyLock::new(|| {
    telemetry::meter("api", env!("CARGO_PKG_VERSION"))
        .u64_counter("throughline.requests.refused")
        .with_unit("{request}")
        .build()
});

/// Every problem with which a request can be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// The body is not JSON.
    NotJson,
    /// The body could not be read to its end.
    UnreadableBody,
    /// The body took too long to arrive.
    BodyTooSlow,
    /// The body is longer than the limit.
    BodyTooLarge,
    /// The body has a transfer coding other than `chunked`.
    UnknownTransferCoding,
    /// The body is not declared as JSON.
    UnsupportedMediaType,
    /// The body has no mobile number, or an invalid one.
    InvalidMobile,
    /// Nobody registered this mobile number.
    UnknownUser,
    /// The header `Host` is missing, repeated, or not a host.
    BadHost,
    /// There is no route at this path.
    NoSuchRoute,
    /// There is a route at this path, but for another method.
    MethodNotAllowed,
    /// The number of requests in flight has reached its limit.
    Overloaded,
    /// There was no answer in time.
    DeadlineExceeded,
    /// The handler panicked.
    Internal,
    /// usercenter can't be reached.
    UsercenterUnavailable,
    /// usercenter is not called for a while, because too many calls to it failed.
    UsercenterCircuitOpen,
    /// usercenter did not answer in time.
    UsercenterTimeout,
    /// usercenter answered, but not with a user.
    UsercenterFailed,
    /// The broker is unavailable, and the spool has no room for the login.
    SpoolFull,
    /// The broker is unavailable, and the login could not be written to disk.
    SpoolFailed,
}

impl Problem {
    /// Returns the status, the type (which becomes part of a URN), and the title.
    fn parts(self) -> (u16, &'static str, &'static str) {
        match self {
            Self::NotJson => (400, "not-json", "The body is not JSON"),
            Self::UnreadableBody => (400, "unreadable-body", "The body could not be read"),
            Self::BodyTooSlow => (408, "body-too-slow", "The body did not arrive in time"),
            Self::BodyTooLarge => (413, "body-too-large", "The body is too large"),
            Self::UnknownTransferCoding => {
                (501, "unknown-transfer-coding", "The only supported transfer coding is chunked")
            }
            Self::UnsupportedMediaType => {
                (415, "unsupported-media-type", "The content type must be application/json")
            }
            Self::InvalidMobile => {
                (422, "invalid-mobile", "The member mobile must be a string of 7 to 15 digits")
            }
            Self::UnknownUser => (401, "unknown-user", "Nobody registered this mobile number"),
            Self::BadHost => (400, "bad-host", "The request must have exactly one valid header Host"),
            Self::NoSuchRoute => (404, "no-such-route", "There is nothing at this path"),
            Self::MethodNotAllowed => (405, "method-not-allowed", "This path does not allow this method"),
            Self::Overloaded => (503, "overloaded", "There are too many requests at the moment"),
            Self::DeadlineExceeded => (504, "deadline-exceeded", "There was no answer in time"),
            Self::Internal => (500, "internal", "Something went wrong here"),
            Self::UsercenterCircuitOpen => (
                503,
                "usercenter-circuit-open",
                "The user directory is failing, so it is not called at the moment",
            ),
            Self::UsercenterUnavailable => {
                (503, "usercenter-unavailable", "The user directory can't be reached")
            }
            Self::UsercenterTimeout => {
                (504, "usercenter-timeout", "The user directory did not answer in time")
            }
            Self::UsercenterFailed => (502, "usercenter-failed", "The user directory answered with an error"),
            Self::SpoolFull => (503, "spool-full", "Too many logins are waiting to be recorded"),
            Self::SpoolFailed => (503, "spool-failed", "The login could not be recorded"),
        }
    }

    /// Makes the answer to a request that a layer refuses.
    pub fn rejected(rejection: Rejection) -> Response {
        let problem = match rejection {
            Rejection::Overloaded => Self::Overloaded,
            Rejection::DeadlineExceeded => Self::DeadlineExceeded,
            Rejection::Panic => Self::Internal,
        };
        problem.into_response()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, kind, title) = self.parts();
        REFUSED.add(1, &[KeyValue::new(semconv::ERROR_TYPE, kind)]);
        let trace_id = Context::map_current(|cx| {
            let span = cx.span();
            span.span_context().is_valid().then(|| span.span_context().trace_id().to_string())
        });
        let body = json!({
            "type": format!("urn:throughline:problem:{kind}"),
            "title": title,
            "status": status,
            "traceId": trace_id,
        });
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let content_type = (CONTENT_TYPE, "application/problem+json");
        match status {
            StatusCode::SERVICE_UNAVAILABLE => {
                (status, [content_type, (RETRY_AFTER, "1")], Json(body)).into_response()
            }
            // An answer with 401 must name the way to authenticate (RFC 9110, section 15.5.2).
            StatusCode::UNAUTHORIZED => {
                let way = (WWW_AUTHENTICATE, "Mobile realm=\"usercenter\"");
                (status, [content_type, way], Json(body)).into_response()
            }
            _ => (status, [content_type], Json(body)).into_response(),
        }
    }
}

impl Problem {
    /// Turns a failed call to usercenter into the problem for the caller of api, who learns only the kind of
    /// problem. Logs the failure.
    pub fn of_usercenter(status: &Status) -> Self {
        if CircuitOpen::of(status).is_some() {
            // The circuit has logged that it opened. A log line here would repeat that for every login.
            return Problem::UsercenterCircuitOpen;
        }
        let problem = match status.code() {
            Code::Unavailable => Problem::UsercenterUnavailable,
            Code::DeadlineExceeded => Problem::UsercenterTimeout,
            _ => Problem::UsercenterFailed,
        };
        // The message that usercenter itself wrote is not logged, because it may hold anything.
        let reason = telemetry::grpc::cause(status);
        tracing::warn!(code = telemetry::grpc::code_name(status.code()), reason, "usercenter failed");
        problem
    }
}

/// Logs nothing, because the spool has already logged its failure, once for all logins.
impl From<PublishError> for Problem {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::SpoolFull => Problem::SpoolFull,
            PublishError::SpoolFailed => Problem::SpoolFailed,
        }
    }
}
