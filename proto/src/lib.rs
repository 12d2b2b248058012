//! The contracts between the services. Everything that crosses a process boundary is defined here, once.
//!
//! - [`usercenter::v1`]: the gRPC API, from `usercenter/v1/usercenter.proto`
//! - [`login`]: the message that `api` publishes and `mq` consumes
//! - [`headers`]: the names of that message's AMQP headers, besides those of the trace context
//! - [`topology`]: the names of the exchange and queues that the message travels through

pub mod headers;
pub mod login;
pub mod topology;

/// The `usercenter` gRPC API.
pub mod usercenter {
    /// Version 1: client, server trait and messages.
    ///
    /// Generated from `usercenter/v1/usercenter.proto`. After a change to that file, run
    /// `UPDATE=1 cargo test -p proto --test generated`.
    #[allow(missing_docs, clippy::all)]
    pub mod v1 {
        include!("generated/usercenter.v1.rs");

        /// The compiled `.proto`, for gRPC reflection and for the list of known methods.
        pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/usercenter.v1.bin");
    }
}
