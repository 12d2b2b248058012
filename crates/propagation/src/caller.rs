//! Facts about a caller's trace that OpenTelemetry's span context can't hold. They are separate values in the
//! [`Context`].

use opentelemetry::{
    Context,
    trace::{SpanContext, TraceContextExt, TraceId},
};

/// The sampling state of a caller that sends no ids, for example `b3: 0` or `X-B3-Sampled: 0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    Drop,
    Sample,
    /// Sample, and forward the debug flag through the whole trace.
    Debug,
}

/// The flag "debug" of B3 and Jaeger, which includes "sampled". The flag must be forwarded (OpenTelemetry,
/// "B3 Requirements"), but OpenTelemetry's span context has no such flag. So this value in the context holds
/// the flag, with the id of its trace.
#[derive(Debug)]
pub(crate) struct Debug(TraceId);

impl Debug {
    /// Returns `cx` with the caller's span context, and with the debug flag if `is_debug`. B3 and Jaeger
    /// can't say whether a trace id is random. So the trace is marked as [`NotRandom`], unless another
    /// propagator has already read the same trace and decided that.
    pub fn remote(cx: &Context, remote: SpanContext, is_debug: bool) -> Context {
        let trace_id = remote.trace_id();
        let is_known = cx.span().span_context().trace_id() == trace_id;
        let cx = cx.with_remote_span_context(remote);
        let cx = if is_known { cx } else { cx.with_value(NotRandom(trace_id)) };
        if is_debug { cx.with_value(Self(trace_id)) } else { cx }
    }

    /// Returns whether the debug flag must be forwarded with this span.
    pub fn is_on(cx: &Context, span: &SpanContext) -> bool {
        let came_with_it = cx.get::<Self>().is_some_and(|Self(trace_id)| *trace_id == span.trace_id());
        (came_with_it || cx.get::<Asked>() == Some(&Asked::Debug)) && span.is_sampled()
    }
}

/// Marks the trace of a caller that didn't say that the trace id is random. In a span of this process, every
/// other trace id is random, because either the SDK made it, or the caller set the flag "random". The flags of
/// the span don't tell that, because the SDK never sets the flag "random", and clears the caller's flag in spans
/// that are not sampled.
#[derive(Debug)]
pub(crate) struct NotRandom(pub TraceId);

impl NotRandom {
    pub fn is_on(cx: &Context, span: &SpanContext) -> bool {
        cx.get::<Self>().is_some_and(|Self(trace_id)| *trace_id == span.trace_id())
    }
}
