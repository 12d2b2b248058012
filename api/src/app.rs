//! The state that the handlers use.

use crate::{
    publisher::Publisher,
    token::TokenIssuer,
    usercenter::{Health, Usercenter},
};
use serving::shutdown::Shutdown;

/// The state that the handlers use.
pub struct App {
    /// The client of usercenter, in its layers.
    pub usercenter: Usercenter,
    /// The client that checks usercenter's health, on the same connection.
    pub usercenter_health: Health,
    /// Tells whether this instance is shutting down.
    pub shutdown: Shutdown,
    /// Issues access tokens.
    pub tokens: TokenIssuer,
    /// Publishes logins.
    pub publisher: Publisher,
}
