//! Processes a login. Nothing in this module knows how the login arrived.

use crate::history::{History, Login, Processed, Refused};
use futures_util::future::BoxFuture;
use std::task::{Context, Poll};
use tower::Service;

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
