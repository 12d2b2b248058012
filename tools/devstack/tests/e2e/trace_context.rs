//! W3C Trace Context over real sockets. The cases are those of the W3C group's own test suite for level 2, as
//! of June 2026 (github.com/w3c/trace-context, folder `test`). The tests follow each case from the HTTP
//! request to the consumer span. For the cases that level 2 changed, the tests also check the headers that
//! the next process receives.
//!
//! The login tests show that several calls by one service share one trace and have different span ids. The
//! propagator's unit tests cover the limits and more kinds of malformed headers.

use anyhow::{Context, Result};
use axum::{Router, http::HeaderMap};
use harness::{
    PATIENCE, poll,
    stack::{KNOWN_MOBILE, Stack},
    trace::Span,
};
use lapin::{
    options::BasicGetOptions,
    types::{AMQPValue, FieldTable},
};
use serde_json::Value;
use std::{collections::HashMap, net::SocketAddr};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// The caller's trace and span in most cases.
const TRACE: &str = "12345678901234567890123456789012";
const PARENT: &str = "00-12345678901234567890123456789012-1234567890123456-01";

/// The effect that the headers of a case should have.
enum Expect {
    /// The service starts a new trace.
    NewTrace,
    /// The consumer span is in the caller's trace and has this tracestate. The tracestate is empty if the
    /// caller's must be discarded.
    SameTrace(String),
}
use Expect::{NewTrace, SameTrace};

/// Logs in with these header lines, sent unchanged. Returns the answer's `traceparent`.
async fn login(stack: &Stack, lines: &[String]) -> Result<String> {
    let answer = login_at(stack.api.address, lines).await?;
    let found = answer.lines().find_map(|line| line.strip_prefix("traceparent: "));
    Ok(found.with_context(|| answer.clone())?.to_owned())
}

/// Logs in at this address. Returns the whole answer.
async fn login_at(api: SocketAddr, lines: &[String]) -> Result<String> {
    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
    let mut request = format!(
        "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n",
        body.len()
    );
    for line in lines {
        request.push_str(line);
        request.push_str("\r\n");
    }
    let mut connection = TcpStream::connect(api).await?;
    connection.write_all(format!("{request}\r\n{body}").as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_case_of_the_w3c_suite_holds_from_the_request_to_the_consumer() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    for (case, lines, expected) in cases() {
        let traceparent = login(&stack, &lines).await.context(case)?;
        let ids: Vec<_> = traceparent.split('-').collect();
        let [version, trace_id, span_id, flags] = ids[..] else { panic!("{case}: {traceparent}") };
        assert_eq!((version, trace_id.len(), span_id.len()), ("00", 32, 16), "{case}");
        // Most cases have the same trace id, so the test finds each span by its parent's id. It begins with
        // the span id in the answer's `traceparent`.
        let child = |kind: &'static str, parent: String| {
            let is_it = move |span: &Span| span.kind == kind && span.parent_span_id == parent;
            stack.receiver.expect_span(is_it)
        };
        let producer = child("PRODUCER", span_id.to_owned()).await;
        let consumer = child("CONSUMER", producer.span_id).await;
        assert_eq!(consumer.trace_id, trace_id, "{case}");
        // If the trace is new, none of its ids may come from the caller's headers.
        match expected {
            NewTrace => {
                let sent = lines.concat();
                assert!(!sent.contains(trace_id) && !sent.contains(span_id), "{case}: {lines:?}");
                assert_eq!((consumer.trace_state.as_str(), flags), ("", "03"), "{case}: {lines:?}");
            }
            SameTrace(tracestate) => {
                assert_eq!((trace_id, span_id == "1234567890123456"), (TRACE, false), "{case}: {lines:?}");
                assert_eq!(consumer.trace_state, tracestate, "{case}: {lines:?}");
                assert_eq!(flags, if case == "propagates_random_flag" { "03" } else { "01" }, "{case}");
            }
        }
    }
    Ok(())
}

/// Returns the trace headers of the next message, by name. Capitalized names, such as `Traceparent`, come
/// from the message's body. mq must be stopped.
async fn next_message(stack: &Stack) -> Result<HashMap<String, String>> {
    let queue = stack.broker.topology.queue.as_str();
    let get = async || {
        let options = BasicGetOptions { no_ack: true };
        stack.broker.channel.basic_get(queue.into(), options).await.ok().flatten()
    };
    let message = poll(PATIENCE, get).await.context("no message")?;
    let mut found = HashMap::new();
    for (name, value) in message.properties.headers().iter().flat_map(FieldTable::inner) {
        if let AMQPValue::LongString(value) = value {
            found.insert(name.to_string(), value.to_string());
        }
    }
    let body: Value = serde_json::from_slice(&message.data)?;
    for (name, values) in body["Carrier"].as_object().context("carrier")? {
        found.insert(name.clone(), values[0].as_str().unwrap_or_default().to_owned());
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_vector_of_level_2_arrives_at_the_next_process() -> Result<()> {
    let vectors: Value = serde_json::from_str(include_str!("vectors/tracestate.json"))?;
    let cases = vectors["cases"].as_array().context("cases")?;
    assert_eq!(cases.len(), 14);
    let mut stack = Stack::start(&[]).await?;
    stack.mq.stop().await?;
    for case in cases {
        let name = case["name"].as_str().context("name")?;
        let received = case["traceparent"].as_str().context("traceparent")?;
        let mut lines = vec![traceparent(received)];
        for line in case["tracestate"].as_array().context("tracestate")? {
            lines.push(format!("tracestate: {}", line.as_str().context("line")?));
        }
        login(&stack, &lines).await.context(name.to_owned())?;
        let sent = next_message(&stack).await?;
        for (in_headers, in_body) in [("traceparent", "Traceparent"), ("tracestate", "Tracestate")] {
            assert_eq!(sent.get(in_headers), sent.get(in_body), "{name}");
        }
        assert_eq!(sent["traceparent"][..36], received[..36], "{name}");
        assert_eq!(sent["traceparent"][53..], received[53..], "{name}");
        let list = sent.get("tracestate").map(String::as_str).unwrap_or_default();
        let members: HashMap<_, _> = list.split(',').filter_map(|member| member.split_once('=')).collect();
        let expected = case["members"].as_object().context("members")?;
        assert_eq!(members.len(), expected.len(), "{name}: {list}");
        for (key, values) in expected {
            let is_one_of =
                |value: &&str| values.as_array().is_some_and(|values| values.contains(&(*value).into()));
            assert!(members.get(key.as_str()).is_some_and(is_one_of), "{name}: {key} in {list}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_random_flag_goes_as_far_as_the_trace_and_is_set_in_new_ones() -> Result<()> {
    // This server stands in for usercenter and keeps the metadata of each call.
    let (calls, mut called) = mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let usercenter = format!("http://{}", listener.local_addr()?);
    let routes = Router::new().fallback(async move |headers: HeaderMap| {
        let _ = calls.send(headers);
    });
    tokio::spawn(axum::serve(listener, routes).into_future());

    let (on, disabled) = (("OTEL_SDK_DISABLED", "false"), ("OTEL_SDK_DISABLED", "true"));
    let (drop, drop_new) =
        (("OTEL_TRACES_SAMPLER", "always_off"), ("OTEL_TRACES_SAMPLER", "parentbased_always_off"));
    for ((variable, value), outcomes) in [
        (on, [("", "03"), ("-00", "00"), ("-01", "01"), ("-02", "02"), ("-03", "03"), ("-ff", "03")]),
        (drop, [("", "02"), ("-00", "00"), ("-01", "00"), ("-02", "02"), ("-03", "02"), ("-ff", "02")]),
        (drop_new, [("", "02"), ("-00", "00"), ("-01", "01"), ("-02", "02"), ("-03", "03"), ("-ff", "03")]),
        (disabled, [("", ""), ("-00", "00"), ("-01", "01"), ("-02", "02"), ("-03", "03"), ("-ff", "03")]),
    ] {
        let variables = [("*", variable, value)];
        let mut stack = Stack::start(&variables).await?;
        stack.mq.stop().await?;
        let variables = [(variable, value), ("USERCENTER_URL", &usercenter), ("USERCENTER_ATTEMPTS", "1")];
        let mut with_stand_in = stack.another("api", &variables).await?;
        for (received, expected) in outcomes {
            let lines = match received {
                "" => Vec::new(),
                flags => vec![traceparent(&PARENT.replace("-01", flags))],
            };
            let case = format!("{variable}={value} {received}");
            let flags = |traceparent: Option<&str>| {
                traceparent.unwrap_or_default().chars().skip(53).collect::<String>()
            };

            let answer = if (expected, received) == ("", "") {
                stack.login(KNOWN_MOBILE, &[]).await?.header("traceparent").to_owned()
            } else {
                login(&stack, &lines).await?
            };
            assert_eq!(flags(Some(&answer)), expected, "{case}, answer");
            let sent = next_message(&stack).await?;
            assert_eq!(flags(sent.get("traceparent").map(String::as_str)), expected, "{case}, message");
            assert_eq!(sent.get("traceparent"), sent.get("Traceparent"), "{case}");

            let _ = login_at(with_stand_in.address, &lines).await?;
            let metadata = called.recv().await.context("no call")?;
            let sent = metadata.get("traceparent").and_then(|value| value.to_str().ok());
            assert_eq!(flags(sent), expected, "{case}, call");
        }
        with_stand_in.stop().await?;
    }
    Ok(())
}

/// Returns the cases. Each case has its name in the suite, its header lines and the expected effect.
fn cases() -> Vec<(&'static str, Vec<String>, Expect)> {
    let mut cases = Vec::new();
    let mut add = |case, lines: &[&str], expected| {
        cases.push((case, lines.iter().map(|line| (*line).to_owned()).collect(), expected));
    };
    let same = |tracestate: &str| SameTrace(tracestate.to_owned());

    add("both_traceparent_and_tracestate_missing", &[], NewTrace);
    add("traceparent_included_tracestate_missing", &[&traceparent(PARENT)], same(""));
    let other = PARENT.replace("9012-", "9011-");
    add("traceparent_duplicated", &[&traceparent(&other), &traceparent(PARENT)], NewTrace);
    for name in ["trace-parent", "trace.parent"] {
        add("traceparent_header_name", &[&format!("{name}: {PARENT}")], NewTrace);
    }
    for name in ["TraceParent", "TrAcEpArEnT", "TRACEPARENT"] {
        add("traceparent_header_name_valid_casing", &[&format!("{name}: {PARENT}")], same(""));
    }
    let tail = PARENT.trim_start_matches("00");
    for (case, malformed) in [
        ("traceparent_version_0x00", format!("{PARENT}.")),
        ("traceparent_version_0x00", format!("{PARENT}-what-the-future-will-be-like")),
        ("traceparent_version_0xcc", format!("cc{tail}.what-the-future-will-be-like")),
        ("traceparent_version_0xff", format!("ff{tail}")),
        ("traceparent_version_illegal_characters", format!(".0{tail}")),
        ("traceparent_version_illegal_characters", format!("0.{tail}")),
        ("traceparent_version_too_long", format!("000{tail}")),
        ("traceparent_version_too_long", format!("0000{tail}")),
        ("traceparent_version_too_short", format!("0{tail}")),
        ("traceparent_trace_id_all_zero", PARENT.replace(TRACE, &"0".repeat(32))),
        ("traceparent_trace_id_illegal_characters", PARENT.replace("-12345678901", "-.2345678901")),
        ("traceparent_trace_id_illegal_characters", PARENT.replace("9012-", "901.-")),
        ("traceparent_trace_id_too_long", PARENT.replace("9012-", "90123-")),
        ("traceparent_trace_id_too_short", PARENT.replace("9012-", "901-")),
        ("traceparent_parent_id_all_zero", PARENT.replace("1234567890123456-", "0000000000000000-")),
        (
            "traceparent_parent_id_illegal_characters",
            PARENT.replace("-1234567890123456", "-.234567890123456"),
        ),
        ("traceparent_parent_id_illegal_characters", PARENT.replace("3456-", "345.-")),
        ("traceparent_parent_id_too_long", PARENT.replace("3456-", "34567-")),
        ("traceparent_parent_id_too_short", PARENT.replace("3456-", "345-")),
        ("traceparent_trace_flags_illegal_characters", PARENT.replace("-01", "-.0")),
        ("traceparent_trace_flags_illegal_characters", PARENT.replace("-01", "-0.")),
        ("traceparent_trace_flags_too_long", PARENT.replace("-01", "-001")),
        ("traceparent_trace_flags_too_short", PARENT.replace("-01", "-1")),
    ] {
        assert_ne!(malformed, PARENT, "{case}");
        add(case, &[&traceparent(&malformed)], NewTrace);
    }
    for later in [format!("cc{tail}"), format!("cc{tail}-what-the-future-will-be-like")] {
        add("traceparent_version_0xcc", &[&traceparent(&later)], same(""));
    }
    for (before, after) in [(" ", ""), ("\t", ""), ("", " "), ("", "\t"), ("\t ", " \t")] {
        add("traceparent_ows_handling", &[&format!("traceparent:{before}{PARENT}{after}")], same(""));
    }

    add("propagates_random_flag", &[&traceparent(&PARENT.replace("-01", "-03"))], same(""));

    add("tracestate_included_traceparent_missing", &["tracestate: foo=1"], NewTrace);
    add("tracestate_included_traceparent_missing", &["tracestate: foo=1,bar=2"], NewTrace);

    // From here on, traceparent is valid and only tracestate varies.
    let many = |members: usize| (1..=members).map(|i| format!("bar{i:02}={i:02}")).collect::<Vec<_>>();
    let legal: String = (0x20..=0x7e).map(char::from).filter(|c| !",=".contains(*c)).collect();
    let key = "abcdefghijklmnopqrstuvwxyz0123456789_-*/";
    let (plain, with_vendor) = (format!("{key}={legal}"), format!("{key}@a-z0-9_-*/={legal}"));
    let long = |key: usize, vendor: usize| match vendor {
        0 => format!("{}=1", "z".repeat(key)),
        _ => format!("{}@{}=1", "t".repeat(key), "v".repeat(vendor)),
    };
    for (case, tracestates, expected) in [
        ("tracestate_included_traceparent_included", vec!["foo=1,bar=2"], "foo=1,bar=2"),
        ("tracestate_empty_header", vec![""], ""),
        ("tracestate_empty_header", vec!["foo=1", ""], "foo=1"),
        ("tracestate_empty_header", vec!["", "foo=1"], "foo=1"),
        (
            "tracestate_multiple_headers_different_keys",
            vec!["foo=1,bar=2", "rojo=1,congo=2", "baz=3"],
            "foo=1,bar=2,rojo=1,congo=2,baz=3",
        ),
        ("tracestate_duplicated_keys", vec!["foo=1,foo=1"], "foo=1"),
        ("tracestate_duplicated_keys", vec!["foo=1,foo=2"], "foo=1"),
        ("tracestate_duplicated_keys", vec!["foo=1", "foo=1"], "foo=1"),
        ("tracestate_duplicated_keys", vec!["foo=1", "foo=2"], "foo=1"),
        ("tracestate_all_allowed_characters", vec![&plain], &plain),
        ("tracestate_all_allowed_characters", vec![&with_vendor], &with_vendor),
        ("tracestate_ows_handling", vec!["foo=1 \t , \t bar=2, \t baz=3"], "foo=1,bar=2,baz=3"),
        ("tracestate_ows_handling", vec!["foo=1\t \t,\t \tbar=2,\t \tbaz=3"], "foo=1,bar=2,baz=3"),
        ("tracestate_ows_handling", vec![" foo=1"], "foo=1"),
        ("tracestate_ows_handling", vec!["\tfoo=1"], "foo=1"),
        ("tracestate_ows_handling", vec!["foo=1 "], "foo=1"),
        ("tracestate_ows_handling", vec!["foo=1\t"], "foo=1"),
        ("tracestate_ows_handling", vec!["\t foo=1 \t"], "foo=1"),
        ("tracestate_key_illegal_characters", vec!["foo =1"], ""),
        ("tracestate_key_illegal_characters", vec!["FOO=1"], ""),
        ("tracestate_key_illegal_characters", vec!["foo.bar=1"], ""),
        // mq also receives keys with two @, but the SDK does not show them on a span.
        ("tracestate_key_illegal_vendor_format", vec!["foo@=1,bar=2"], "foo@=1,bar=2"),
        ("tracestate_key_illegal_vendor_format", vec!["@foo=1,bar=2"], ""),
        ("tracestate_key_illegal_vendor_format", vec!["foo@@bar=1,bar=2"], "bar=2"),
        ("tracestate_key_illegal_vendor_format", vec!["foo@bar@baz=1,bar=2"], "bar=2"),
        ("tracestate_member_count_limit", vec![&many(32).join(",")], &many(32).join(",")),
        ("tracestate_member_count_limit", vec![&many(20).join(","), "a=1"], &(many(20).join(",") + ",a=1")),
        ("tracestate_member_count_limit", vec![&many(32).join(","), "bar33=33"], ""),
        ("tracestate_key_length_limit", vec![&long(256, 0)], &long(256, 0)),
        ("tracestate_key_length_limit", vec![&long(257, 0)], ""),
        ("tracestate_key_length_limit", vec![&long(242, 1)], &long(242, 1)),
        // mq also receives keys with more than 13 characters after the @, but the SDK does not show them on a
        // span.
        ("tracestate_key_length_limit", vec!["foo=1", &long(241, 14), "bar=2"], "foo=1,bar=2"),
        ("tracestate_key_length_limit", vec!["foo=1", &long(1, 15), "bar=2"], "foo=1,bar=2"),
        ("tracestate_value_illegal_characters", vec!["foo=bar=baz"], ""),
        ("tracestate_value_illegal_characters", vec!["foo=,bar=3"], ""),
    ] {
        let mut lines = vec![traceparent(PARENT)];
        lines.extend(tracestates.iter().map(|tracestate| format!("tracestate:{tracestate}")));
        let lines: Vec<_> = lines.iter().map(String::as_str).collect();
        add(case, &lines, same(expected));
    }
    for name in ["trace-state", "trace.state"] {
        let line = format!("{name}: foo=1");
        add("tracestate_header_name", &[&traceparent(PARENT), &line], same(""));
    }
    for name in ["TraceState", "TrAcEsTaTe", "TRACESTATE"] {
        let line = format!("{name}: foo=1");
        add("tracestate_header_name_valid_casing", &[&traceparent(PARENT), &line], same("foo=1"));
    }
    cases
}

fn traceparent(value: &str) -> String {
    format!("traceparent: {value}")
}
