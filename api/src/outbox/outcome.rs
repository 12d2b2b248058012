//! How a login was published, or why not.

/// How a login was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The broker has the login.
    Confirmed,
    /// The login is in the spool on disk, and will be published later. The reason is a short name for spans:
    /// `not_connected`, `behind_spool` (earlier logins have to be published first), or that of
    /// [`amqp::Unconfirmed`].
    Spooled(&'static str),
}

/// Why a login was not published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The broker has not confirmed the login, and the spool has no room.
    #[error("the spool is full")]
    SpoolFull,
    /// The broker has not confirmed the login, and the login could not be written to disk either.
    #[error("the spool failed")]
    SpoolFailed,
}

impl PublishError {
    /// Returns a short name for spans and metrics.
    pub fn error_type(self) -> &'static str {
        match self {
            Self::SpoolFull => "spool_full",
            Self::SpoolFailed => "spool_failed",
        }
    }
}
