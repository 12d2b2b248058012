//! How a login was published, or why not.

/// How a login was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The broker has the login.
    Confirmed,
    /// The login is in the spool on disk, and will be published later.
    Spooled(WhySpooled),
}

/// Why a login went to the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WhySpooled {
    /// There is no connection to the broker now.
    #[error("not connected to the broker")]
    NotConnected,
    /// There was a connection, but the broker has not confirmed the login.
    #[error(transparent)]
    Published(#[from] amqp::Unconfirmed),
    /// Earlier logins have to be published first. They are in the spool, or in a round that is overdue.
    #[error("earlier logins go first")]
    BehindSpool,
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

impl WhySpooled {
    /// Returns a short name for spans and metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotConnected => "not_connected",
            Self::Published(why) => why.reason(),
            Self::BehindSpool => "behind_spool",
        }
    }
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
