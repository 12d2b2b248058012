//! Traces, metrics and logs for a service that is built with axum, tonic and lapin.
//!
//! | Part | Contents |
//! |---|---|
//! | [`http`], [`grpc`], [`amqp`] | one boundary each: carrier, spans, attributes, metrics |
//! | [`propagation`] | the wire formats of a context |
//! | [`Config`], [`Telemetry`] | the `OTEL_*` variables, set-up, shutdown |
//! | [`ErrorType`] | why a layer refused a request, for the span around the layer |
//! | [`semconv`] | the names of attributes |
//!
//! ```no_run
//! # async fn serve() {}
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = telemetry::Config::from_env("my-service", env!("CARGO_PKG_VERSION"))?;
//! let telemetry = telemetry::Telemetry::start(config)?;
//! serve().await;
//! telemetry.shut_down(std::time::Duration::from_secs(3)).await;
//! # Ok(())
//! # }
//! ```

#![cfg_attr(
    not(all(feature = "axum", feature = "tonic", feature = "lapin")),
    allow(dead_code, reason = "some parts are used by only one boundary")
)]

#[cfg(feature = "lapin")]
pub mod amqp;
#[cfg(any(feature = "axum", feature = "tonic"))]
mod body;
mod causes;
mod clock;
mod config;
mod error_type;
mod export;
#[cfg(feature = "tonic")]
pub mod grpc;
#[cfg(any(feature = "axum", feature = "tonic"))]
pub mod headers;
#[cfg(feature = "axum")]
pub mod http;
mod log;
mod metrics;
mod otlp;
mod outage;
mod prometheus;
mod records;
mod redaction;
mod resource;
mod scope;
pub mod semconv;
mod telemetry;
#[cfg(feature = "zipkin")]
mod zipkin;

pub use causes::causes;
pub use config::{Config, ConfigError};
pub use error_type::ErrorType;
pub use propagation;
pub use scope::{meter, tracer};
pub use telemetry::Telemetry;

use opentelemetry::{
    Context, KeyValue,
    global::{self, BoxedSpan},
    propagation::{Extractor, Injector},
    trace::{Span, Status, TraceContextExt},
};

/// Returns `parent` with `span` as its current span. If the span isn't recorded, the context holds only its
/// ids and flags, which costs less.
pub(crate) fn with_span(parent: &Context, span: BoxedSpan) -> Context {
    if span.is_recording() {
        parent.with_span(span)
    } else {
        parent.with_remote_span_context(span.span_context().clone())
    }
}

/// Returns the attributes of a peer that was contacted. The list is empty if `address` is a name, because the
/// IP address behind the name is unknown here.
#[cfg(any(feature = "tonic", feature = "lapin"))]
pub(crate) fn peer(address: &str, port: i64) -> Vec<KeyValue> {
    if address.parse::<std::net::IpAddr>().is_err() {
        return Vec::new();
    }
    let address = address.to_owned();
    vec![
        KeyValue::new(semconv::NETWORK_PEER_ADDRESS, address),
        KeyValue::new(semconv::NETWORK_PEER_PORT, port),
    ]
}

/// Guards a hand-written span around an awaited future, which may be dropped at a deadline, or when the
/// caller hangs up. If the span in this context has not ended when the guard is dropped, the guard ends it as
/// cancelled.
#[derive(Debug)]
pub struct OrCancelled(pub Context);

impl Drop for OrCancelled {
    fn drop(&mut self) {
        let span = self.0.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, semconv::CANCELLED));
            span.set_status(Status::error(""));
            span.end();
        }
    }
}

/// Reads the context from an incoming request or message, with the global propagators.
pub fn extract(carrier: &dyn Extractor) -> Context {
    global::get_text_map_propagator(|propagator| propagator.extract_with_context(&Context::new(), carrier))
}

/// Writes `cx` into an outgoing request or message, with the global propagators.
pub fn inject(cx: &Context, carrier: &mut dyn Injector) {
    global::get_text_map_propagator(|propagator| propagator.inject_context(cx, carrier));
}
