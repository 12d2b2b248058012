//! W3C Trace Context, level 2, read strictly: <https://www.w3.org/TR/trace-context-2/>.
//!
//! The propagator of the Rust SDK accepts headers that the Recommendation says must be refused. This
//! one passes all of the W3C group's own conformance cases (docs/decisions/0003-propagators.md).

use super::lower_hex;
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

/// Flags with a meaning in level 2: sampled, and "the trace id is random". Others are sent as zero.
const KNOWN_FLAGS: u8 = 0b11;

/// Reads and writes `traceparent` and `tracestate`.
#[derive(Debug, Clone, Copy)]
pub struct TraceContextPropagator;

impl TextMapPropagator for TraceContextPropagator {
    fn inject_context(&self, cx: &Context, injector: &mut dyn Injector) {
        let span = cx.span();
        let span_context = span.span_context();
        if !span_context.is_valid() {
            return;
        }
        injector.set(TRACEPARENT, traceparent(span_context));

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
        // Two `traceparent` headers contradict each other: neither is believed.
        let traceparents = extractor.get_all(TRACEPARENT).unwrap_or_default();
        let [traceparent] = traceparents[..] else {
            return cx.clone();
        };
        let Some((trace_id, span_id, flags)) = parse_traceparent(traceparent) else {
            return cx.clone();
        };
        // A tracestate that can't be parsed is dropped; it must not harm the traceparent.
        let lines = extractor.get_all(TRACESTATE).unwrap_or_default();
        let members = parse_tracestate(&lines).unwrap_or_default();
        let trace_state = TraceState::from_key_value(members.iter().copied());
        let remote =
            |state| cx.with_remote_span_context(SpanContext::new(trace_id, span_id, flags, true, state));
        match trace_state {
            Ok(trace_state) => remote(trace_state),
            Err(_) => {
                let header = members.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
                remote(TraceState::NONE).with_value(LongVendorTraceState { trace_id, header })
            }
        }
    }

    fn fields(&self) -> FieldIter<'_> {
        static FIELDS: LazyLock<[String; 2]> = LazyLock::new(|| [TRACEPARENT.into(), TRACESTATE.into()]);
        FieldIter::new(FIELDS.as_slice())
    }
}

/// A valid `tracestate` that the API's [`TraceState`] refuses: it allows 13 characters after the `@`
/// of a key where the grammar allows 14. It is carried through the service unread.
#[derive(Debug)]
struct LongVendorTraceState {
    trace_id: TraceId,
    header: String,
}

/// The `traceparent` of a span: version 00.
pub fn traceparent(span: &SpanContext) -> String {
    fn push_hex(out: &mut String, bytes: &[u8]) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        for byte in bytes {
            out.push(DIGITS[usize::from(byte >> 4)] as char);
            out.push(DIGITS[usize::from(byte & 0xf)] as char);
        }
    }
    let mut header = String::with_capacity(VERSION_00_LENGTH);
    header.push_str("00-");
    push_hex(&mut header, &span.trace_id().to_bytes());
    header.push('-');
    push_hex(&mut header, &span.span_id().to_bytes());
    header.push('-');
    push_hex(&mut header, &[span.trace_flags().to_u8() & KNOWN_FLAGS]);
    header
}

/// Section 3.2.2, and 3.2.4 for versions above 00.
fn parse_traceparent(value: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let value = trim_ows(value).as_bytes();
    if value.len() < VERSION_00_LENGTH || [value[2], value[35], value[52]] != *b"---" {
        return None;
    }
    let [version] = lower_hex(&value[..2])?;
    let known_flags = match version {
        0x00 if value.len() == VERSION_00_LENGTH => KNOWN_FLAGS,
        // A later version may have more fields, each after a dash; of its flags only the first is known.
        0x01..=0xfe if value.get(VERSION_00_LENGTH).is_none_or(|&next| next == b'-') => 0b1,
        _ => return None,
    };
    let trace_id = TraceId::from_bytes(lower_hex(&value[3..35])?);
    let span_id = SpanId::from_bytes(lower_hex(&value[36..52])?);
    let [flags] = lower_hex(&value[53..55])?;
    if trace_id == TraceId::INVALID || span_id == SpanId::INVALID {
        return None;
    }
    Some((trace_id, span_id, TraceFlags::new(flags & known_flags)))
}

/// Section 3.3.1: several header lines are one list; one illegal member spoils it all.
fn parse_tracestate<'a>(lines: &[&'a str]) -> Option<Vec<(&'a str, &'a str)>> {
    const MAX_MEMBERS: usize = 32;

    let mut members: Vec<(&str, &str)> = Vec::new();
    let list = lines.iter().flat_map(|line| line.split(',')).map(trim_ows);
    for member in list.filter(|member| !member.is_empty()) {
        let (key, value) = member.split_once('=')?;
        let duplicate = members.iter().any(|(known, _)| *known == key);
        if duplicate || !is_key(key) || !is_value(value) || members.len() == MAX_MEMBERS {
            return None;
        }
        members.push((key, value));
    }
    Some(members)
}

/// `tenant@vendor` or a simple key. Level 1 limits both parts of the former, and so do the
/// conformance cases; what level 2 allows beyond that, nobody sends.
fn is_key(key: &str) -> bool {
    fn is_part(part: &str, max_length: usize) -> bool {
        let first_is_legal = part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let is_legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-*/".contains(&b);
        first_is_legal && part.len() <= max_length && part.bytes().all(is_legal)
    }
    match key.split_once('@') {
        Some((tenant, vendor)) => is_part(tenant, 241) && is_part(vendor, 14),
        None => is_part(key, 256),
    }
}

/// Printable ASCII without `,` and `=`; the end has no space, as it was trimmed.
fn is_value(value: &str) -> bool {
    (1..=256).contains(&value.len())
        && value.bytes().all(|b| matches!(b, 0x20..=0x7e) && b != b',' && b != b'=')
}

/// Optional white space of RFC 9110 section 5.6.3: spaces and tabs, nothing else.
fn trim_ows(value: &str) -> &str {
    value.trim_matches([' ', '\t'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::propagation::testing::Lines;
    use proptest::prelude::*;

    const TRACE_ID: &str = "12345678901234567890123456789012";
    const VALID: &str = "00-12345678901234567890123456789012-1234567890123456-01";

    fn extract(headers: &[(&str, &str)]) -> Context {
        TraceContextPropagator.extract_with_context(&Context::new(), &Lines(headers))
    }

    fn joins_the_trace(traceparent: &str) -> bool {
        extract(&[("traceparent", traceparent)]).span().span_context().is_valid()
    }

    /// What a service that received these headers sends on.
    fn resent(headers: &[(&str, &str)]) -> Vec<(String, String)> {
        struct Sent(Vec<(String, String)>);
        impl Injector for Sent {
            fn set(&mut self, key: &str, value: String) {
                self.0.push((key.to_owned(), value));
            }
        }
        let mut sent = Sent(Vec::new());
        TraceContextPropagator.inject_context(&extract(headers), &mut sent);
        sent.0
    }

    /// What becomes of `tracestate` lines beside a valid traceparent; empty if dropped.
    fn tracestate_of(lines: &[&str]) -> String {
        let mut headers = vec![("traceparent", VALID)];
        headers.extend(lines.iter().map(|line| ("tracestate", *line)));
        let sent = resent(&headers);
        assert_eq!(sent[0].1, VALID, "tracestate must never harm traceparent");
        sent.get(1).map(|(_, value)| value.clone()).unwrap_or_default()
    }

    #[test]
    fn valid_traceparent_is_continued() {
        let cx = extract(&[("traceparent", VALID)]);
        let span = cx.span();
        assert_eq!(span.span_context().trace_id().to_string(), TRACE_ID);
        assert_eq!(span.span_context().span_id().to_string(), "1234567890123456");
        assert!(span.span_context().is_sampled() && span.span_context().is_remote());
    }

    #[test]
    fn surrounding_white_space_is_ignored() {
        for padded in [format!(" {VALID}"), format!("\t{VALID}"), format!("{VALID} \t")] {
            assert!(joins_the_trace(&padded), "{padded:?}");
        }
        assert!(!joins_the_trace(&format!("{VALID}\n")));
        assert!(!joins_the_trace(&format!("\u{a0}{VALID}")));
    }

    #[test]
    fn two_traceparents_are_both_refused() {
        let other = VALID.replace("12-", "13-");
        let cx = extract(&[("traceparent", VALID), ("traceparent", &other)]);
        assert!(!cx.span().span_context().is_valid());
    }

    #[test]
    fn similar_header_names_are_not_traceparent() {
        for name in ["trace-parent", "trace.parent", "traceparents"] {
            assert!(!extract(&[(name, VALID)]).span().span_context().is_valid(), "{name}");
        }
    }

    #[test]
    fn malformed_traceparents_are_refused() {
        for malformed in [
            "",
            "00",
            // version
            "ff-12345678901234567890123456789012-1234567890123456-01",
            ".0-12345678901234567890123456789012-1234567890123456-01",
            "0.-12345678901234567890123456789012-1234567890123456-01",
            "000-12345678901234567890123456789012-1234567890123456-01",
            "0000-12345678901234567890123456789012-1234567890123456-01",
            "0-12345678901234567890123456789012-1234567890123456-01",
            "0A-12345678901234567890123456789012-1234567890123456-01",
            // version 00 has nothing behind its flags
            "00-12345678901234567890123456789012-1234567890123456-01.",
            "00-12345678901234567890123456789012-1234567890123456-01-what-the-future-will-be-like",
            // a later version may, after a dash
            "cc-12345678901234567890123456789012-1234567890123456-01.what-the-future-will-be-like",
            "cc-12345678901234567890123456789012-1234567890123456-0",
            // trace id
            "00-00000000000000000000000000000000-1234567890123456-01",
            "00-.2345678901234567890123456789012-1234567890123456-01",
            "00-1234567890123456789012345678901.-1234567890123456-01",
            "00-123456789012345678901234567890123-1234567890123456-01",
            "00-1234567890123456789012345678901-1234567890123456-01",
            "00-ABCDEF78901234567890123456789012-1234567890123456-01",
            // parent id
            "00-12345678901234567890123456789012-0000000000000000-01",
            "00-12345678901234567890123456789012-.234567890123456-01",
            "00-12345678901234567890123456789012-123456789012345.-01",
            "00-12345678901234567890123456789012-12345678901234567-01",
            "00-12345678901234567890123456789012-123456789012345-01",
            "00-12345678901234567890123456789012-123456789012345F-01",
            // flags
            "00-12345678901234567890123456789012-1234567890123456-.0",
            "00-12345678901234567890123456789012-1234567890123456-0.",
            "00-12345678901234567890123456789012-1234567890123456-001",
            "00-12345678901234567890123456789012-1234567890123456-1",
            "00-12345678901234567890123456789012-1234567890123456-0B",
            // delimiters, and characters of more than one byte
            "00_12345678901234567890123456789012_1234567890123456_01",
            "00-1234567890123456789012345678901é-123456789012345-01",
            "é0-12345678901234567890123456789012-1234567890123456-01",
        ] {
            assert!(!joins_the_trace(malformed), "{malformed:?}");
        }
    }

    #[test]
    fn later_versions_are_read_and_answered_as_version_00() {
        for later in [
            "cc-12345678901234567890123456789012-1234567890123456-01",
            "01-12345678901234567890123456789012-1234567890123456-01-what-the-future-will-be-like",
            "fe-12345678901234567890123456789012-1234567890123456-ff-",
        ] {
            assert_eq!(resent(&[("traceparent", later)])[0].1, VALID, "{later}");
        }
    }

    #[test]
    fn only_known_flags_are_sent_on() {
        let with_flags = |flags| format!("00-12345678901234567890123456789012-1234567890123456-{flags}");
        for (received, sent) in [("00", "00"), ("02", "02"), ("03", "03"), ("ff", "03"), ("08", "00")] {
            assert_eq!(resent(&[("traceparent", &with_flags(received))])[0].1, with_flags(sent));
        }
    }

    #[test]
    fn tracestate_without_traceparent_is_dropped() {
        assert!(resent(&[("tracestate", "foo=1")]).is_empty());
        assert!(resent(&[("traceparent", "garbage"), ("tracestate", "foo=1")]).is_empty());
    }

    #[test]
    fn tracestate_lines_are_one_list_in_order() {
        let lines = ["foo=1,bar=2", "", "rojo=1 \t,\t congo=2,,", " baz=3\t"];
        assert_eq!(tracestate_of(&lines), "foo=1,bar=2,rojo=1,congo=2,baz=3");
    }

    #[test]
    fn empty_tracestate_is_not_sent_on() {
        for lines in [&[][..], &[""], &[" ", ",,"]] {
            assert_eq!(tracestate_of(lines), "");
        }
    }

    #[test]
    fn tracestate_with_an_illegal_member_is_dropped_whole() {
        for illegal in [
            "foo",
            "=1",
            "foo=",
            "foo=bar=baz",
            "foo =1",
            "FOO=1",
            "foo.bar=1",
            "foo@=1",
            "@foo=1",
            "foo@@bar=1",
            "foo@bar@baz=1",
            "_foo=1",
            "foo=\u{7f}",
            "foo=é",
            "ok=1,ok=2",
            "ok=1,ok=1",
        ] {
            assert_eq!(tracestate_of(&["ok=1", illegal]), "", "{illegal:?}");
        }
    }

    #[test]
    fn all_legal_characters_of_tracestate_are_kept() {
        let value: String = (0x20..=0x7eu8).filter(|b| !b",=".contains(b)).map(char::from).collect();
        for key in ["abcdefghijklmnopqrstuvwxyz0123456789_-*/", "0a-z0-9_-*/@a-z0-9_-*/"] {
            let member = format!("{key}={value}");
            assert_eq!(tracestate_of(&[&member]), member);
        }
    }

    #[test]
    fn limits_of_tracestate_are_kept_to_the_character() {
        let members = |n: usize| (1..=n).map(|i| format!("k{i}={i}")).collect::<Vec<_>>().join(",");
        assert_eq!(tracestate_of(&[&members(32)]), members(32));
        assert_eq!(tracestate_of(&[&members(33)]), "");

        let key = |n| format!("{}=1", "z".repeat(n));
        assert_eq!(tracestate_of(&[&key(256)]), key(256));
        assert_eq!(tracestate_of(&[&key(257)]), "");

        let vendor_key = |tenant, vendor| format!("{}@{}=1", "t".repeat(tenant), "v".repeat(vendor));
        assert_eq!(tracestate_of(&[&vendor_key(241, 14)]), vendor_key(241, 14));
        assert_eq!(tracestate_of(&[&vendor_key(242, 1)]), "");
        assert_eq!(tracestate_of(&[&vendor_key(1, 15)]), "");

        let value = |n| format!("k={}", "v".repeat(n));
        assert_eq!(tracestate_of(&[&value(256)]), value(256));
        assert_eq!(tracestate_of(&[&value(257)]), "");
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic_and_are_never_sent_on_as_they_came(
            traceparent in "(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}|.{0,60})",
            tracestate in proptest::collection::vec(".{0,80}", 0..4),
        ) {
            let mut headers = vec![("traceparent", traceparent.as_str())];
            headers.extend(tracestate.iter().map(|line| ("tracestate", line.as_str())));
            for (_, value) in resent(&headers) {
                prop_assert!(value.bytes().all(|b| matches!(b, 0x20..=0x7e)), "{value:?}");
            }
        }

        #[test]
        fn every_valid_span_context_survives_the_wire(trace_id in 1u128.., span_id in 1u64.., flags in 0u8..4) {
            let span_context = SpanContext::new(
                TraceId::from(trace_id), SpanId::from(span_id), TraceFlags::new(flags), true, TraceState::NONE,
            );
            let header = traceparent(&span_context);
            let cx = extract(&[("traceparent", &header)]);
            let span = cx.span();
            prop_assert_eq!(span.span_context(), &span_context);
        }
    }
}
