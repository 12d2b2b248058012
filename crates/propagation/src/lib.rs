//! The propagators, with one wire format in each file, and the choice among them by `OTEL_PROPAGATORS`.
//!
//! Each propagator implements OpenTelemetry's [`TextMapPropagator`], so it can be copied into any service.
//! Propagators are independent of the carrier. The carriers for HTTP headers, gRPC metadata and AMQP headers
//! are in the crate `telemetry`, and the carrier for the message body is in the crate `proto`.

mod b3;
mod baggage;
mod jaeger;
mod trace_context;

pub use b3::{AskedBy, B3Encoding, B3Propagator};
pub use baggage::{BaggagePropagator, MAX_BAGGAGE};
pub use jaeger::JaegerPropagator;
pub use trace_context::{MAX_TRACESTATE, TraceContextPropagator, traceparent};

use opentelemetry::{
    Context,
    propagation::{TextMapCompositePropagator, TextMapPropagator},
    trace::{SpanContext, TraceContextExt, TraceId},
};

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

/// Combines several propagators. Each propagator writes its headers. If several propagators read a parent, the
/// last of them wins.
pub fn composite(propagators: &[Propagator]) -> TextMapCompositePropagator {
    TextMapCompositePropagator::new(propagators.iter().map(|p| p.build()).collect())
}

/// The flag "debug" of B3 and Jaeger, which includes "sampled". The flag must be forwarded (OpenTelemetry, "B3
/// Requirements"), but OpenTelemetry's span context has no such flag. So this value in the context holds the
/// flag, with the id of its trace.
#[derive(Debug)]
struct Debug(TraceId);

impl Debug {
    /// Returns `cx` with the caller's span context, and with the debug flag if `is_debug`. B3 and Jaeger can't
    /// say whether a trace id is random, so what another propagator has read about the same trace is kept.
    fn remote(cx: &Context, remote: SpanContext, is_debug: bool) -> Context {
        let trace_id = remote.trace_id();
        let is_known = cx.span().span_context().trace_id() == trace_id;
        let cx = cx.with_remote_span_context(remote);
        let cx = if is_known { cx } else { cx.with_value(NotRandom(trace_id)) };
        if is_debug { cx.with_value(Self(trace_id)) } else { cx }
    }

    /// Returns whether the debug flag must be forwarded with this span.
    fn is_on(cx: &Context, span: &SpanContext) -> bool {
        let came_with_it = cx.get::<Self>().is_some_and(|Self(trace_id)| *trace_id == span.trace_id());
        (came_with_it || cx.get::<b3::Asked>() == Some(&b3::Asked::Debug)) && span.is_sampled()
    }
}

/// Marks the trace of a caller that didn't say that the trace id is random. All other trace ids are
/// random, because the SDK makes random ids. But the SDK never sets the flag "random", and clears the caller's
/// flag in spans that are not sampled.
#[derive(Debug)]
struct NotRandom(TraceId);

impl NotRandom {
    fn is_on(cx: &Context, span: &SpanContext) -> bool {
        cx.get::<Self>().is_some_and(|Self(trace_id)| *trace_id == span.trace_id())
    }
}

/// Parses exactly `2 * N` lower-case hex digits, as the W3C formats demand.
fn lower_hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    fn nibble(digit: u8) -> Option<u8> {
        match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        }
    }
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

/// Like [`lower_hex`], but accepts upper case, and pads with zeros on the left, for the ids of B3 and Jaeger.
fn padded_hex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let width = 2 * N;
    // An empty text would be padded to zeros. `lower_hex` refuses too many digits.
    let padded = (!digits.is_empty()).then(|| format!("{:0>width$}", digits.to_ascii_lowercase()))?;
    lower_hex(padded.as_bytes())
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
