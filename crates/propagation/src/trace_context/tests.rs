use super::*;
use crate::{Propagator, composite, testing::Lines};
use proptest::prelude::*;

const TRACE_ID: &str = "12345678901234567890123456789012";
const VALID: &str = "00-12345678901234567890123456789012-1234567890123456-01";

fn extract(headers: &[(&str, &str)]) -> Context {
    TraceContextPropagator.extract_with_context(&Context::new(), &Lines(headers))
}

fn joins_the_trace(traceparent: &str) -> bool {
    extract(&[("traceparent", traceparent)]).span().span_context().is_valid()
}

/// Returns the headers that a service forwards after it received `headers`.
fn resent(headers: &[(&str, &str)]) -> Vec<(String, String)> {
    sent(&extract(headers))
}

/// Returns the headers that are sent in this context.
fn sent(cx: &Context) -> Vec<(String, String)> {
    struct Sent(Vec<(String, String)>);
    impl Injector for Sent {
        fn set(&mut self, key: &str, value: String) {
            self.0.push((key.to_owned(), value));
        }
    }
    let mut sent = Sent(Vec::new());
    TraceContextPropagator.inject_context(cx, &mut sent);
    sent.0
}

/// Returns the `tracestate` that is forwarded for these lines and a valid traceparent. The result is empty if
/// the lines are dropped.
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
        // version 00 allows nothing after its flags
        "00-12345678901234567890123456789012-1234567890123456-01.",
        "00-12345678901234567890123456789012-1234567890123456-01-what-the-future-will-be-like",
        // a later version may have more fields after its flags, but only after a dash
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
        // A parent that another propagator has read is kept.
        let other = SpanContext::new(1.into(), 2.into(), TraceFlags::SAMPLED, true, TraceState::NONE);
        let cx = Context::new().with_remote_span_context(other.clone());
        let cx = TraceContextPropagator.extract_with_context(&cx, &Lines(&[("traceparent", malformed)]));
        assert_eq!(cx.span().span_context(), &other, "{malformed:?}");
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
        "@foo=1",
        "_foo=1",
        "foo=\u{7f}",
        "foo=é",
        "ok=2,ok=",
    ] {
        assert_eq!(tracestate_of(&["ok=1", illegal]), "", "{illegal:?}");
    }
}

#[test]
fn of_members_with_the_same_key_the_first_is_kept() {
    assert_eq!(tracestate_of(&["foo=1,bar=2,foo=3", "foo=1", "bar=4,baz=5"]), "foo=1,bar=2,baz=5");
}

#[test]
fn a_key_that_the_api_refuses_is_sent_on_and_spans_show_the_others() {
    let header = format!("a=1,t@{}=2,b=3,x@y@z=4", "v".repeat(14));
    assert_eq!(tracestate_of(&[&header]), header);
    let cx = extract(&[("traceparent", VALID), ("tracestate", &header)]);
    assert_eq!(cx.span().span_context().trace_state().header(), "a=1,b=3");
    // The caller's list is not forwarded with another trace.
    let other = SpanContext::new(1.into(), 2.into(), TraceFlags::SAMPLED, false, TraceState::NONE);
    assert!(sent(&cx.with_remote_span_context(other)).iter().all(|(name, _)| name != "tracestate"));
}

/// Returns the `traceparent` that a span of this process sends. The SDK gives a sampled span
/// the caller's flags, and any other span no flags.
fn sent_by_a_span(cx: &Context, trace_id: TraceId, sampled: bool) -> String {
    let caller = cx.span().span_context().trace_flags();
    let flags = if sampled { caller.with_sampled(true) } else { TraceFlags::default() };
    let span = SpanContext::new(trace_id, SpanId::from(1), flags, false, TraceState::NONE);
    traceparent(&cx.with_remote_span_context(span)).unwrap()
}

#[test]
fn the_random_flag_is_that_of_the_caller_and_set_in_a_trace_of_our_own() {
    for (caller, sent) in [("00", "00"), ("01", "01"), ("02", "02"), ("03", "03")] {
        let cx = extract(&[("traceparent", &VALID.replace("-01", &format!("-{caller}")))]);
        let trace_id = cx.span().span_context().trace_id();
        let sampled = caller.ends_with(['1', '3']);
        assert!(sent_by_a_span(&cx, trace_id, sampled).ends_with(sent), "{caller}");
        assert!(sent_by_a_span(&cx, TraceId::from(7), false).ends_with("-02"), "another trace");
    }
    assert!(sent_by_a_span(&Context::new(), TraceId::from(7), true).ends_with("-03"));
    assert_eq!(traceparent(&Context::new()), None);
}

#[test]
fn a_trace_id_of_b3_or_jaeger_is_random_only_if_traceparent_says_so() {
    let trace_id = TraceId::from_hex(TRACE_ID).unwrap();
    let (b3, jaeger) = (format!("{TRACE_ID}-1234567890123456-1"), format!("{TRACE_ID}:1234567890123456:0:1"));
    let random = VALID.replace("-01", "-03");
    let orders = [
        [Propagator::TraceContext, Propagator::B3, Propagator::Jaeger],
        [Propagator::B3, Propagator::Jaeger, Propagator::TraceContext],
    ];
    for (headers, is_random) in [
        (&[("b3", b3.as_str())][..], false),
        (&[("uber-trace-id", &jaeger)], false),
        (&[("b3", &b3), ("traceparent", VALID)], false),
        (&[("b3", &b3), ("traceparent", &random)], true),
    ] {
        for order in orders {
            let cx = composite(&order).extract_with_context(&Context::new(), &Lines(headers));
            let sent = [true, false].map(|sampled| sent_by_a_span(&cx, trace_id, sampled).split_off(52));
            assert_eq!(
                sent,
                if is_random { ["-03", "-02"] } else { ["-01", "-00"] },
                "{order:?}: {headers:?}"
            );
        }
    }
    // The trace of B3 is another one than that of traceparent.
    let headers = [("b3", &*b3), ("traceparent", &random.replace("9012-", "9013-"))];
    let cx = composite(&orders[0]).extract_with_context(&Context::new(), &Lines(&headers));
    assert!(sent_by_a_span(&cx, trace_id, true).ends_with("-01"));
}

#[test]
fn all_legal_characters_of_tracestate_are_kept() {
    let value: String = (0x20..=0x7eu8).filter(|b| !b",=".contains(b)).map(char::from).collect();
    for key in ["abcdefghijklmnopqrstuvwxyz0123456789_-*/@", "0a-z0-9_-*/@a-z0-9_-*/", "a@@", "a@b@c"] {
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
    for (tenant, vendor) in [(241, 14), (254, 1), (1, 254)] {
        assert_eq!(tracestate_of(&[&vendor_key(tenant, vendor)]), vendor_key(tenant, vendor));
        assert_eq!(tracestate_of(&[&vendor_key(tenant + 1, vendor)]), "");
    }

    let value = |n| format!("k={}", "v".repeat(n));
    assert_eq!(tracestate_of(&[&value(256)]), value(256));
    assert_eq!(tracestate_of(&[&value(257)]), "");
}

#[test]
fn a_long_tracestate_is_cut_by_whole_members_long_ones_first() {
    let short =
        |n: usize| (0..n).map(|i| format!("k{i:02}={}", "v".repeat(28))).collect::<Vec<_>>().join(",");
    let long = |key| format!("{key}={}", "\"".repeat(127));
    // Fifteen members of 32 bytes have 494 bytes with their commas, and sixteen have 527.
    assert_eq!(tracestate_of(&[&short(32)]), short(15));
    assert_eq!(tracestate_of(&[&long("a"), &short(11), &long("b")]), format!("{},{}", long("a"), short(11)));
    assert_eq!(tracestate_of(&[&long("a"), &long("b"), &short(30)]), short(15));
    // A member of 128 bytes does not count as long.
    let of_128 = format!("a={}", "v".repeat(126));
    assert_eq!(tracestate_of(&[&of_128, &short(12)]), format!("{of_128},{}", short(11)));
    let exact = format!("{},k={}", short(15), "v".repeat(MAX_TRACESTATE - short(15).len() - 3));
    assert_eq!(tracestate_of(&[&exact]), exact);
    assert_eq!(tracestate_of(&[&format!("{exact}v")]), short(15));
    // Members whose key the API refuses are also cut.
    let vendors = format!("x@y@z=1,{},{}", "k".repeat(256) + "=1", "l".repeat(256) + "=1");
    assert_eq!(tracestate_of(&[&vendors]), format!("x@y@z=1,{}=1", "k".repeat(256)));
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
        let header = traceparent(&Context::new().with_remote_span_context(span_context.clone())).unwrap();
        let cx = extract(&[("traceparent", &header)]);
        let span = cx.span();
        prop_assert_eq!(span.span_context(), &span_context);
    }
}
