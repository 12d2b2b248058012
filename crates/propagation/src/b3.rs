//! B3, Zipkin's format, in one header or in several: <https://github.com/openzipkin/b3-propagation>.

use crate::{
    caller::{Asked, Debug},
    hex::short_hex,
};
use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, Injector, TextMapPropagator, text_map_propagator::FieldIter},
    trace::{Link, SpanContext, SpanId, SpanKind, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{SamplingDecision, SamplingResult, ShouldSample};
use std::sync::LazyLock;

const SINGLE: &str = "b3";
const TRACE_ID: &str = "x-b3-traceid";
const SPAN_ID: &str = "x-b3-spanid";
const SAMPLED: &str = "x-b3-sampled";
const FLAGS: &str = "x-b3-flags";

/// The encoding that a [`B3Propagator`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum B3Encoding {
    /// One header, `b3`.
    Single,
    /// One header for each field, `X-B3-*`.
    Multi,
}

/// Reads both encodings (the single header first) and writes one of them.
///
/// A trace with the debug flag counts as sampled, and the flag is forwarded. A deferred decision (no sampling
/// state) counts as not sampled, as in the other OpenTelemetry SDKs. A sampling state without ids (`b3: 0`)
/// tells the samplers `parentbased_*` whether to sample the trace that begins in this process.
#[derive(Debug, Clone, Copy)]
pub struct B3Propagator(pub B3Encoding);

impl TextMapPropagator for B3Propagator {
    fn inject_context(&self, cx: &Context, injector: &mut dyn Injector) {
        let span = cx.span();
        let span_context = span.span_context();
        if !span_context.is_valid() {
            // If this process has no trace, it passes the caller's sampling state on to the next process.
            match (cx.get::<Asked>(), self.0) {
                (Some(asked), B3Encoding::Single) => injector.set(SINGLE, asked.state().to_owned()),
                (Some(Asked::Debug), B3Encoding::Multi) => injector.set(FLAGS, "1".to_owned()),
                (Some(asked), B3Encoding::Multi) => injector.set(SAMPLED, asked.state().to_owned()),
                (None, _) => {}
            }
            return;
        }
        let (trace_id, span_id) = (span_context.trace_id(), span_context.span_id());
        let is_debug = Debug::is_on(cx, span_context);
        let sampled = if span_context.is_sampled() { "1" } else { "0" };
        match self.0 {
            B3Encoding::Single if is_debug => injector.set(SINGLE, format!("{trace_id}-{span_id}-d")),
            B3Encoding::Single => injector.set(SINGLE, format!("{trace_id}-{span_id}-{sampled}")),
            B3Encoding::Multi => {
                injector.set(TRACE_ID, trace_id.to_string());
                injector.set(SPAN_ID, span_id.to_string());
                // The debug flag implies the sampling state, so sending both would be an error.
                let (name, state) = if is_debug { (FLAGS, "1") } else { (SAMPLED, sampled) };
                injector.set(name, state.to_owned());
            }
        }
    }

    fn extract_with_context(&self, cx: &Context, extractor: &dyn Extractor) -> Context {
        let remote = parse_single(extractor.get(SINGLE)).or_else(|| {
            let is_debug = extractor.get(FLAGS).map(str::trim) == Some("1");
            let state = if is_debug { "d" } else { extractor.get(SAMPLED).unwrap_or_default().trim() };
            span_context(extractor.get(TRACE_ID)?.trim(), extractor.get(SPAN_ID)?.trim(), state)
        });
        match remote {
            Some((remote, is_debug)) => Debug::remote(cx, remote, is_debug),
            None if cx.has_active_span() => cx.clone(),
            None => Asked::of(extractor).map_or_else(|| cx.clone(), |asked| cx.with_value(asked)),
        }
    }

    fn fields(&self) -> FieldIter<'_> {
        static ONE: LazyLock<[String; 1]> = LazyLock::new(|| [SINGLE.into()]);
        static MANY: LazyLock<[String; 4]> =
            LazyLock::new(|| [TRACE_ID, SPAN_ID, SAMPLED, FLAGS].map(String::from));
        match self.0 {
            B3Encoding::Single => FieldIter::new(ONE.as_slice()),
            B3Encoding::Multi => FieldIter::new(MANY.as_slice()),
        }
    }
}

impl Asked {
    fn of(headers: &dyn Extractor) -> Option<Self> {
        let from_state = |state: &str| match state.trim() {
            "0" | "false" => Some(Self::Drop),
            "1" | "true" => Some(Self::Sample),
            "d" => Some(Self::Debug),
            _ => None,
        };
        if let Some(single) = headers.get(SINGLE) {
            return from_state(single);
        }
        // The headers have an id, but no trace could be read from them, so they are malformed.
        if headers.get(TRACE_ID).or(headers.get(SPAN_ID)).is_some() {
            return None;
        }
        let is_debug = headers.get(FLAGS).map(str::trim) == Some("1");
        if is_debug { Some(Self::Debug) } else { from_state(headers.get(SAMPLED)?) }
    }

    fn state(self) -> &'static str {
        match self {
            Self::Drop => "0",
            Self::Sample => "1",
            Self::Debug => "d",
        }
    }
}

/// A sampler for the spans that begin a trace. It follows the sampling state that the caller sent, or else
/// the inner sampler.
#[derive(Debug, Clone)]
pub struct AskedBy<S>(pub S);

impl<S: ShouldSample + Clone + 'static> ShouldSample for AskedBy<S> {
    fn should_sample(
        &self,
        cx: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let decision = match cx.and_then(|cx| cx.get::<Asked>()) {
            None => return self.0.should_sample(cx, trace_id, name, kind, attributes, links),
            Some(Asked::Drop) => SamplingDecision::Drop,
            Some(Asked::Sample | Asked::Debug) => SamplingDecision::RecordAndSample,
        };
        SamplingResult { decision, attributes: Vec::new(), trace_state: TraceState::NONE }
    }
}

/// Parses `{trace id}-{span id}`, optionally followed by `-{sampling state}`, and then by
/// `-{parent span id}`.
fn parse_single(value: Option<&str>) -> Option<(SpanContext, bool)> {
    let mut fields = value?.trim().split('-');
    let (trace_id, span_id) = (fields.next()?, fields.next()?);
    let state = fields.next().unwrap_or_default();
    if let Some(parent) = fields.next() {
        short_hex(parent, 16)?;
    }
    fields.next().is_none().then(|| span_context(trace_id, span_id, state))?
}

/// Returns the span context, and whether it has the debug flag.
fn span_context(trace_id: &str, span_id: &str, state: &str) -> Option<(SpanContext, bool)> {
    // A trace id has 64 or 128 bits. Other lengths are illegal.
    if !matches!(trace_id.len(), 16 | 32) || span_id.len() != 16 {
        return None;
    }
    let flags = match state {
        "1" | "d" | "true" => TraceFlags::SAMPLED,
        "0" | "false" | "" => TraceFlags::NOT_SAMPLED,
        _ => return None,
    };
    let trace_id = TraceId::from(short_hex(trace_id, 32)?);
    let span_id = SpanId::from(short_hex(span_id, 16)? as u64);
    let remote = SpanContext::new(trace_id, span_id, flags, true, TraceState::NONE);
    remote.is_valid().then_some((remote, state == "d"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Lines;
    use opentelemetry_sdk::trace::Sampler;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const TRACE: &str = "80f198ee56343ba864fe8b2a57d3eff7";
    const SPAN: &str = "e457b5a2e4d86bd1";

    fn extract(headers: &[(&str, &str)]) -> Option<SpanContext> {
        let cx = B3Propagator(B3Encoding::Single).extract_with_context(&Context::new(), &Lines(headers));
        Some(cx.span().span_context().clone()).filter(SpanContext::is_valid)
    }

    fn injected(encoding: B3Encoding) -> HashMap<String, String> {
        let remote = extract(&[("b3", &format!("{TRACE}-{SPAN}-1"))]).unwrap();
        sent(encoding, &Context::new().with_remote_span_context(remote))
    }

    fn sent(encoding: B3Encoding, cx: &Context) -> HashMap<String, String> {
        let mut headers = HashMap::new();
        B3Propagator(encoding).inject_context(cx, &mut headers);
        headers
    }

    #[test]
    fn single_header_is_read() {
        for (state, sampled) in
            [("", false), ("-0", false), ("-1", true), ("-d", true), ("-1-05e3ac9a4f6e3b90", true)]
        {
            let remote = extract(&[("b3", &format!("{TRACE}-{SPAN}{state}"))]).unwrap();
            assert_eq!(remote.trace_id().to_string(), TRACE);
            assert_eq!(remote.span_id().to_string(), SPAN);
            assert_eq!(remote.is_sampled(), sampled, "{state}");
        }
    }

    #[test]
    fn multi_headers_are_read() {
        let ids = [("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN)];
        assert!(!extract(&ids).unwrap().is_sampled());
        assert!(extract(&[ids[0], ids[1], ("x-b3-sampled", "1")]).unwrap().is_sampled());
        assert!(extract(&[ids[0], ids[1], ("x-b3-flags", "1")]).unwrap().is_sampled());
    }

    #[test]
    fn short_trace_id_is_padded() {
        let remote = extract(&[("b3", &format!("64fe8b2a57d3eff7-{SPAN}-1"))]).unwrap();
        assert_eq!(remote.trace_id().to_string(), "000000000000000064fe8b2a57d3eff7");
    }

    #[test]
    fn malformed_headers_are_refused() {
        for malformed in [
            "",
            "0",
            "1",
            "d",
            "-",
            "--",
            "é",
            "80f198ee56343ba864fe8b2a57d3eff7",
            "80f198ee56343ba864fe8b2a57d3eff-e457b5a2e4d86bd1-1",
            "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd-1",
            "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-2",
            "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-xyz",
            "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90-",
            "x0f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1",
            "00000000000000000000000000000000-e457b5a2e4d86bd1-1",
            "80f198ee56343ba864fe8b2a57d3eff7-0000000000000000-1",
        ] {
            assert_eq!(extract(&[("b3", malformed)]), None, "{malformed:?}");
        }
        assert_eq!(extract(&[("x-b3-traceid", TRACE)]), None);
        assert_eq!(extract(&[("x-b3-traceid", TRACE), ("x-b3-spanid", "7")]), None);
    }

    #[test]
    fn each_encoding_writes_its_own_headers() {
        assert_eq!(injected(B3Encoding::Single), [("b3".into(), format!("{TRACE}-{SPAN}-1"))].into());
        let multi = [("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN), ("x-b3-sampled", "1")];
        assert_eq!(injected(B3Encoding::Multi), multi.map(|(k, v)| (k.into(), v.into())).into());
    }

    #[test]
    fn a_debug_flag_is_sent_on_with_its_own_trace() {
        let single = format!("{TRACE}-{SPAN}-d");
        for received in [
            &[("b3", single.as_str())][..],
            &[("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN), ("x-b3-flags", "1")],
        ] {
            let cx = B3Propagator(B3Encoding::Single).extract_with_context(&Context::new(), &Lines(received));
            assert_eq!(sent(B3Encoding::Single, &cx)["b3"], single);
            let multi = sent(B3Encoding::Multi, &cx);
            assert_eq!((multi["x-b3-flags"].as_str(), multi.contains_key("x-b3-sampled")), ("1", false));

            let other = extract(&[("b3", &format!("{}-{SPAN}-1", "1".repeat(32)))]).unwrap();
            assert!(sent(B3Encoding::Single, &cx.with_remote_span_context(other))["b3"].ends_with("-1"));
        }
    }

    #[test]
    fn a_sampling_state_alone_decides_about_the_trace_that_begins_here() {
        let of = |headers: &[(&str, &str)]| {
            let cx = B3Propagator(B3Encoding::Single).extract_with_context(&Context::new(), &Lines(headers));
            assert!(!cx.has_active_span(), "{headers:?}");
            let sampled = |root: Sampler| {
                let (id, kind) = (TraceId::from(1), SpanKind::Server);
                let parent_based = Sampler::ParentBased(Box::new(AskedBy(root)));
                parent_based.should_sample(Some(&cx), id, "", &kind, &[], &[]).decision
            };
            let decisions = [sampled(Sampler::AlwaysOn), sampled(Sampler::AlwaysOff)];
            (cx, decisions.map(|decision| decision == SamplingDecision::RecordAndSample))
        };
        let trace =
            SpanContext::new(TraceId::from(1), SpanId::from(2), TraceFlags::SAMPLED, false, TraceState::NONE);
        for (headers, decisions, single, multi) in [
            (&[("b3", "0")][..], [false, false], "0", ("x-b3-sampled", "0")),
            (&[("x-b3-sampled", "0")], [false, false], "0", ("x-b3-sampled", "0")),
            (&[("x-b3-sampled", "false")], [false, false], "0", ("x-b3-sampled", "0")),
            (&[("b3", "1")], [true, true], "1", ("x-b3-sampled", "1")),
            (&[("x-b3-sampled", "1")], [true, true], "1", ("x-b3-sampled", "1")),
            (&[("b3", "d")], [true, true], "d", ("x-b3-flags", "1")),
            (&[("x-b3-flags", "1"), ("x-b3-sampled", "0")], [true, true], "d", ("x-b3-flags", "1")),
        ] {
            let (cx, decided) = of(headers);
            assert_eq!(decided, decisions, "{headers:?}");
            // Without a trace, the sampling state is forwarded alone. With a trace, it is sent with the ids.
            assert_eq!(sent(B3Encoding::Single, &cx), [("b3".into(), single.into())].into());
            assert_eq!(sent(B3Encoding::Multi, &cx), [(multi.0.into(), multi.1.into())].into());
            if decided[0] {
                let cx = cx.with_remote_span_context(trace.clone());
                assert!(sent(B3Encoding::Single, &cx)["b3"].ends_with(&format!("-{single}")));
            }
        }
        for headers in [
            &[][..],
            &[("b3", "2")],
            &[("x-b3-sampled", "yes")],
            &[("x-b3-sampled", "0"), ("x-b3-traceid", "7")],
        ] {
            assert_eq!(of(headers).1, [true, false], "{headers:?}");
            assert_eq!(sent(B3Encoding::Single, &of(headers).0), HashMap::new());
        }
        // A trace that came from a caller does not begin here, so the sampling state in `b3` does not count.
        let cx = Context::new().with_remote_span_context(trace);
        let cx = B3Propagator(B3Encoding::Single).extract_with_context(&cx, &Lines(&[("b3", "d")]));
        assert!(sent(B3Encoding::Single, &cx)["b3"].ends_with("-1"));
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic(single in ".{0,80}", trace_id in ".{0,40}", span_id in ".{0,20}") {
            extract(&[("b3", &single), ("x-b3-traceid", &trace_id), ("x-b3-spanid", &span_id)]);
        }
    }
}
