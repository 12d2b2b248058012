//! Tracers and meters, with the name and version of the code that uses them (the instrumentation scope).

use crate::semconv;
use opentelemetry::{
    InstrumentationScope,
    global::{self, BoxedTracer},
    metrics::Meter,
};

/// Returns a tracer for hand-written spans. `name` and `version` tell which code makes the spans.
pub fn tracer(name: &'static str, version: &'static str) -> BoxedTracer {
    global::tracer_with_scope(scope(name, version))
}

/// Returns a meter for hand-written metrics, with the scope of [`tracer`].
pub fn meter(name: &'static str, version: &'static str) -> Meter {
    global::meter_with_scope(scope(name, version))
}

/// Returns the tracer of the HTTP and gRPC layers.
pub(crate) fn layers_tracer() -> BoxedTracer {
    tracer("throughline", env!("CARGO_PKG_VERSION"))
}

fn scope(name: &'static str, version: &'static str) -> InstrumentationScope {
    InstrumentationScope::builder(name).with_version(version).with_schema_url(semconv::SCHEMA_URL).build()
}

/// Returns the meter of the HTTP, gRPC and AMQP metrics.
pub(crate) fn layers_meter() -> Meter {
    meter("throughline", env!("CARGO_PKG_VERSION"))
}
