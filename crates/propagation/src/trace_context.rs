//! W3C Trace Context, level 2, read strictly: <https://www.w3.org/TR/trace-context-2/>.
//!
//! The propagator of the Rust SDK accepts headers that the Recommendation says must be refused. This
//! propagator passes all of the W3C group's own conformance cases (docs/decisions/0003-propagators.md).

use crate::{caller::NotRandom, hex::lower_hex};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator, text_map_propagator::FieldIter},
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use std::sync::LazyLock;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// `00-{trace-id}-{parent-id}-{flags}`
const VERSION_00_LENGTH: usize = 55;

/// The flag of level 2 that says that the trace id is random (section "Random Trace ID Flag").
const RANDOM: TraceFlags = TraceFlags::new(0b10);

/// Flags with a meaning in level 2: sampled, and random. All other flags are sent as zero.
const KNOWN_FLAGS: u8 = 0b11;

/// The longest `tracestate`, in bytes, that is read and therefore forwarded. The Recommendation asks for at
/// least this much (section "tracestate Limits").
pub const MAX_TRACESTATE: usize = 512;

/// Reads and writes `traceparent` and `tracestate`.
#[derive(Debug, Clone, Copy)]
pub struct TraceContextPropagator;

impl TextMapPropagator for TraceContextPropagator {
    fn inject_context(&self, cx: &Context, injector: &mut dyn Injector) {
        let Some(traceparent) = traceparent(cx) else {
            return;
        };
        injector.set(TRACEPARENT, traceparent);

        let span = cx.span();
        let span_context = span.span_context();
        let tracestate = match cx.get::<LongVendorTraceState>() {
            Some(verbatim) if verbatim.trace_id == span_context.trace_id() => verbatim.header.clone(),
            _ => span_context.trace_state().header(),
        };
        // An empty `tracestate` is legal to receive, but "SHOULD NOT" be sent (section 3.3.1.1).
        if !tracestate.is_empty() {
            injector.set(TRACESTATE, tracestate);
        }
    }

    fn extract_with_context(&self, cx: &Context, extractor: &dyn Extractor) -> Context {
        // Two `traceparent` headers contradict each other, so neither is used.
        let traceparents = extractor.get_all(TRACEPARENT).unwrap_or_default();
        let [traceparent] = traceparents[..] else {
            return cx.clone();
        };
        let Some((trace_id, span_id, flags)) = parse_traceparent(traceparent) else {
            return cx.clone();
        };
        // A tracestate that can't be parsed is dropped, because it must not harm the traceparent.
        let lines = extractor.get_all(TRACESTATE).unwrap_or_default();
        let members = parse_tracestate(&lines).map(cut).unwrap_or_default();
        let trace_state = TraceState::from_key_value(members.iter().copied());
        let remote =
            |state| cx.with_remote_span_context(SpanContext::new(trace_id, span_id, flags, true, state));
        let cx = match trace_state {
            Ok(trace_state) => remote(trace_state),
            Err(_) => {
                let header = members.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
                let shown = members.iter().filter(|member| TraceState::from_key_value([**member]).is_ok());
                let shown = TraceState::from_key_value(shown.copied()).unwrap_or_default();
                remote(shown).with_value(LongVendorTraceState { trace_id, header })
            }
        };
        if flags & RANDOM != RANDOM {
            cx.with_value(NotRandom(trace_id))
        } else if NotRandom::is_on(&cx, cx.span().span_context()) {
            // B3 or Jaeger has already read the same trace, and could not know that the trace id is random.
            cx.with_value(NotRandom(TraceId::INVALID))
        } else {
            cx
        }
    }

    fn fields(&self) -> FieldIter<'_> {
        static FIELDS: LazyLock<[String; 2]> = LazyLock::new(|| [TRACEPARENT.into(), TRACESTATE.into()]);
        FieldIter::new(FIELDS.as_slice())
    }
}

/// A valid `tracestate` with a key that the API's [`TraceState`] refuses, because the API allows only one
/// `@`, and only 13 characters after it. The next service gets the whole header, but spans show only the
/// members that the API accepts.
#[derive(Debug)]
struct LongVendorTraceState {
    trace_id: TraceId,
    header: String,
}

/// Returns the `traceparent` of a context, in version 00, or `None` if there is no trace.
pub fn traceparent(cx: &Context) -> Option<String> {
    fn push_hex(out: &mut Vec<u8>, bytes: &[u8]) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        for byte in bytes {
            out.extend([DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 0xf)]]);
        }
    }
    let span = cx.span();
    let span = span.span_context();
    if !span.is_valid() {
        return None;
    }
    // If the context is the caller's, its flags are forwarded unchanged. In a span of this process, the trace
    // id counts as random, unless it came from a caller that didn't mark it as random.
    let is_random = !span.is_remote() && !NotRandom::is_on(cx, span);
    let flags = if is_random { span.trace_flags() | RANDOM } else { span.trace_flags() };
    let mut header = Vec::with_capacity(VERSION_00_LENGTH);
    header.extend(b"00-");
    push_hex(&mut header, &span.trace_id().to_bytes());
    header.push(b'-');
    push_hex(&mut header, &span.span_id().to_bytes());
    header.push(b'-');
    push_hex(&mut header, &[flags.to_u8() & KNOWN_FLAGS]);
    String::from_utf8(header).ok()
}

/// Parses a `traceparent` (section 3.2.2, and section 3.2.4 for versions above 00).
fn parse_traceparent(value: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let value = trim_ows(value);
    let dashes = [value.get(2..3)?, value.get(35..36)?, value.get(52..53)?];
    let known_flags = match lower_hex(value.get(..2)?, 2)? {
        0x00 if value.len() == VERSION_00_LENGTH => KNOWN_FLAGS,
        // A later version may have more fields, each after a dash. Of its flags, only `sampled` is known.
        0x01..=0xfe if value.as_bytes().get(VERSION_00_LENGTH).is_none_or(|&next| next == b'-') => 0b1,
        _ => return None,
    };
    let trace_id = TraceId::from(lower_hex(value.get(3..35)?, 32)?);
    let span_id = SpanId::from(lower_hex(value.get(36..52)?, 16)? as u64);
    let flags = TraceFlags::new(lower_hex(value.get(53..VERSION_00_LENGTH)?, 2)? as u8 & known_flags);
    let is_valid = dashes == ["-"; 3] && trace_id != TraceId::INVALID && span_id != SpanId::INVALID;
    is_valid.then_some((trace_id, span_id, flags))
}

/// Parses the lines of `tracestate` (section 3.3.1). Several lines are one list, and one illegal member makes
/// the whole list illegal. If several members have the same key, the first of them is kept, because it was
/// added last.
fn parse_tracestate<'a>(lines: &[&'a str]) -> Option<Vec<(&'a str, &'a str)>> {
    const MAX_MEMBERS: usize = 32;

    let mut members: Vec<(&str, &str)> = Vec::new();
    let list = lines.iter().flat_map(|line| line.split(',')).map(trim_ows);
    for (index, member) in list.filter(|member| !member.is_empty()).enumerate() {
        let (key, value) = member.split_once('=')?;
        if !is_key(key) || !is_value(value) || index == MAX_MEMBERS {
            return None;
        }
        if members.iter().all(|(known, _)| *known != key) {
            members.push((key, value));
        }
    }
    Some(members)
}

/// Removes whole members until the list fits into [`MAX_TRACESTATE`]. Each step removes the last member of
/// more than 128 bytes, or the last member if no member is that long (section "tracestate Limits").
fn cut<'a>(mut members: Vec<(&'a str, &'a str)>) -> Vec<(&'a str, &'a str)> {
    let length = |(key, value): &(&str, &str)| key.len() + "=".len() + value.len();
    while members.iter().map(length).sum::<usize>() + members.len().saturating_sub(1) > MAX_TRACESTATE {
        let last_long = members.iter().rposition(|member| length(member) > 128);
        members.remove(last_long.unwrap_or(members.len() - 1));
    }
    members
}

/// Checks a key (section "Key" of level 2), in which `@` has no special meaning.
fn is_key(key: &str) -> bool {
    let is_first = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    key.len() <= 256
        && key.bytes().next().is_some_and(is_first)
        && key.bytes().all(|b| is_first(b) || b"_-*/@".contains(&b))
}

/// Checks that a value is printable ASCII without `,` and `=`. A space at its end has already been trimmed.
fn is_value(value: &str) -> bool {
    (1..=256).contains(&value.len())
        && value.bytes().all(|b| matches!(b, 0x20..=0x7e) && b != b',' && b != b'=')
}

/// Trims optional white space (RFC 9110, section 5.6.3), which is spaces and tabs and nothing else.
fn trim_ows(value: &str) -> &str {
    value.trim_matches([' ', '\t'])
}

#[cfg(test)]
mod tests;
