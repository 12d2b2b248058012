//! A hostile or broken peer gets an answer or a closed connection, and no other peer is harmed.

use anyhow::Result;
use bytes::Bytes;
use harness::{
    PATIENCE,
    client::{answers, raw},
    stack::{KNOWN_MOBILE, Stack},
};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::time::timeout;

async fn assert_unharmed(stack: &Stack, after: &str) -> Result<()> {
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200, "after {after}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_http_is_refused_and_harms_nobody() -> Result<()> {
    // Two of the cases end only at this deadline, because their bodies never arrive completely.
    let stack = Stack::start(&[("api", "API_DEADLINE", "5s")]).await?;
    let login = "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let body = r#"{"mobile":"13800138000"}"#;
    let many_headers: String = (0..1000).map(|i| format!("x-{i}: 1\r\n")).collect();
    let long_header = format!("x-long: {}\r\n", "x".repeat(1_000_000));
    for (name, request, statuses) in [
        ("garbage", "\0\u{1}\u{2}garbage\r\n\r\n".to_owned(), &["400"][..]),
        ("no version", "GET /healthz\r\n\r\n".to_owned(), &["400"]),
        ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), &["", "400", "505"]),
        ("TLS", "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0".to_owned(), &["400"]),
        ("a null in a header", format!("{login}x: a\0b\r\n\r\n"), &["400"]),
        ("a header without a name", format!("{login}: x\r\n\r\n"), &["400"]),
        ("a bare line feed in a header", format!("{login}x: a\nb\r\n\r\n"), &["400"]),
        ("two lengths", format!("{login}content-length: 24\r\ncontent-length: 5\r\n\r\n{body}"), &["400"]),
        ("a negative length", format!("{login}content-length: -1\r\n\r\n{body}"), &["400"]),
        ("an endless length", format!("{login}content-length: 99999999999999999999\r\n\r\n{body}"), &["400"]),
        (
            "length and chunks (smuggling)",
            format!(
                "{login}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n"
            ),
            &["400"],
        ),
        ("an unknown encoding", format!("{login}transfer-encoding: xchunked\r\n\r\n{body}"), &["400"]),
        (
            "broken chunks",
            format!("{login}transfer-encoding: chunked\r\n\r\nzz\r\n{body}\r\n0\r\n\r\n"),
            &["400"],
        ),
        (
            "a chunk of gigabytes",
            format!("{login}transfer-encoding: chunked\r\n\r\nffffffffffff\r\n{body}"),
            &["408"],
        ),
        ("many headers", format!("{login}{many_headers}\r\n"), &["431"]),
        ("a long header", format!("{login}{long_header}\r\n"), &["431"]),
        (
            "a long path",
            format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(100_000)),
            &["404", "414", "431"],
        ),
        ("less body than promised", format!("{login}content-length: 100\r\n\r\n{body}"), &["408"]),
        (
            "nested arrays",
            {
                let nested = "[".repeat(100_000);
                format!("{login}content-length: {}\r\n\r\n{nested}", nested.len())
            },
            &["422"],
        ),
    ] {
        let answer = raw(stack.api.address, request.as_bytes(), answers(1)).await?;
        let status = answer.split(' ').nth(1).unwrap_or_default();
        assert!(statuses.contains(&status), "{name}: {answer}");
        // There is at most one answer, so no request was smuggled in.
        assert!(answer.matches("HTTP/1.1 ").count() <= 1, "{name}: {answer}");
        assert_unharmed(&stack, name).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_legal_context_is_cut_at_a_member_and_opens_no_circuit() -> Result<()> {
    let stack = Stack::start(&[("*", "BAGGAGE_SPAN_ATTRIBUTES", "first,last")]).await?;
    // `tracestate` has 8.3 kB, and `baggage` has 7.7 kB.
    let member = format!("k00={}", "\"".repeat(256));
    let tracestate =
        (0..32).map(|i| member.replace("k00", &format!("k{i:02}"))).collect::<Vec<_>>().join(",");
    let baggage = format!("first=1,k={},last=1", "v".repeat(7700));
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = [("traceparent", parent), ("tracestate", &tracestate), ("baggage", &baggage)];
    // If half of the calls failed, the circuit would open after 20 calls.
    for _ in 0..40 {
        let refused = stack.login("13900139000", &headers).await?;
        assert_eq!(refused.status, 401, "{:?}", refused.json());
    }
    assert_unharmed(&stack, "a large context").await?;
    assert!(!stack.api.output().contains("circuit opened"), "{}", stack.api.output());

    // The consumer has the whole baggage, whose size is allowed, but only the first member of tracestate.
    assert_eq!(stack.login(KNOWN_MOBILE, &headers).await?.status, 200);
    let trace = &parent[3..35];
    let consumer = stack.receiver.expect_span(|span| span.trace_id == trace && span.kind == "CONSUMER").await;
    assert_eq!(consumer.trace_state, member);
    for key in ["first", "last"] {
        assert_eq!(consumer.attributes.get(key).map(String::as_str), Some("1"), "{key}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_grpc_is_answered_with_a_status_and_leaves_closed_spans() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    for garbage in [
        &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        b"\0\0\0\0\0\0\0\0\0",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        raw(stack.rpc.address, garbage, |_| true).await?;
        assert_unharmed(&stack, "garbage").await?;
    }

    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let known = "usercenter.v1.Usercenter/GetUserByMobile";
    let long_name = format!("a.B/{}", "x".repeat(5000));
    // Each case has a method, a header, a body and the expected status.
    for (method, header, body, status) in [
        (known, ("x", "1"), &b"\0\0\0\0\x0d\x0a\x0b13800138000"[..], "0"),
        (known, ("x", "1"), b"", "13"),
        (known, ("x", "1"), b"\0\0\0\0\x02\xff\xff", "13"),
        (known, ("x", "1"), b"\x07\0\0\0\0", "13"),
        (known, ("x", "1"), b"\0\xff\xff\xff\xff", "8"),
        (known, ("x", "1"), b"\x01\0\0\0\0", "13"),
        (known, ("grpc-encoding", "made-up"), b"\0\0\0\0\0", "12"),
        (known, ("grpc-timeout", "yesterday"), b"\0\0\0\0\x0d\x0a\x0b13800138000", "0"),
        (known, ("grpc-timeout", "0n"), b"\0\0\0\0\x0d\x0a\x0b13800138000", "4"),
        (known, ("traceparent", "00-garbage"), b"\0\0\0\0\x02\x0a\x00", "3"),
        // This request is not gRPC, so it gets the HTTP status 415, and no gRPC status.
        (known, ("content-type", "text/html"), b"", ""),
        ("made.Up/Method", ("x", "1"), b"\0\0\0\0\0", "12"),
        ("usercenter.v1.Usercenter/MadeUp", ("x", "1"), b"\0\0\0\0\0", "12"),
        (&long_name, ("x", "1"), b"\0\0\0\0\0", "12"),
        ("", ("x", "1"), b"\0\0\0\0\0", "12"),
    ] {
        let trace = uuid::Uuid::new_v4().simple().to_string();
        let mut request = Request::post(format!("http://{}/{method}", stack.rpc.address))
            .body(Full::new(Bytes::from_static(body)))?;
        let headers = request.headers_mut();
        headers.insert("content-type", "application/grpc".parse()?);
        headers.insert("te", "trailers".parse()?);
        headers.insert("traceparent", format!("00-{trace}-00f067aa0ba902b7-01").parse()?);
        headers.insert(http::HeaderName::from_static(header.0), header.1.parse()?);
        let (parts, answer) = timeout(PATIENCE, client.request(request)).await??.into_parts();
        let trailers = answer.collect().await?.trailers().cloned().unwrap_or_default();
        let found = trailers.get("grpc-status").or(parts.headers.get("grpc-status"));
        let found = found.and_then(|found| found.to_str().ok()).unwrap_or_default();
        assert_eq!(found, status, "{method} {header:?} {body:?}");

        if header.0 != "traceparent" {
            let name = if method == known { known } else { "grpc" };
            let span = stack.receiver.expect_span(|span| span.trace_id == trace).await;
            assert_eq!((span.service.as_str(), span.name.as_str()), ("usercenter", name));
            let original = span.attributes.get("rpc.method_original").map(String::as_str);
            assert_eq!(original, (method != known).then_some(&method[..method.len().min(200)]));
        }
        assert_unharmed(&stack, method).await?;
    }
    Ok(())
}
