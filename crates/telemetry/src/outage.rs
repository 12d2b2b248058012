//! Logs why exports fail, at most once a minute. A line has the receiver's address, the cause, and a guess at
//! the mistake.

use opentelemetry_sdk::error::OTelSdkError;
use std::{
    cell::RefCell,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tracing::{Event, Subscriber, field::Visit};
use tracing_subscriber::{Layer, layer::Context};

/// The shortest time between two warnings about one exporter.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The failures of one exporter.
#[derive(Debug)]
pub(crate) struct Outage {
    /// The kind of data that is exported, for example `spans`.
    what: &'static str,
    /// The address of the receiver.
    endpoint: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether a warning that exports fail has been logged since the last success.
    is_told: bool,
    warned: Option<Instant>,
    /// The number of spans that were dropped until the last success.
    dropped_before: u64,
}

thread_local! {
    /// Details of the current export attempt on this thread, which the result of that attempt lacks.
    static ATTEMPT: RefCell<Attempt> = RefCell::default();
}

#[derive(Default)]
struct Attempt {
    /// How many spans the receiver rejected although it accepted the request.
    rejected: u64,
    reason: String,
    /// The transport's error.
    cause: Option<String>,
}

/// Records the transport's error for the current export attempt on this thread. The exporter's own error is
/// only "network error".
pub(crate) fn note_cause(error: &(dyn std::error::Error + 'static)) {
    let sources = std::iter::successors(Some(error), |error| error.source());
    let cause = sources.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    ATTEMPT.with_borrow_mut(|attempt| {
        // If a connection ends before the request is sent, hyper cancels the request and loses the reason,
        // for example that the server refused the client's certificate. So the error of a cancelled request
        // does not replace another error.
        if attempt.cause.is_none() || !cause.contains("operation was canceled") {
            attempt.cause = Some(cause);
        }
    });
}

impl Outage {
    pub fn new(what: &'static str, endpoint: impl fmt::Display) -> Self {
        Self { what, endpoint: endpoint.to_string(), state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that an attempt succeeded. Returns how many of its spans the receiver rejected nevertheless.
    /// `dropped` is the number of all spans that were dropped so far, for any reason.
    pub fn over(&self, dropped: u64) -> u64 {
        let Attempt { rejected, reason, .. } = ATTEMPT.take();
        let (what, endpoint, mut state) = (self.what, &self.endpoint, self.lock());
        if std::mem::take(&mut state.is_told) {
            tracing::info!(dropped = dropped - state.dropped_before, "{what} are exported again");
        }
        state.dropped_before = dropped + rejected;
        if rejected > 0 && state.may_warn() {
            tracing::warn!(rejected, reason, endpoint, "{what} were rejected; at most one warning a minute");
        }
        rejected
    }

    /// Records that an attempt failed, and returns whether the receiver refuses this data. Otherwise another
    /// attempt may succeed. `dropped` has the same meaning as for [`Self::over`].
    pub fn failed(&self, error: &OTelSdkError, dropped: u64) -> bool {
        let cause = ATTEMPT.take().cause;
        let reason = match (error, cause) {
            (OTelSdkError::Timeout(limit), _) => format!("no success within {limit:?}"),
            (OTelSdkError::InternalFailure(message), None) => message.clone(),
            (_, Some(cause)) => cause,
            (error, None) => error.to_string(),
        };
        let is_final = is_final(&reason);
        let (what, endpoint, mut state) = (self.what, &self.endpoint, self.lock());
        if state.may_warn() {
            let reason = short(&reason) + guess(&reason);
            if is_final {
                tracing::warn!(reason, endpoint, "{what} were rejected; at most one warning a minute");
            } else {
                state.is_told = true;
                let dropped = dropped - state.dropped_before;
                tracing::warn!(
                    reason,
                    endpoint,
                    dropped,
                    "{what} can't be exported; still trying, at most one warning a minute"
                );
            }
        }
        is_final
    }
}

impl State {
    /// Returns whether a new warning may be logged. If so, counts it as logged now.
    fn may_warn(&mut self) -> bool {
        let may = self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY);
        if may {
            self.warned = Some(Instant::now());
        }
        may
    }
}

/// Decides from the text of an error whether the failure is final, because the exporters have only one kind
/// of error. The text contains `… gRPC code: Unavailable` or `… status code: 503`. The OTLP specification
/// ("Failures") lists which failures may be retried.
fn is_final(reason: &str) -> bool {
    let after = |mark| reason.split_once(mark).map(|(_, rest): (_, &str)| rest);
    if let Some(code) = after("gRPC code: ") {
        let retryable = ["Cancelled", "DeadlineExceeded", "Aborted", "OutOfRange", "Unavailable", "DataLoss"];
        // A cause after the code means that the connection failed, so the server has not answered.
        !code.contains(": ") && !retryable.contains(&code)
    } else if let Some(status) = after("status code: ").or_else(|| after("with status ")) {
        !["429", "502", "503", "504"].iter().any(|retryable| status.starts_with(retryable))
    } else {
        false
    }
}

/// Guesses the mistake that most often leads to this failure.
fn guess(reason: &str) -> &'static str {
    // Parts of a gRPC exporter's errors if the server has no HTTP/2, or has HTTP/2 but not this service.
    const NOT_GRPC: [&str; 3] =
        ["frame with invalid size", "HTTP/2 was not negotiated", "gRPC code: Unimplemented"];
    // Parts of an HTTP/1.1 exporter's errors if the server is a gRPC server, because such a server sends an HTTP/2
    // frame before it reads a request.
    const NOT_HTTP: [&str; 2] = ["invalid HTTP version", "unexpected message from connection"];

    if NOT_GRPC.iter().any(|mark| reason.contains(mark)) {
        "; is this the port of OTLP/HTTP, or a collector that refuses this data? gRPC is usually at 4317"
    } else if NOT_HTTP.iter().any(|mark| reason.contains(mark)) {
        "; is this the port of OTLP/gRPC? HTTP is usually at 4318"
    } else {
        ""
    }
}

/// Shortens a peer's text, and removes control characters, because the text goes into a log line.
fn short(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// Listens to the exporters' own events, because only they report that a receiver accepted part of a request.
pub(crate) struct PartialSuccess;

impl<S: Subscriber> Layer<S> for PartialSuccess {
    fn on_event(&self, event: &Event<'_>, _cx: Context<'_, S>) {
        if event.metadata().name().ends_with(".PartialSuccess") {
            ATTEMPT.with_borrow_mut(|attempt| event.record(attempt));
        }
    }
}

impl Visit for Attempt {
    fn record_i64(&mut self, field: &tracing::field::Field, value: i64) {
        if field.name() == "rejected_spans" {
            self.rejected = value.try_into().unwrap_or(0);
        }
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        if field.name() == "error_message" {
            self.reason = short(value);
        }
    }

    fn record_debug(&mut self, _field: &tracing::field::Field, _value: &dyn fmt::Debug) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_a_request_are_told_apart_as_the_specification_demands() {
        for (reason, expected) in [
            ("TonicTracesClient export failed with gRPC code: InvalidArgument", true),
            ("TonicTracesClient export failed with gRPC code: Unimplemented", true),
            ("TonicTracesClient export failed with gRPC code: ResourceExhausted", true),
            ("TonicTracesClient export failed with gRPC code: Unavailable", false),
            ("TonicTracesClient export failed with gRPC code: DataLoss", false),
            ("TonicTracesClient export failed with gRPC code: Unknown: transport error", false),
            ("HTTP export failed with status code: 400", true),
            ("HTTP export failed with status code: 500", true),
            ("HTTP export failed with status code: 503", false),
            ("HTTP response error: request failed with status 429 Too Many Requests", false),
            ("HTTP response error: request failed with status 302 Found", true),
            ("client error (Connect): connection refused", false),
        ] {
            assert_eq!(is_final(reason), expected, "{reason}");
        }
    }

    #[test]
    fn a_cancelled_attempt_does_not_hide_the_cause_of_another() {
        let note = |text: &str| note_cause(&std::io::Error::other(text));
        let (cancelled, cause) = ("operation was canceled: connection was not ready", "CertificateRequired");
        for attempts in [[cancelled, cause], [cause, cancelled], ["another", cause]] {
            attempts.into_iter().for_each(note);
            assert_eq!(ATTEMPT.take().cause.as_deref(), Some(cause), "{attempts:?}");
        }
        note(cancelled);
        assert_eq!(ATTEMPT.take().cause.as_deref(), Some(cancelled));
    }

    #[test]
    fn what_a_peer_wrote_is_shortened_and_has_no_control_characters() {
        assert_eq!(short(&format!("a\nb\x1b[0m{}", "x".repeat(400))).len(), 300);
        assert!(!short("a\nb\x1b").chars().any(char::is_control));
    }
}
