//! What is done with a login. Nothing here knows how it came.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The logins so far. For now it only counts them.
#[derive(Debug, Default)]
pub struct LoginHistory {
    total: AtomicU64,
}

impl LoginHistory {
    /// Records a login of `_mobile`.
    pub fn record(&self, _mobile: &str) {
        let total = self.total.fetch_add(1, Relaxed) + 1;
        tracing::info!(total, "login recorded");
    }
}
