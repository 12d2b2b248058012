//! The contracts between the services: what crosses a process boundary is defined here, once.
//!
//! - [`usercenter::v1`]: the gRPC API, from `usercenter/v1/usercenter.proto`
//! - [`login`]: the message that `api` publishes and `mq` consumes
//! - [`headers`]: the names of its AMQP headers, besides those of the trace context
//! - [`topology`]: the exchange and the queues that the message travels through
//! - [`broker`]: connects to the broker that holds them
//! - [`inbound`]: checks what the broker sends before lapin reads it; [`content_header`]: the check
//! - [`health`]: asks a service for its health by gRPC

pub mod broker;
pub mod content_header;
pub mod headers;
pub mod health;
pub mod inbound;
pub mod login;
pub mod topology;

/// The `usercenter` gRPC API.
pub mod usercenter {
    /// Version 1: client, server trait and messages.
    ///
    /// Generated from `usercenter/v1/usercenter.proto`; after a change there, run
    /// `UPDATE=1 cargo test -p proto --test generated`.
    #[allow(missing_docs, clippy::all)]
    pub mod v1 {
        include!("generated/usercenter.v1.rs");

        /// The compiled `.proto`, for gRPC reflection and for the list of known methods.
        pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/usercenter.v1.bin");
    }
}
