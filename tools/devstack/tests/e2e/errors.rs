//! Every failure is clear from the answer to the caller and from the trace.

use anyhow::Result;
use axum::{
    Router,
    body::{Body, Bytes},
    routing::post,
};
use futures_util::stream;
use harness::{
    PATIENCE,
    client::{Answer, answers, raw},
    free_port,
    stack::{KNOWN_MOBILE, Stack},
    stand_in::{Reply, StandIn},
    trace::Span,
};
use http::{HeaderMap, Method};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tonic::{
    Code,
    service::Routes,
    transport::{Server, server::TcpIncoming},
};

/// Checks everything that an error answer must have, including its kind and its trace id.
fn assert_problem(answer: &Answer, status: u16, kind: &str) {
    let body = answer.json();
    assert_eq!(answer.status, status, "{body}");
    assert_eq!(answer.header("content-type"), "application/problem+json");
    assert_eq!(body["type"], format!("urn:throughline:problem:{kind}"));
    assert_eq!(body["status"], status);
    assert_eq!(body["traceId"], answer.trace_id());
    assert!(!body["title"].as_str().unwrap_or_default().is_empty());
}

/// Checks that the server span's status is an error only if the service is to blame.
fn assert_server_span(spans: &[Span], status: u16) {
    let span = spans.iter().find(|span| span.kind == "SERVER" && span.service == "api").expect("server span");
    assert_eq!(span.attributes["http.response.status_code"], status.to_string());
    if status < 500 {
        assert_eq!(span.status, "UNSET");
        assert!(!span.attributes.contains_key("error.type"));
    } else {
        assert_eq!(span.status, "ERROR");
        assert_eq!(span.attributes["error.type"], status.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_user_gets_401_and_is_an_error_of_the_client_only() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let answer = stack.login("13800138009", &[]).await?;
    assert_problem(&answer, 401, "unknown-user");
    let tree = "
        api POST /usercenter/v1/user/login SERVER
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=NOT_FOUND
            usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER
    ";
    let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    assert_server_span(&spans, 401);
    for span in spans.iter().filter(|span| span.name.starts_with("usercenter")) {
        assert_eq!(span.attributes["rpc.status_code"], "NOT_FOUND");
    }
    Ok(())
}

/// A request's headers and body, and the HTTP status and the kind of problem of its answer.
type Case<'a> = (&'a [(&'a str, &'a str)], &'a str, u16, &'a str);

#[tokio::test(flavor = "multi_thread")]
async fn bad_bodies_are_refused_before_anything_is_asked() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let json = [("content-type", "application/json")];
    let long = format!(r#"{{"mobile":"{}"}}"#, "1".repeat(2 * 1024 * 1024));
    let cases: &[Case] = &[
        (&json, "", 400, "not-json"),
        (&json, "{", 400, "not-json"),
        (&json, "\u{0}", 400, "not-json"),
        (&json, "{}", 422, "invalid-mobile"),
        (&json, "[]", 422, "invalid-mobile"),
        (&json, r#"["13800138000"]"#, 422, "invalid-mobile"),
        (&json, "null", 422, "invalid-mobile"),
        (&json, r#"{"mobile":null}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":13800138000}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":["13800138000"]}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":""}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":"1380"}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":"+8613800138000"}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":"1380013800\r\n0"}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":"１３８００"}"#, 422, "invalid-mobile"),
        (&json, r#"{"mobile":"13800138000","mobile":"13800138001"}"#, 422, "invalid-mobile"),
        (&json, &long, 413, "body-too-large"),
        (&[], r#"{"mobile":"13800138000"}"#, 415, "unsupported-media-type"),
        (&[("content-type", "text/plain")], r#"{"mobile":"13800138000"}"#, 415, "unsupported-media-type"),
    ];
    for (headers, body, status, kind) in cases {
        let answer = stack.client.send(Method::POST, &stack.login_url(), headers, body.to_string()).await?;
        assert_problem(&answer, *status, kind);
        let tree = "api POST /usercenter/v1/user/login SERVER";
        let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
        assert_server_span(&spans, *status);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_paths_and_methods_are_problems_with_a_span_of_few_names() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let base = format!("http://{}", stack.api.address);
    for (method, path, status, kind, tree) in [
        ("GET", "/nothing/here/42", 404, "no-such-route", "api GET SERVER"),
        ("INVENTED", "/nothing", 404, "no-such-route", "api HTTP SERVER"),
        (
            "GET",
            "/usercenter/v1/user/login",
            405,
            "method-not-allowed",
            "api GET /usercenter/v1/user/login SERVER",
        ),
        (
            "INVENTED",
            "/usercenter/v1/user/login",
            405,
            "method-not-allowed",
            "api HTTP /usercenter/v1/user/login SERVER",
        ),
    ] {
        let answer = stack.client.send(method.parse()?, &format!("{base}{path}"), &[], "").await?;
        assert_problem(&answer, status, kind);
        let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
        assert_server_span(&spans, status);
        let original = spans[0].attributes.get("http.request.method_original").map(String::as_str);
        assert_eq!(original, (method == "INVENTED").then_some("INVENTED"));
        assert_eq!(spans[0].attributes["url.path"], path);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn by_http_1_1_a_request_has_exactly_one_host() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let traceparent = format!("traceparent: 00-{trace}-00f067aa0ba902b7-01\r\n");
    for (path, otherwise) in [("/usercenter/v1/user/login", "405"), ("/nothing", "404"), ("/healthz", "200")]
    {
        for (version, hosts, is_served) in [
            ("1.1", "", false),
            ("1.1", "host: a\r\nhost: b\r\n", false),
            ("1.1", "host: a\r\nhost: a\r\n", false),
            ("1.0", "host: a\r\nhost: a\r\n", false),
            ("1.1", "host: a b\r\n", false),
            ("1.1", "host: user@a\r\n", false),
            ("1.1", "host: a\r\n", true),
            ("1.1", "host:\r\n", true),
            ("1.1", "host: [::1]:80\r\n", true),
            ("1.0", "", true),
            ("1.0", "host: a\r\n", true),
        ] {
            let request =
                format!("GET {path} HTTP/{version}\r\n{hosts}{traceparent}connection: close\r\n\r\n");
            let answer = raw(stack.api.address, request.as_bytes(), answers(1)).await?;
            let case = format!("{request}{answer}");
            assert_eq!(answer.split(' ').nth(1), Some(if is_served { otherwise } else { "400" }), "{case}");
            if !is_served {
                assert!(answer.contains("urn:throughline:problem:bad-host"), "{case}");
                assert!(path == "/healthz" || answer.contains(&format!(r#""traceId":"{trace}""#)), "{case}");
            }
        }
    }
    let is_refused = |span: &Span| span.attributes["http.response.status_code"] == "400";
    let spans = stack.receiver.expect_span(is_refused).await;
    assert_eq!((spans.trace_id.as_str(), spans.status), (trace, "UNSET"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn usercenter_down_is_503_and_back_up_is_200() -> Result<()> {
    // usercenter needs a fixed port, so that its next instance can listen on the same port.
    let listen = format!("127.0.0.1:{}", free_port()?);
    let mut stack = Stack::start(&[("rpc", "USERCENTER_LISTEN", &listen)]).await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    stack.rpc.kill().await?;

    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_problem(&answer, 503, "usercenter-unavailable");
    assert_eq!(answer.header("retry-after"), "1");
    let tree = "
        api POST /usercenter/v1/user/login SERVER ERROR error.type=503
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=UNAVAILABLE
    ";
    let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    assert_server_span(&spans, 503);

    // By now, the old connection is gone, and the span says why api could not open a new connection.
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    let call = spans.iter().find(|span| span.kind == "CLIENT").expect("the call");
    assert_eq!(call.status_message, format!("connect to {listen}: Connection refused (os error 111)"));
    let unreachable = stack.api.said("can't reach usercenter: ").await?;
    let failed = stack.api.said("usercenter failed code=\"UNAVAILABLE\" reason=\"Connection refused").await?;
    for line in [unreachable, failed] {
        assert_eq!(line.matches("refused").count(), 1, "{line}");
    }

    let _rpc = stack.another("rpc", &[("USERCENTER_LISTEN", &listen)]).await?;
    let back = harness::poll(PATIENCE, async || {
        stack.login(KNOWN_MOBILE, &[]).await.ok().filter(|answer| answer.status == 200)
    });
    assert!(back.await.is_some(), "{}", stack.api.output());
    Ok(())
}

/// Starts a usercenter that begins its answers and never ends them. The usercenter sends the `grpc-timeout`
/// of each call to `timeouts`. Returns the URL of the usercenter.
async fn begins_and_stalls(timeouts: mpsc::UnboundedSender<String>) -> Result<String> {
    let call = async move |headers: HeaderMap| {
        let timeout = headers.get("grpc-timeout").and_then(|timeout| timeout.to_str().ok());
        timeouts.send(timeout.unwrap_or_default().to_owned()).expect("the test is waiting");
        let never = Body::from_stream(stream::pending::<std::io::Result<Bytes>>());
        ([("content-type", "application/grpc")], never)
    };
    let routes = Router::new().route("/usercenter.v1.Usercenter/GetUserByMobile", post(call));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let server = Server::builder().add_routes(Routes::from(routes));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    Ok(url)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_travels_and_bounds_an_answer_that_has_begun() -> Result<()> {
    let (sender, mut timeouts) = mpsc::unbounded_channel();
    let url = begins_and_stalls(sender).await?;
    let stack = Stack::start(&[("api", "USERCENTER_URL", &url), ("api", "USERCENTER_TIMEOUT", "3s")]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_problem(&answer, 504, "usercenter-timeout");
    let told = timeout(PATIENCE, timeouts.recv()).await?.expect("a call");
    let told: u64 = told.strip_suffix('u').and_then(|micros| micros.parse().ok()).expect("microseconds");
    assert!((1_000_000..=3_000_000).contains(&told), "{told}");
    let tree = "
        api POST /usercenter/v1/user/login SERVER ERROR error.type=504
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=DEADLINE_EXCEEDED
    ";
    stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn usercenter_failing_is_502_whatever_the_code_and_tells_no_detail() -> Result<()> {
    for (code, name) in [(Code::Internal, "INTERNAL"), (Code::PermissionDenied, "PERMISSION_DENIED")] {
        let usercenter = StandIn::start(move |_| Reply::Error(code)).await?;
        let stack = Stack::start(&[("api", "USERCENTER_URL", &usercenter.url)]).await?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        assert_problem(&answer, 502, "usercenter-failed");
        assert!(!format!("{:?}", answer.body).contains("internal detail"));
        let tree = format!(
            "
            api POST /usercenter/v1/user/login SERVER ERROR error.type=502
              api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type={name}
            "
        );
        let spans = stack.receiver.expect_tree(&answer.trace_id(), &tree).await;
        assert_server_span(&spans, 502);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_resets_its_connection_leaves_a_span_that_says_so() -> Result<()> {
    let usercenter = StandIn::start(|_| Reply::Never).await?;
    let stack = Stack::start(&[("api", "USERCENTER_URL", &usercenter.url)]).await?;
    let mut connection = TcpStream::connect(stack.api.address).await?;
    let request = "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\
                   content-length: 24\r\n\r\n{\"mobile\":\"13800138000\"}";
    connection.write_all(request.as_bytes()).await?;
    usercenter.called(1).await?;
    timeout(Duration::from_millis(100), connection.read_u8()).await.unwrap_err();
    connection.set_zero_linger()?;
    drop(connection);
    let tree = "
        api POST /usercenter/v1/user/login SERVER ERROR error.type=cancelled
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=CANCELLED
    ";
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let spans = stack.receiver.expect_tree_below("00f067aa0ba902b7", trace, tree).await;
    // Both spans were open during the 100 ms in which the test waited for a byte.
    assert!(spans.iter().all(|span| span.end - span.start >= 100_000_000), "{spans:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_408() -> Result<()> {
    let stack = Stack::start(&[("api", "API_DEADLINE", "1s")]).await?;
    let mut connection = TcpStream::connect(stack.api.address).await?;
    let request = "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   connection: close\r\ncontent-length: 24\r\n\r\n{\"mobile\":";
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("urn:throughline:problem:body-too-slow"), "{answer}");
    let span = stack.receiver.expect_span(|span| span.service == "api").await;
    assert_eq!(span.attributes["http.response.status_code"], "408");
    Ok(())
}
