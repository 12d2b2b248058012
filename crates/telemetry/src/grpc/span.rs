//! The span of a call: its status, when it ends, and how it describes an error.

use crate::{
    ErrorType,
    body::{AwaitsBody, BodyEnd, TracedBody},
    metrics::Measurement,
    semconv,
};
use grpc_protocol::{GRPC_STATUS, code_name, code_of_http, parse_timeout, status_code};
use http::{HeaderMap, Response};
use http_body::Body;
use opentelemetry::{
    Context, KeyValue,
    trace::{SpanKind, Status as SpanStatus, TraceContextExt},
};
use std::{
    error::Error,
    time::{Duration, Instant},
};
use tonic::{Code, Status};

/// The span of a call, on either side. It ends when the status is known. If it is dropped before that, the
/// call was cancelled or has passed its deadline.
#[derive(Debug)]
pub struct GrpcSpan {
    pub(super) cx: Context,
    kind: SpanKind,
    deadline: Option<Instant>,
    /// The status that counts if the answer turns out to have no gRPC status.
    status: Code,
    measured: Option<Measurement>,
    /// The status of the call, and the reason if this side refused the call.
    outcome: Option<(Code, Option<ErrorType>)>,
}

impl GrpcSpan {
    /// Makes the span of a call from the span's context and the headers of the request.
    pub(super) fn new(
        cx: Context,
        kind: SpanKind,
        request: &HeaderMap,
        measured: Option<Measurement>,
    ) -> Self {
        let timeout = request.get("grpc-timeout").and_then(|value| parse_timeout(value.to_str().ok()?));
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Self { cx, kind, deadline, status: Code::Unknown, measured, outcome: None }
    }

    pub(super) fn respond<B: Body>(mut self, response: Response<B>) -> Response<TracedBody<B, Self>> {
        self.status = code_of_http(response.status());
        // A response without a message has its gRPC status in the headers. If the response isn't gRPC at all,
        // the HTTP status counts.
        let only_headers = response.headers().contains_key(GRPC_STATUS) || response.body().is_end_stream();
        let span = if only_headers {
            let reason = response.extensions().get::<ErrorType>().copied();
            let code = status_code(response.headers()).unwrap_or(self.status);
            self.end(code, reason);
            None
        } else {
            Some(self)
        };
        response.map(|body| TracedBody::new(body, span, None))
    }

    pub(super) fn end(mut self, code: Code, reason: Option<ErrorType>) {
        self.outcome = Some((code, reason));
    }
}

impl AwaitsBody for GrpcSpan {
    fn context(&self) -> &Context {
        &self.cx
    }

    fn end_of_body(self, end: BodyEnd<'_>) {
        let code = match end {
            BodyEnd::Trailers(trailers) => status_code(trailers),
            // A stream that ends without a status broke off, or isn't gRPC.
            BodyEnd::Complete | BodyEnd::Error => None,
        };
        let code = code.unwrap_or(self.status);
        self.end(code, None);
    }
}

/// Ends the span. If a client refuses a call, there is no status from a server, so the `error.type` is the
/// reason for the refusal. On a server, the `error.type` is the status, and the reason is the description.
impl Drop for GrpcSpan {
    fn drop(&mut self) {
        let (code, reason) = self.outcome.unwrap_or_else(|| {
            // The timer that drops a span at its deadline is exact to a millisecond, and was started a little
            // earlier, so it may fire shortly before `deadline`.
            let expired = self.deadline.is_some_and(|deadline| deadline <= Instant::now() + TIMER_SLACK);
            (if expired { Code::DeadlineExceeded } else { Code::Cancelled }, None)
        });
        let name = code_name(code);
        let (error_type, description) = match reason {
            Some(ErrorType(reason)) if self.kind == SpanKind::Client => (reason, ""),
            Some(ErrorType(reason)) if !reason.eq_ignore_ascii_case(name) => (name, reason),
            _ => (name, ""),
        };
        let error_type = is_error(code, &self.kind).then_some(error_type);
        if let Some(measured) = &mut self.measured {
            measured.set(semconv::RPC_STATUS_CODE, name);
            if let Some(error_type) = error_type {
                measured.set(semconv::ERROR_TYPE, error_type);
            }
            measured.record();
        }
        let span = self.cx.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new(semconv::RPC_STATUS_CODE, name));
            if let Some(error_type) = error_type {
                span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, error_type));
                span.set_status(SpanStatus::error(description));
            }
        }
        span.end();
    }
}

const TIMER_SLACK: Duration = Duration::from_millis(5);

/// Whether a status is an error. For a client, every status except OK is an error. For a server, only its own
/// faults are errors.
fn is_error(code: Code, kind: &SpanKind) -> bool {
    match code {
        Code::Ok => false,
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => true,
        _ => *kind == SpanKind::Client,
    }
}

/// Returns why a call did not reach its server, for example `Connection refused`, or `None` if the status has
/// no cause on this side.
pub fn cause(status: &Status) -> Option<String> {
    let causes = std::iter::successors(status.source(), |&error| error.source());
    // An `ErrorType` is the span's `error.type` already.
    causes.filter(|cause| !cause.is::<ErrorType>()).last().map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_to_blame_for_some_codes_a_client_sees_all_as_errors() {
        let server_errors = [2, 4, 12, 13, 14, 15];
        for code in 0..=16 {
            assert_eq!(is_error(Code::from(code), &SpanKind::Server), server_errors.contains(&code));
            assert_eq!(is_error(Code::from(code), &SpanKind::Client), code != 0);
        }
    }
}
