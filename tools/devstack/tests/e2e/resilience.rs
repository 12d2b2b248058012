//! usercenter is slow, failing or away, or there are more requests than api can serve. The tests check the
//! answers, the calls that reach usercenter, and the trace.

use anyhow::Result;
use axum::{Router, body::Body, response::Response};
use bytes::Bytes;
use futures_util::{future::join_all, stream};
use harness::{
    PATIENCE,
    client::Answer,
    poll,
    proxy::Proxy,
    stack::{KNOWN_MOBILE, Stack},
    stand_in::{Reply, StandIn},
    trace::Span,
};
use http::{HeaderMap, HeaderName, HeaderValue, uri::PathAndQuery};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use proto::usercenter::v1::{
    GetUserByMobileRequest, GetUserByMobileResponse, usercenter_client::UsercenterClient,
};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_prost::ProstCodec;

/// Starts the services. api calls `fake` instead of usercenter.
async fn stack(fake: &StandIn, variables: &[(&str, &str)]) -> Result<Stack> {
    let mut all = vec![("api", "USERCENTER_URL", fake.url.as_str())];
    all.extend(variables.iter().map(|(name, value)| ("api", *name, *value)));
    Stack::start(&all).await
}

fn assert_problem(answer: &Answer, status: u16, kind: &str) {
    let body = answer.json();
    assert_eq!(answer.status, status, "{body}");
    assert_eq!(body["type"], format!("urn:throughline:problem:{kind}"));
    assert_eq!(body["traceId"], answer.trace_id());
    assert_eq!(answer.header("retry-after"), if status == 503 { "1" } else { "" });
}

fn client_span(spans: &[Span]) -> &Span {
    spans.iter().find(|span| span.kind == "CLIENT").expect("client span")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_given_the_time_that_the_request_has_left() -> Result<()> {
    let fake = StandIn::start(|_| Reply::Never).await?;
    let stack = stack(&fake, &[("API_DEADLINE", "3s"), ("USERCENTER_TIMEOUT", "50s")]).await?;
    let began = Instant::now();
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    let took = began.elapsed();
    assert_problem(&answer, 504, "usercenter-timeout");
    assert!((Duration::from_secs(3)..Duration::from_secs(50)).contains(&took), "{took:?}");
    let told = fake.calls();
    assert!(told.len() == 1 && told[0] <= Duration::from_secs(3) && !told[0].is_zero(), "{told:?}");
    let tree = "
        api POST /usercenter/v1/user/login SERVER ERROR error.type=504
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=DEADLINE_EXCEEDED
    ";
    stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_safe_to_repeat_is_tried_again_and_one_span_tells_of_each_attempt() -> Result<()> {
    let fake = StandIn::start(|call| match call {
        1 | 2 => Reply::Error(Code::Unavailable),
        _ => Reply::User,
    })
    .await?;
    let stack = stack(&fake, &[]).await?;
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_eq!(answer.status, 200);
    let tree = "
        api POST /usercenter/v1/user/login SERVER
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT
          api local INTERNAL
          api send_msg_mq PRODUCER
            mq mq_consumer_msg CONSUMER
    ";
    let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    let span = client_span(&spans);
    assert_eq!(span.attributes["rpc.status_code"], "OK");
    assert_eq!(span.events.len(), 2, "{:?}", span.events);
    for ((name, attributes), attempt) in span.events.iter().zip(2..) {
        assert_eq!(name, "retry");
        assert_eq!(attributes["throughline.retry.attempt"], attempt.to_string());
        assert_eq!(attributes["rpc.status_code"], "UNAVAILABLE");
        assert!(attributes["throughline.retry.pause_ms"].parse::<u64>()? > 0);
    }
    let told = fake.calls();
    assert!(
        told.is_sorted_by(|earlier, later| earlier > later),
        "an attempt has no less time than the one before: {told:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_usercenter_has_decided_is_not_tried_again() -> Result<()> {
    let fake = StandIn::start(|_| Reply::Error(Code::NotFound)).await?;
    let stack = stack(&fake, &[]).await?;
    for (code, status, kind) in [
        (Code::NotFound, 401, "unknown-user"),
        (Code::InvalidArgument, 422, "invalid-mobile"),
        (Code::Internal, 502, "usercenter-failed"),
    ] {
        let before = fake.calls().len();
        fake.follow(move |_| Reply::Error(code));
        assert_problem(&stack.login(KNOWN_MOBILE, &[]).await?, status, kind);
        assert_eq!(fake.calls().len() - before, 1, "{code:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_are_as_many_as_are_set() -> Result<()> {
    for attempts in [1, 5] {
        let fake = StandIn::start(|_| Reply::Error(Code::Unavailable)).await?;
        let stack = stack(&fake, &[("USERCENTER_ATTEMPTS", &attempts.to_string())]).await?;
        let answer = stack.login(KNOWN_MOBILE, &[]).await?;
        assert_problem(&answer, 503, "usercenter-unavailable");
        assert_eq!(fake.calls().len(), attempts);
        let tree = "
            api POST /usercenter/v1/user/login SERVER ERROR error.type=503
              api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=UNAVAILABLE
        ";
        let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
        assert_eq!(client_span(&spans).events.len() + 1, attempts);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_circuit_opens_lets_a_probe_pass_and_closes() -> Result<()> {
    const OPENS_AFTER: usize = 20;
    const PAUSE: Duration = Duration::from_secs(5);
    let permits = Arc::new(Semaphore::new(0));
    let gate = permits.clone();
    let fake = StandIn::start(move |_| Reply::ErrorAfter(Code::Unavailable, gate.clone())).await?;
    let stack = stack(&fake, &[("USERCENTER_ATTEMPTS", "1"), ("USERCENTER_CIRCUIT_PAUSE", "5s")]).await?;
    // All calls begin before the first call fails. So all calls count in one window, and no call begins after
    // the circuit has opened, even on a slow machine.
    let logins = join_all((0..OPENS_AFTER).map(|_| stack.login(KNOWN_MOBILE, &[])));
    let all_fail = async {
        fake.called(OPENS_AFTER).await?;
        let opens_later = Instant::now();
        permits.add_permits(1000);
        anyhow::Ok(opens_later)
    };
    let (answers, before) = tokio::join!(logins, all_fail);
    for answer in answers {
        assert_problem(&answer?, 503, "usercenter-unavailable");
    }
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_problem(&answer, 503, "usercenter-circuit-open");
    assert_eq!(fake.calls().len(), OPENS_AFTER);
    let tree = "
        api POST /usercenter/v1/user/login SERVER ERROR error.type=503
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=circuit_open
    ";
    let spans = stack.receiver.expect_tree(&answer.trace_id(), tree).await;
    let refused = client_span(&spans);
    assert_eq!(refused.events[0].0, "circuit_open");
    assert!(refused.events[0].1.contains_key("throughline.circuit.retry_after_ms"));
    // api didn't contact usercenter.
    assert!(!refused.attributes.contains_key("network.peer.address"), "{refused:#?}");

    // When the circuit is half-open, one call passes and fails. Then no call passes until another pause is
    // over.
    let probed = poll(PATIENCE, async || {
        stack.login(KNOWN_MOBILE, &[]).await.expect("an answer");
        (fake.calls().len() > OPENS_AFTER).then(Instant::now)
    });
    assert!(probed.await.expect("a probe") - before? >= PAUSE);
    assert_problem(&stack.login(KNOWN_MOBILE, &[]).await?, 503, "usercenter-circuit-open");
    assert_eq!(fake.calls().len(), OPENS_AFTER + 1);

    fake.follow(|_| Reply::User);
    let well = poll(PATIENCE, async || {
        stack.login(KNOWN_MOBILE, &[]).await.ok().filter(|answer| answer.status == 200)
    });
    assert!(well.await.is_some(), "{}", stack.api.output());
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);
    stack.api.said("circuit closed").await?;
    assert_eq!(stack.api.output().matches("circuit opened").count(), 1, "{}", stack.api.output());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn more_requests_than_may_be_in_flight_are_refused_at_once_and_the_others_served() -> Result<()> {
    let permits = Arc::new(Semaphore::new(0));
    let gate = permits.clone();
    let fake = StandIn::start(move |_| Reply::After(gate.clone())).await?;
    let stack = stack(&fake, &[("API_MAX_IN_FLIGHT", "2")]).await?;
    let two = join_all((0..2).map(|_| stack.login(KNOWN_MOBILE, &[])));
    let third = async {
        fake.called(2).await.expect("two calls");
        let answer = stack.login(KNOWN_MOBILE, &[]).await.expect("an answer");
        let alive = stack.client.get(&format!("http://{}/healthz", stack.api.address)).await;
        permits.add_permits(10);
        (answer, alive.expect("an answer"))
    };
    let (served, (refused, alive)) = tokio::join!(two, third);
    assert!(served.into_iter().all(|answer| answer.is_ok_and(|answer| answer.status == 200)));
    assert_eq!(alive.status, 200);
    assert_problem(&refused, 503, "overloaded");
    let tree = "api POST /usercenter/v1/user/login SERVER ERROR error.type=overloaded";
    stack.receiver.expect_tree(&refused.trace_id(), tree).await;
    Ok(())
}

const METHOD: &str = "/usercenter.v1.Usercenter/GetUserByMobile";

/// Makes a call whose request message never arrives, so that the call stays in flight. The call does not use
/// tonic's own channel, because this channel would end the call at its `grpc-timeout`.
async fn stalled(rpc: SocketAddr, traceparent: &str, timeout: Option<&str>) -> Result<(), Status> {
    let client: Client<HttpConnector, tonic::body::Body> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let origin = format!("http://{rpc}").parse().expect("a URL");
    let mut client = tonic::client::Grpc::with_origin(client, origin);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(stream::pending::<GetUserByMobileRequest>());
    request.metadata_mut().insert("traceparent", traceparent.parse().expect("a value"));
    if let Some(timeout) = timeout {
        request.metadata_mut().insert("grpc-timeout", timeout.parse().expect("a value"));
    }
    let codec = ProstCodec::<GetUserByMobileRequest, GetUserByMobileResponse>::default();
    client.client_streaming(request, PathAndQuery::from_static(METHOD), codec).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn usercenter_refuses_more_calls_than_may_be_in_flight_and_stays_healthy() -> Result<()> {
    let variables = [("rpc", "USERCENTER_MAX_IN_FLIGHT", "1"), ("rpc", "USERCENTER_DEADLINE", "1h")];
    let stack = Stack::start(&variables).await?;
    let rpc = stack.rpc.address;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let in_flight = tokio::spawn(async move {
        // If one of the calls below arrives first, this call is refused, and is made again.
        while let Err(status) = stalled(rpc, parent, None).await {
            assert_eq!(status.code(), Code::Unavailable);
        }
    });

    let channel = Channel::from_shared(format!("http://{rpc}"))?.connect().await?;
    let mut client = UsercenterClient::new(channel);
    let refused = poll(PATIENCE, async || {
        let lookup = GetUserByMobileRequest { mobile: KNOWN_MOBILE.to_owned() };
        client.get_user_by_mobile(lookup).await.err()
    });
    assert_eq!(refused.await.expect("a refusal").code(), Code::Unavailable);
    let healthy = poll(PATIENCE, async || serving::health::probe(rpc).await.ok());
    healthy.await.expect("usercenter is busy, not unwell");

    // api also reports the overload after all of its attempts have failed.
    let answer = stack.login(KNOWN_MOBILE, &[]).await?;
    assert_problem(&answer, 503, "usercenter-unavailable");
    let refusal = "usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER ERROR error.type=UNAVAILABLE";
    let tree = format!(
        "
        api POST /usercenter/v1/user/login SERVER ERROR error.type=503
          api usercenter.v1.Usercenter/GetUserByMobile CLIENT ERROR error.type=UNAVAILABLE
            {refusal}
            {refusal}
            {refusal}
        "
    );
    let spans = stack.receiver.expect_tree(&answer.trace_id(), &tree).await;
    let refused = spans.iter().filter(|span| span.service == "usercenter");
    assert!(refused.map(|span| span.status_message.as_str()).eq(["overloaded"; 3]), "{spans:#?}");
    in_flight.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn usercenter_ends_a_call_at_its_own_deadline_or_the_callers() -> Result<()> {
    let stack = Stack::start(&[("rpc", "USERCENTER_DEADLINE", "5s")]).await?;
    let tree =
        "usercenter usercenter.v1.Usercenter/GetUserByMobile SERVER ERROR error.type=DEADLINE_EXCEEDED";
    for (trace, timeout, millis) in [
        ("4bf92f3577b34da6a3ce929d0e0e4731", None, 5000..u64::MAX),
        ("4bf92f3577b34da6a3ce929d0e0e4732", Some("200m"), 190..5000),
    ] {
        let parent = format!("00-{trace}-00f067aa0ba902b7-01");
        let call = stalled(stack.rpc.address, &parent, timeout);
        let status = tokio::time::timeout(PATIENCE, call).await?.expect_err("no answer");
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        let spans = stack.receiver.expect_tree_below("00f067aa0ba902b7", trace, tree).await;
        assert_eq!(spans[0].attributes["rpc.status_code"], "DEADLINE_EXCEEDED");
        let took = (spans[0].end - spans[0].start) / 1_000_000;
        assert!(millis.contains(&took), "{took}");
    }
    Ok(())
}

type Fields = &'static [(&'static str, &'static str)];

fn header_map(fields: Fields) -> HeaderMap {
    let field = |(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
    fields.iter().copied().map(field).collect()
}

/// Starts the services, and a stand-in for usercenter that gives this answer to every call from api. If there
/// are trailers, the answer's message is a user.
async fn answered(status: u16, headers: Fields, trailers: Fields) -> Result<Stack> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let routes = Router::new().fallback(async move || {
        let mut answer = Response::new(match trailers {
            [] => Body::empty(),
            trailers => {
                let user = Full::new(Bytes::from_static(b"\0\0\0\0\x04\x0a\x02\x08\x01"));
                Body::new(user.with_trailers(std::future::ready(Some(Ok(header_map(trailers))))))
            }
        });
        *answer.status_mut() = status.try_into().expect("a status");
        *answer.headers_mut() = header_map(headers);
        answer
    });
    tokio::spawn(axum::serve(listener, routes).into_future());
    Stack::start(&[("api", "USERCENTER_URL", &url)]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_code_of_a_status_stands_and_what_a_caller_can_cause_opens_no_circuit() -> Result<()> {
    const GRPC: (&str, &str) = ("content-type", "application/grpc");
    // This status message is not UTF-8 when it is decoded, and these details are not base64.
    const MESSAGE: (&str, &str) = ("grpc-message", "caf%E9");
    const DETAILS: (&str, &str) = ("grpc-status-details-bin", "%%%");
    const OK: (&str, &str) = ("grpc-status", "0");
    const NOT_FOUND: (&str, &str) = ("grpc-status", "5");
    const EXHAUSTED: (&str, &str) = ("grpc-status", "8");
    let cases: [(u16, Fields, Fields, u16, &str); 6] = [
        (200, &[GRPC, NOT_FOUND, MESSAGE, DETAILS], &[], 401, "unknown-user"),
        (200, &[GRPC], &[NOT_FOUND, MESSAGE, DETAILS], 401, "unknown-user"),
        (200, &[GRPC], &[OK, MESSAGE, DETAILS], 200, ""),
        // The status is OK, but the body with the user is missing.
        (200, &[GRPC, OK, MESSAGE, DETAILS], &[], 502, "usercenter-failed"),
        (200, &[GRPC, EXHAUSTED], &[], 502, "usercenter-failed"),
        (431, &[], &[], 502, "usercenter-failed"),
    ];
    for (status, headers, trailers, expected, kind) in cases {
        let stack = answered(status, headers, trailers).await?;
        // The circuit would open after 20 calls if half of them failed.
        for _ in 0..40 {
            let answer = stack.login(KNOWN_MOBILE, &[]).await?;
            match expected {
                200 => assert_eq!(answer.status, 200, "{:?}", answer.json()),
                _ => assert_problem(&answer, expected, kind),
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_over_http_cannot_shorten_the_deadline_and_open_the_circuit() -> Result<()> {
    let stack = Stack::start(&[]).await?;
    for _ in 0..40 {
        let answer = stack.login(KNOWN_MOBILE, &[("grpc-timeout", "1n")]).await?;
        assert_eq!(answer.status, 200, "{:?}", answer.body);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_vanishes_without_a_word_is_looked_for_again() -> Result<()> {
    let fake = StandIn::start(|_| Reply::User).await?;
    let address = fake.url.trim_start_matches("http://").parse()?;
    // api's first connection goes through `network` and then `vanishing` to the fake. Later connections go
    // from `network` directly to the fake.
    let vanishing = Proxy::start(address)?;
    let network = Proxy::start(vanishing.address)?;
    let url = format!("http://{}", network.address);
    let stack = Stack::start(&[("api", "USERCENTER_URL", &url), ("api", "USERCENTER_TIMEOUT", "2s")]).await?;
    assert_eq!(stack.login(KNOWN_MOBILE, &[]).await?.status, 200);

    vanishing.freeze();
    network.lead_to(address);
    let login = async || stack.login(KNOWN_MOBILE, &[]).await.ok().filter(|answer| answer.status == 200);
    let back = poll(PATIENCE, login).await;
    assert!(back.is_some(), "{}", stack.api.output());
    Ok(())
}
