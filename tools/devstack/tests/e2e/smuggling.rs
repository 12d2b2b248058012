//! Ambiguous requests, which two servers could understand differently. Each request gets one documented
//! answer, and a second request that is hidden inside it is never served (RFC 9112, sections 6.3 and 11.2).

use anyhow::Result;
use harness::{
    client::{answers, raw},
    stack::Stack,
};
use uuid::Uuid;

const LOGIN: &str =
    "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
const BODY: &str = r#"{"mobile":"13800138000"}"#;

/// The hidden request. If it were served, the answer would be 200 with the body `alive`.
const HIDDEN: &str = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_hidden_request_is_never_served() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let chunked = "transfer-encoding: chunked\r\n";
    let whole = format!("content-length: {}\r\n", BODY.len());
    let as_body = format!("0\r\n\r\n{HIDDEN}");
    for (name, request, expected) in [
        // Some servers would use `content-length`, and others would use the chunks. The chunks take
        // precedence (section 6.3), and api reads nothing more from the connection.
        ("CL.TE", format!("{LOGIN}content-length: {}\r\n{chunked}\r\n{as_body}", as_body.len()), "400"),
        ("TE.CL", format!("{LOGIN}{chunked}content-length: 4\r\n\r\n22\r\n{HIDDEN}\r\n0\r\n\r\n"), "400"),
        ("TE.TE", format!("{LOGIN}{chunked}transfer-encoding: x\r\n\r\n{as_body}"), "400"),
        ("chunked, but not last", format!("{LOGIN}transfer-encoding: chunked, x\r\n\r\n{as_body}"), "400"),
        (
            "a coding before chunked",
            format!("{LOGIN}transfer-encoding: JUNK, chunked\r\n\r\n{as_body}"),
            "501",
        ),
        ("gzip", format!("{LOGIN}transfer-encoding: gzip, chunked\r\n\r\n{as_body}"), "501"),
        ("a coding in another line", format!("{LOGIN}transfer-encoding: x\r\n{chunked}\r\n{as_body}"), "501"),
        (
            "chunked with a vertical tab",
            format!("{LOGIN}transfer-encoding: \x0bchunked\r\n\r\n{as_body}"),
            "400",
        ),
        ("two different lengths", format!("{LOGIN}content-length: 0\r\n{whole}\r\n{HIDDEN}"), "400"),
        ("two lengths in one line", format!("{LOGIN}content-length: 0, 36\r\n\r\n{HIDDEN}"), "400"),
        ("a signed length", format!("{LOGIN}content-length: +36\r\n\r\n{HIDDEN}"), "400"),
        ("a length in hexadecimal", format!("{LOGIN}content-length: 0x24\r\n\r\n{HIDDEN}"), "400"),
        (
            "a length beyond 64 bits",
            format!("{LOGIN}content-length: 18446744073709551652\r\n\r\n{HIDDEN}"),
            "400",
        ),
        ("a space before the colon", format!("{LOGIN}content-length : 36\r\n\r\n{HIDDEN}"), "400"),
        ("a folded line", format!("{LOGIN}x: y\r\n content-length: 36\r\n\r\n{HIDDEN}"), "400"),
        ("a bare CR in a value", format!("{LOGIN}x: y\rcontent-length: 36\r\n\r\n{HIDDEN}"), "400"),
        ("a bare LF in a value", format!("{LOGIN}x: y\ncontent-length: z\r\n\r\n{HIDDEN}"), "400"),
        ("a null in a name", format!("{LOGIN}content\0-length: 36\r\n\r\n{HIDDEN}"), "400"),
        (
            "a chunk size that overflows",
            format!("{LOGIN}{chunked}\r\n10000000000000000\r\n{BODY}\r\n0\r\n\r\n{HIDDEN}"),
            "400",
        ),
        ("an invalid chunk size", format!("{LOGIN}{chunked}\r\n-1\r\n{BODY}\r\n0\r\n\r\n{HIDDEN}"), "400"),
        (
            "a chunk that is longer than its size",
            format!("{LOGIN}{chunked}\r\n1\r\n{BODY}\r\n0\r\n\r\n{HIDDEN}"),
            "400",
        ),
        (
            "a bare LF in a chunk extension",
            format!("{LOGIN}{chunked}\r\n2;x\nxx\r\n{{}}\r\n0\r\n\r\n{HIDDEN}"),
            "400",
        ),
        ("endless extensions", format!("{LOGIN}{chunked}\r\n1;{}\r\n{BODY}", "x".repeat(100_000)), "400"),
        (
            "endless trailers",
            format!("{LOGIN}{chunked}\r\n0\r\n{}\r\n", format!("x: {}\r\n", "y".repeat(1000)).repeat(1000)),
            "400",
        ),
    ] {
        let answer = raw(stack.api.address, request.as_bytes(), answers(1)).await?;
        assert_eq!(answer.split(' ').nth(1).unwrap_or_default(), expected, "{name}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{name}: {answer}");
        assert!(!answer.contains("alive"), "{name}: {answer}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_requests_that_have_one_meaning_are_served_by_it() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let whole = format!("content-length: {}\r\n", BODY.len());
    let chunks = format!("5\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n", &BODY[..5], BODY.len() - 5, &BODY[5..]);
    for (name, request, expected) in [
        ("the same length twice", format!("{LOGIN}{whole}{whole}\r\n{BODY}"), &["200"][..]),
        ("chunks", format!("{LOGIN}transfer-encoding: chunked\r\n\r\n{chunks}"), &["200"]),
        ("chunks in capitals", format!("{LOGIN}Transfer-Encoding: CHUNKED\r\n\r\n{chunks}"), &["200"]),
        (
            "a chunk extension",
            format!("{LOGIN}transfer-encoding: chunked\r\n\r\n{:x};a=b\r\n{BODY}\r\n0\r\n\r\n", BODY.len()),
            &["200"],
        ),
        // Both requests are answered in order, once each, unlike the hidden requests in the test above.
        ("pipelined requests", format!("{LOGIN}{whole}\r\n{BODY}{HIDDEN}"), &["200", "200"]),
        ("HTTP/1.0", format!("{}{whole}\r\n{BODY}", LOGIN.replace("HTTP/1.1", "HTTP/1.0")), &["200"]),
        // HTTP/1.0 has no keep-alive by default, so the second request is not read.
        (
            "HTTP/1.0, then another",
            format!("{}{whole}\r\n{BODY}{HIDDEN}", LOGIN.replace("HTTP/1.1", "HTTP/1.0")),
            &["200"],
        ),
        // HTTP/1.0 has no chunks.
        (
            "HTTP/1.0 with chunks",
            format!("{}transfer-encoding: chunked\r\n\r\n{chunks}", LOGIN.replace("HTTP/1.1", "HTTP/1.0")),
            &["400"],
        ),
        // The host in the target takes precedence over `host` (RFC 9112, section 3.2.2). No answer here
        // depends on the host.
        ("absolute form", HIDDEN.replace("/healthz", "http://other.example/healthz"), &["200"]),
        ("a method that is unknown", HIDDEN.replace("GET", "SMUGGLE"), &["405"]),
        ("CONNECT", "CONNECT other.example:443 HTTP/1.1\r\nhost: x\r\n\r\n".to_owned(), &["404"]),
        (
            "an upgrade to HTTP/2",
            HIDDEN.replace(
                "\r\n\r\n",
                "\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n",
            ),
            &["200"],
        ),
        ("expect", format!("{LOGIN}{whole}expect: 100-continue\r\n\r\n{BODY}"), &["100", "200"]),
        // The answer does not depend on the body, so api does not ask the caller to send it.
        (
            "expect at an unknown path",
            format!("{}{whole}expect: 100-continue\r\n\r\n", LOGIN.replace("/login", "/logout")),
            &["404"],
        ),
        (
            "expect with another method",
            format!("{}{whole}expect: 100-continue\r\n\r\n", LOGIN.replace("POST", "PUT")),
            &["405"],
        ),
        (
            "expect with another media type",
            format!("{}{whole}expect: 100-continue\r\n\r\n", LOGIN.replace("/json", "/xml")),
            &["415"],
        ),
        (
            "expect with a body that is too long",
            format!("{LOGIN}content-length: 9999999\r\nexpect: 100-continue\r\n\r\n"),
            &["413"],
        ),
    ] {
        let answer = raw(stack.api.address, request.as_bytes(), answers(expected.len())).await?;
        let statuses: Vec<_> = answer
            .match_indices("HTTP/1.")
            .filter_map(|(at, _)| answer[at..].split([' ', '\r']).nth(1))
            .collect();
        assert_eq!(statuses, expected, "{name}: {answer}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_sends_breaks_no_line_of_a_log_and_no_header() -> Result<()> {
    for format in ["text", "json"] {
        let variables =
            [("*", "LOG_FORMAT", format), ("*", "RUST_LOG", "debug"), ("*", "BAGGAGE_SPAN_ATTRIBUTES", "k")];
        let mut stack = Stack::start(&variables).await?;
        // If a log line or a header begins with this mark, the caller has injected it.
        let mark = format!("x-evil-{}", Uuid::new_v4().simple());
        let injected = format!("\r\n{mark}: yes\r\n\x1b[31m\x07\u{9b}31m\u{2028}\0");
        let as_json = serde_json::json!({ "mobile": injected, &injected: injected }).to_string();
        let escaped: String = injected.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let without_line_ends = injected.replace(['\r', '\n', '\0'], "");
        for (headers, body) in [
            (String::new(), as_json.as_str()),
            (format!("baggage: k={escaped};p={escaped}\r\n"), BODY),
            (format!("tracestate: k={escaped}\r\ntraceparent: {escaped}\r\n"), BODY),
            (format!("user-agent: {without_line_ends}\r\n"), BODY),
            (format!("content-type: {without_line_ends}\r\n"), BODY),
            (format!("x-request-id: {without_line_ends}\r\nb3: {without_line_ends}\r\n"), BODY),
        ] {
            let request = format!(
                "POST /usercenter/v1/user/login?{escaped} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                 connection: close\r\ncontent-length: {}\r\n{headers}\r\n{body}",
                body.len()
            );
            let answer = raw(stack.api.address, request.as_bytes(), answers(1)).await?;
            assert!(answer.starts_with("HTTP/1.1 "), "{headers:?}: {answer}");
            assert!(!answer.contains(&mark), "{answer}");
        }
        let path = format!("GET /{escaped} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        assert!(raw(stack.api.address, path.as_bytes(), answers(1)).await?.starts_with("HTTP/1.1 404 "));

        stack.stop().await?;
        for service in [&stack.api, &stack.rpc, &stack.mq] {
            for line in service.output().lines() {
                assert!(!line.chars().any(char::is_control), "{}: {line:?}", service.name);
                assert!(!line.trim_start().starts_with(&mark), "{}: {line:?}", service.name);
                if format == "json" {
                    serde_json::from_str::<serde_json::Value>(line)?;
                }
            }
        }
    }
    Ok(())
}
