//! Tracing for a service of axum, tonic and lapin.
//!
//! | Part | What it has |
//! |---|---|
//! | [`http`], [`grpc`], [`amqp`] | one boundary each: carrier, spans, attributes |
//! | [`propagation`] | the wire formats of a context |
//! | [`Config`], [`Telemetry`] | the `OTEL_*` variables, set-up, shutdown |
//! | [`semconv`] | the names of attributes |
//!
//! ```no_run
//! # async fn serve() {}
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = telemetry::Config::from_env("my-service", env!("CARGO_PKG_VERSION"))?;
//! let telemetry = telemetry::Telemetry::start(config);
//! serve().await;
//! telemetry.shut_down(std::time::Duration::from_secs(3)).await;
//! # Ok(())
//! # }
//! ```

pub mod amqp;
mod body;
mod config;
mod export;
pub mod grpc;
pub mod http;
mod log;
pub mod propagation;
mod resource;
pub mod semconv;
mod telemetry;

pub use config::{Config, ConfigError};
pub use export::SpanCounts;
pub use telemetry::Telemetry;

use opentelemetry::{
    Context, InstrumentationScope,
    global::{self, BoxedTracer},
    propagation::{Extractor, Injector},
};

/// The tracer of the edge spans.
pub(crate) fn tracer() -> BoxedTracer {
    let scope = InstrumentationScope::builder("throughline")
        .with_version(env!("CARGO_PKG_VERSION"))
        .with_schema_url(semconv::SCHEMA_URL)
        .build();
    global::tracer_with_scope(scope)
}

/// The context that came with a request, by the propagators in force.
pub fn extract(carrier: &dyn Extractor) -> Context {
    global::get_text_map_propagator(|propagator| propagator.extract_with_context(&Context::new(), carrier))
}

/// Writes `cx` into what is sent, by the propagators in force.
pub fn inject(cx: &Context, carrier: &mut dyn Injector) {
    global::get_text_map_propagator(|propagator| propagator.inject_context(cx, carrier));
}
