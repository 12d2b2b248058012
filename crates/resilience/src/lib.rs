//! Layers that keep a service answering when the service, its callers or the servers that it calls are in
//! trouble.
//!
//! | Layer | Side | What it does |
//! |---|---|---|
//! | [`CatchPanicLayer`] | server | answers when a handler panics, so that the connection is not lost |
//! | [`ShedLayer`] | server | refuses requests at once when too many are in flight |
//! | [`DeadlineLayer`] | server | answers in time, if need be with a refusal |
//! | [`CallDeadlineLayer`] | gRPC client | ends the whole call when no time is left |
//! | [`RetryLayer`] | gRPC client | repeats calls that are safe to repeat |
//! | [`CircuitBreakerLayer`] | gRPC client | stops calls for a while when they keep failing |
//! | [`UnaryLayer`] | gRPC client | innermost: sends one message, gets one message or a [`tonic::Status`] |
//!
//! A request's [`Deadline`] is in OpenTelemetry's context, so it goes where the trace goes. `docs/layers.md`
//! gives the order of the layers, and the reasons for it.

mod call_deadline;
mod catch_panic;
mod circuit;
mod circuit_breaker;
mod deadline;
mod rejection;
mod request_deadline;
mod retry;
mod shed;
mod unary;

pub use call_deadline::{CallDeadline, CallDeadlineLayer};
pub use catch_panic::{CatchPanic, CatchPanicLayer};
pub use circuit::{Circuit, CircuitOpen, Permission};
pub use circuit_breaker::{CircuitBreaker, CircuitBreakerLayer};
pub use deadline::Deadline;
pub use rejection::Rejection;
pub use request_deadline::{DeadlineLayer, RequestDeadline};
pub use retry::{Retry, RetryLayer};
pub use shed::{InFlight, Shed, ShedLayer};
pub use unary::{Unary, UnaryLayer};
