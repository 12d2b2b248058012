//! The tracer of this service's hand-written spans.

use opentelemetry::global::BoxedTracer;
use std::sync::LazyLock;

/// Makes the hand-written spans of this service.
pub static TRACER: LazyLock<BoxedTracer> =
    LazyLock::new(|| telemetry::tracer("api", env!("CARGO_PKG_VERSION")));
