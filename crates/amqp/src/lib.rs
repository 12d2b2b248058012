//! What a client of RabbitMQ needs besides lapin.
//!
//! - [`Arguments`]: flags and environment variables
//! - [`connection`]: connecting, with TLS or without, by a deadline; [`Backoff`]: the pause before the next
//!   try
//! - [`opening`]: opens a connection and declares what it needs, within a time limit, and logs a failure
//! - [`Session`]: publishing with confirms
//! - [`Topology`]: a work queue with its exchange, its dead letters and its delayed retries, all of one
//!   [`QueueType`]
//! - [`properties`]: reading the properties of a message that anybody may have written
//! - [`inbound`]: a connection whose content headers are checked before lapin reads them; `frames` finds
//!   these headers, and [`content_header`] checks them

mod arguments;
mod backoff;
pub mod connection;
pub mod content_header;
mod frames;
pub mod inbound;
pub mod opening;
pub mod properties;
mod session;
mod topology;

pub use arguments::Arguments;
pub use backoff::Backoff;
pub use connection::Server;
pub use opening::{Failures, OpenError};
pub use session::{IfBlocked, Session, Unconfirmed};
pub use topology::{QueueType, Topology};
