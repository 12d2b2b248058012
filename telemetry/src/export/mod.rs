//! From an ended span to the wire.
//!
//! A span is encoded the moment it ends, into the batch that will be sent: what waits in memory is the
//! message itself. To queue the SDK's structures and convert them later costs six times as much
//! (docs/decisions/0002-exporter.md).
//!
//! - [`otlp`], [`zipkin`]: how a span looks on the wire
//! - [`batch`]: the queue and the task that empties it
//! - [`transport`]: how a batch gets to the other side, and what its answer means

pub(crate) mod batch;
pub(crate) mod otlp;
pub(crate) mod transport;
pub(crate) mod zipkin;

pub use batch::{DroppedSpans, SpanCounts};
