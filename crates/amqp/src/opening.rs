//! Opens a connection and sets up everything on it, within a time limit. Logs why that failed.

use crate::connection::Server;
use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};
use std::{
    mem::{self, Discriminant},
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// How long opening a connection with its declarations may take. A frozen node of a cluster may delay a
/// declaration for much longer, and another attempt may reach another node.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);

/// The interval between two log lines about the same failure, if the broker can be reached.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The broker can't be reached, or the connection broke.
    #[error(transparent)]
    Connection(#[from] lapin::Error),
    /// The broker did not answer all steps in time.
    #[error("the broker did not answer all steps of opening the connection within {OPENING_TIMEOUT:?}")]
    Timeout,
    /// The broker refuses a declaration, and will refuse it again until somebody changes something.
    #[error("{0}")]
    Refused(String),
}

impl OpenError {
    /// Converts lapin's error to the error of a declaration.
    pub(crate) fn of_declaring(kind: &str, name: &str, expected: &FieldTable, error: lapin::Error) -> Self {
        use AMQPErrorKind::{Hard, Soft};
        use AMQPHardError::{NOTALLOWED, NOTIMPLEMENTED};
        use AMQPSoftError::{ACCESSREFUSED, PRECONDITIONFAILED, RESOURCELOCKED};

        let ErrorKind::ProtocolError(answer) = error.kind() else {
            return Self::Connection(error);
        };
        let why = match answer.kind() {
            Soft(PRECONDITIONFAILED | RESOURCELOCKED) => {
                format!("{kind} {name} on the broker is not as expected")
            }
            Soft(ACCESSREFUSED) | Hard(NOTALLOWED | NOTIMPLEMENTED) => {
                format!("the broker does not allow {kind} {name} to be declared")
            }
            // The node that holds the queue may be down.
            _ => return Self::Connection(error),
        };
        let expected = expected.inner().iter().map(|(name, value)| match value {
            AMQPValue::LongString(text) => format!(", {name}={text}"),
            AMQPValue::LongInt(number) => format!(", {name}={number}"),
            AMQPValue::LongLongInt(number) => format!(", {name}={number}"),
            other => format!(", {name}={other:?}"),
        });
        let expected: String = expected.collect();
        let answer = answer.get_message();
        Self::Refused(format!("{why}: {answer}; expected durable{expected}"))
    }
}

/// Opens a connection, from connecting to the last declaration. If a step fails, the next attempt begins with
/// another host. But if the broker refuses a declaration, the host stays the same, because all hosts would
/// refuse it.
///
/// # Errors
/// If a step fails, or if all steps together take longer than ten seconds.
pub async fn open<T>(
    server: &Server,
    steps: impl Future<Output = Result<T, OpenError>>,
) -> Result<T, OpenError> {
    let opened = timeout(OPENING_TIMEOUT, steps).await.unwrap_or(Err(OpenError::Timeout));
    if matches!(opened, Err(OpenError::Connection(_) | OpenError::Timeout)) {
        server.try_next();
    }
    opened
}

/// Logs why a connection can't be opened.
#[derive(Debug, Default)]
pub struct Failures {
    /// The kind of failure that was logged last, and when.
    logged: Option<(Discriminant<OpenError>, Instant)>,
}

impl Failures {
    /// Logs a failure if its kind differs from that of the previous failure. A failure of the same kind is
    /// logged again after a minute, unless the failure is that the broker can't be reached, because the
    /// broker may come back by itself.
    pub fn log(&mut self, broker: &Server, error: &OpenError) {
        let (kind, is_away) = (mem::discriminant(error), matches!(error, OpenError::Connection(_)));
        let is_due = |at: Instant| !is_away && at.elapsed() >= LOG_EVERY;
        if self.logged.is_some_and(|(last, at)| last == kind && !is_due(at)) {
            return;
        }
        self.logged = Some((kind, Instant::now()));
        match error {
            OpenError::Refused(why) => tracing::error!(
                %broker,
                "{why}. See docs/queues.md. Still trying; this error is logged at most once a minute"
            ),
            OpenError::Connection(_) | OpenError::Timeout => {
                tracing::warn!(%broker, "can't connect to the broker; still trying: {error:#}");
            }
        }
    }
}
