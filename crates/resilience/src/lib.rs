//! Layers that keep a service answering when it, its callers or what it calls are in trouble.
//!
//! | Layer | Side | What it does |
//! |---|---|---|
//! | [`CatchPanicLayer`] | server | a handler that panics is an answer, not a lost connection |
//! | [`ShedLayer`] | server | more requests at once than it can serve are refused at once |
//! | [`DeadlineLayer`] | server | an answer in time, or a refusal |
//! | [`CallDeadlineLayer`] | gRPC client | the whole call within what time is left |
//! | [`RetryLayer`] | gRPC client | what is safe to repeat is tried again |
//! | [`CircuitBreakerLayer`] | gRPC client | what keeps failing is left alone for a while |
//! | [`UnaryLayer`] | gRPC client | beneath them: one message there, one back, one [`tonic::Status`] |
//!
//! The time that is left is a [`Deadline`] in OpenTelemetry's context, so it goes where the trace goes.
//! In which order they stand, and why: `docs/layers.md`.

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
pub use shed::{Shed, ShedLayer};
pub use unary::{Unary, UnaryLayer};
