//! Processes a login. Nothing in this module knows how the login arrived.

use crate::history::{Change, History, Login, Processed, Refused};

/// Records a login in the history. This is the innermost service, which [`crate::processing_stack`] wraps in
/// layers.
///
/// # Errors
/// If the database refuses this login.
pub async fn record(history: History, login: Login) -> Result<Processed, Refused> {
    let attempt = login.attempt;
    if history.commit(Change::Apply(login)).await? == 0 {
        tracing::info!(attempt, "login was recorded before");
        return Ok(Processed::Duplicate);
    }
    tracing::info!(attempt, "login recorded");
    Ok(Processed::Applied)
}
