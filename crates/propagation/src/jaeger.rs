//! Jaeger's own header: <https://www.jaegertracing.io/sdk-migration/#propagation-format>.
//!
//! Only the trace context is read and written. Jaeger's baggage (`uberctx-*`) is not read. To propagate
//! baggage, add the propagator `baggage`.

use crate::{caller::Debug, hex::short_hex};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator, text_map_propagator::FieldIter},
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use std::sync::LazyLock;

const UBER_TRACE_ID: &str = "uber-trace-id";

const SAMPLED: u8 = 0b01;
const DEBUG: u8 = 0b10;

/// Reads and writes `uber-trace-id`.
#[derive(Debug, Clone, Copy)]
pub struct JaegerPropagator;

impl TextMapPropagator for JaegerPropagator {
    fn inject_context(&self, cx: &Context, injector: &mut dyn Injector) {
        let span = cx.span();
        let span_context = span.span_context();
        if span_context.is_valid() {
            let (trace_id, span_id) = (span_context.trace_id(), span_context.span_id());
            let debug = if Debug::is_on(cx, span_context) { DEBUG } else { 0 };
            let flags = u8::from(span_context.is_sampled()) | debug;
            // The third field, the parent span id, is deprecated and sent as 0.
            injector.set(UBER_TRACE_ID, format!("{trace_id}:{span_id}:0:{flags}"));
        }
    }

    fn extract_with_context(&self, cx: &Context, extractor: &dyn Extractor) -> Context {
        match extractor.get(UBER_TRACE_ID).and_then(parse) {
            Some((remote, is_debug)) => Debug::remote(cx, remote, is_debug),
            None => cx.clone(),
        }
    }

    fn fields(&self) -> FieldIter<'_> {
        static FIELDS: LazyLock<[String; 1]> = LazyLock::new(|| [UBER_TRACE_ID.into()]);
        FieldIter::new(FIELDS.as_slice())
    }
}

/// Parses `{trace id}:{span id}:{parent span id}:{flags}`, in which the colons may be URL-encoded.
fn parse(value: &str) -> Option<(SpanContext, bool)> {
    let value = value.trim().replace("%3A", ":").replace("%3a", ":");
    let mut fields = value.split(':');
    let trace_id = TraceId::from(short_hex(fields.next()?, 32)?);
    let span_id = SpanId::from(short_hex(fields.next()?, 16)? as u64);
    let _deprecated_parent = fields.next()?;
    let flags = short_hex(fields.next()?, 2)? as u8;
    let is_debug = flags & DEBUG != 0;
    let sampled = is_debug || flags & SAMPLED != 0;

    let flags = TraceFlags::default().with_sampled(sampled);
    let remote = SpanContext::new(trace_id, span_id, flags, true, TraceState::NONE);
    (remote.is_valid() && fields.next().is_none()).then_some((remote, is_debug))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn header_is_read() {
        for (header, sampled) in [
            ("4bf92f3577b34da6a3ce929d0e0e4736:00f067aa0ba902b7:0:1", true),
            ("4bf92f3577b34da6a3ce929d0e0e4736:00f067aa0ba902b7:0:0", false),
            ("4BF92F3577B34DA6A3CE929D0E0E4736:f067aa0ba902b7::2", true),
            ("4bf92f3577b34da6a3ce929d0e0e4736%3A00f067aa0ba902b7%3A0%3a01", true),
        ] {
            let (remote, is_debug) = parse(header).unwrap();
            assert_eq!(remote.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736", "{header}");
            assert_eq!(remote.span_id().to_string(), "00f067aa0ba902b7", "{header}");
            assert_eq!(remote.is_sampled(), sampled, "{header}");
            assert_eq!(is_debug, header.ends_with('2'), "{header}");
        }
    }

    #[test]
    fn malformed_headers_are_refused() {
        for malformed in [
            "",
            ":::",
            "1:1:0",
            "1:1:0:1:1",
            "0:1:0:1",
            "1:0:0:1",
            "x:1:0:1",
            "1:x:0:1",
            "1:1:0:x",
            "1:1:0:",
            "1:1:0:100",
            "14bf92f3577b34da6a3ce929d0e0e4736:1:0:1",
            "1:100f067aa0ba902b7:0:1",
            "é:1:0:1",
        ] {
            assert_eq!(parse(malformed), None, "{malformed:?}");
        }
    }

    #[test]
    fn header_is_written() {
        for (received, sent) in [("0", "0"), ("1", "1"), ("2", "3"), ("3", "3")] {
            let id = UBER_TRACE_ID.to_owned();
            let header = format!("4bf92f3577b34da6a3ce929d0e0e4736:f067aa0ba902b7:7:{received}");
            let carrier = HashMap::from([(id.clone(), header)]);
            let cx = JaegerPropagator.extract_with_context(&Context::new(), &carrier);
            let mut headers = HashMap::new();
            JaegerPropagator.inject_context(&cx, &mut headers);
            assert_eq!(headers[&id], format!("4bf92f3577b34da6a3ce929d0e0e4736:00f067aa0ba902b7:0:{sent}"));
        }
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic(header in "([0-9a-f]{0,33}:[0-9a-f]{0,17}:.{0,3}:.{0,3}|.{0,80})") {
            let _ = parse(&header);
        }
    }
}
