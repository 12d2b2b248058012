//! The propagators, with one wire format in each file, and the choice among them by `OTEL_PROPAGATORS`.
//!
//! Each propagator implements OpenTelemetry's [`TextMapPropagator`], so it can be copied into any service.
//! Propagators are independent of the carrier. The carriers for HTTP headers, gRPC metadata and AMQP headers
//! are in the crate `telemetry`, and the carrier for the message body is in the crate `proto`.

mod b3;
mod baggage;
mod caller;
mod hex;
mod jaeger;
mod trace_context;

pub use b3::{AskedBy, B3Encoding, B3Propagator};
pub use baggage::{BaggagePropagator, MAX_BAGGAGE};
pub use jaeger::JaegerPropagator;
pub use trace_context::{MAX_TRACESTATE, TraceContextPropagator, traceparent};

use opentelemetry::propagation::{TextMapCompositePropagator, TextMapPropagator};

/// A propagator that can be named in `OTEL_PROPAGATORS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagator {
    /// `tracecontext`: W3C `traceparent` and `tracestate`.
    TraceContext,
    /// `baggage`: W3C `baggage`.
    Baggage,
    /// `b3`: reads both B3 encodings, writes the single header.
    B3,
    /// `b3multi`: reads both B3 encodings, writes the `X-B3-*` headers.
    B3Multi,
    /// `jaeger`: `uber-trace-id`.
    Jaeger,
}

impl Propagator {
    /// Returns the propagator with this name in `OTEL_PROPAGATORS`, or `None` if the name is unknown.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "tracecontext" => Self::TraceContext,
            "baggage" => Self::Baggage,
            "b3" => Self::B3,
            "b3multi" => Self::B3Multi,
            "jaeger" => Self::Jaeger,
            _ => return None,
        })
    }

    fn build(self) -> Box<dyn TextMapPropagator + Send + Sync> {
        match self {
            Self::TraceContext => Box::new(TraceContextPropagator),
            Self::Baggage => Box::new(BaggagePropagator),
            Self::B3 => Box::new(B3Propagator(B3Encoding::Single)),
            Self::B3Multi => Box::new(B3Propagator(B3Encoding::Multi)),
            Self::Jaeger => Box::new(JaegerPropagator),
        }
    }
}

/// Combines several propagators. Each propagator writes its headers. If several propagators read a parent,
/// the last of them wins.
pub fn composite(propagators: &[Propagator]) -> TextMapCompositePropagator {
    TextMapCompositePropagator::new(propagators.iter().map(|p| p.build()).collect())
}

#[cfg(test)]
mod testing {
    use opentelemetry::propagation::Extractor;

    /// Header lines as they were received. Several lines may have the same name.
    pub struct Lines<'a>(pub &'a [(&'a str, &'a str)]);

    impl Extractor for Lines<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.get_all(key)?.first().copied()
        }

        fn keys(&self) -> Vec<&str> {
            self.0.iter().map(|(name, _)| *name).collect()
        }

        fn get_all(&self, key: &str) -> Option<Vec<&str>> {
            let lines: Vec<_> = self.0.iter().filter(|(name, _)| *name == key).map(|(_, v)| *v).collect();
            (!lines.is_empty()).then_some(lines)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_of_otel_propagators_stands_for_its_headers() {
        for (name, headers) in [
            ("tracecontext", &["traceparent", "tracestate"][..]),
            ("baggage", &["baggage"]),
            ("b3", &["b3"]),
            ("b3multi", &["x-b3-traceid", "x-b3-spanid", "x-b3-sampled", "x-b3-flags"]),
            ("jaeger", &["uber-trace-id"]),
        ] {
            let propagator = Propagator::from_name(name).unwrap().build();
            assert_eq!(propagator.fields().collect::<Vec<_>>(), headers, "{name}");
        }
        assert_eq!(Propagator::from_name("ottrace"), None);
    }
}
