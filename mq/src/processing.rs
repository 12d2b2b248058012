//! Processes a login. Nothing here knows how the login came.

use crate::history::{History, Refused};
use futures_util::future::BoxFuture;
use std::{
    fmt,
    task::{Context, Poll},
};
use tower::Service;

/// A login to process.
#[derive(Clone)]
pub struct Login {
    /// The id of the message, which is the same for every delivery of the same login.
    pub message_id: String,
    /// The trace in which it happened, as 32 hex digits.
    pub trace_id: Option<String>,
    /// Who logged in. This is personal, so it stays out of spans, logs and errors.
    pub mobile: String,
    /// Which attempt this is, from 1.
    pub attempt: u32,
}

/// Shows which login it is, but not whose.
impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { message_id, attempt, .. } = self;
        f.debug_struct("Login")
            .field("message_id", message_id)
            .field("attempt", attempt)
            .finish_non_exhaustive()
    }
}

/// The result of processing a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processed {
    /// The login took effect, durably.
    Applied,
    /// The login had taken effect before, so it changed nothing.
    Duplicate,
}

/// Records logins in the history. This is the innermost service, which [`crate::processing_stack`] wraps in
/// layers.
#[derive(Clone)]
pub struct RecordLogin {
    history: History,
}

impl RecordLogin {
    /// Makes a service that records logins in `history`.
    pub fn new(history: History) -> Self {
        Self { history }
    }
}

impl Service<Login> for RecordLogin {
    type Response = Processed;
    type Error = Refused;
    type Future = BoxFuture<'static, Result<Processed, Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, login: Login) -> Self::Future {
        let history = self.history.clone();
        Box::pin(async move {
            let attempt = login.attempt;
            let processed = history.apply(login).await?;
            match processed {
                Processed::Applied => tracing::info!(attempt, "login recorded"),
                Processed::Duplicate => tracing::info!(attempt, "login was recorded before"),
            }
            Ok(processed)
        })
    }
}
