//! Reads from gRPC's headers and trailers, and from tonic's errors, how a call ended and how long it may
//! take.

use http::{HeaderMap, StatusCode};
use std::{error::Error, iter, time::Duration};
use tonic::{Code, Status, TimeoutExpired};

/// The name of the header or trailer with the status of a call.
pub const GRPC_STATUS: &str = "grpc-status";

/// Returns the status in headers or trailers, if there is one.
pub fn status_code(headers: &HeaderMap) -> Option<Code> {
    headers.get(GRPC_STATUS).map(|status| Code::from_bytes(status.as_bytes()))
}

/// Returns the status of an answer without a gRPC status, for example from a proxy (gRPC, "HTTP to gRPC
/// Status Code Mapping").
pub fn code_of_http(status: StatusCode) -> Code {
    match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

/// Converts an error of a channel, or of the layers around it, to a status. tonic itself reports an expired
/// deadline as CANCELLED, and a broken connection as UNKNOWN.
pub fn transport_status(error: Box<dyn Error + Send + Sync>) -> Status {
    // If the error is a status, an inner layer has already chosen it.
    let error = match error.downcast::<Status>() {
        Ok(status) => return *status,
        Err(error) => error,
    };
    let mut sources = iter::successors(Some(&*error as &dyn Error), |&error| error.source());
    if sources.any(|error| error.is::<TimeoutExpired>()) {
        return Status::deadline_exceeded("the deadline has passed");
    }
    let status = Status::from_error(error);
    match status.code() {
        // hyper reports CANCELLED for a call that a closing connection no longer accepted.
        Code::Unknown | Code::Cancelled => Status::unavailable("the connection is broken"),
        _ => status,
    }
}

/// Returns the name of a status code in the gRPC specification ("Status codes and their use in gRPC").
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Reads `grpc-timeout`: at most 8 digits and a unit (gRPC over HTTP/2, "Requests").
pub fn parse_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn timeouts_are_read_as_the_specification_writes_them() {
        assert_eq!(parse_timeout("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(parse_timeout("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        for malformed in ["", "S", "1", "1s", "-1S", "+1S", "999999999S", "1é", "é", "1 S"] {
            assert_eq!(parse_timeout(malformed), None, "{malformed:?}");
        }
    }

    proptest! {
        #[test]
        fn hostile_timeouts_never_panic(value in ".{0,12}") {
            let _ = parse_timeout(&value);
        }
    }
}
