//! Checks that the largest context that api passes on fits into every next hop (docs/bounds.md).

use amq_protocol::frame::WriteContext;
use api::{
    bounds::MAX_BUFFER,
    outbox::Message,
    usercenter::{self, CallLimits},
};
use http::{HeaderMap, Request};
use lapin::protocol::basic::gen_properties;
use opentelemetry::{
    Context, global,
    propagation::{Injector, TextMapPropagator},
};
use proto::usercenter::v1::{GetUserByMobileRequest, usercenter_client::UsercenterClient};
use serving::grpc::MAX_HEADERS;
use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use telemetry::propagation::{MAX_BAGGAGE, MAX_TRACESTATE, Propagator, composite};
use tonic::{Status, body::Body};
use tower::service_fn;

/// RabbitMQ's default for the longest frame, in bytes. The properties of a message must fit into one frame.
const FRAME: usize = 128 * 1024;

/// An allowance for the headers that tonic and hyper add to a call: the pseudo-headers, and a few more.
const OF_HTTP2: usize = 1024;

const ALL: [Propagator; 5] =
    [Propagator::TraceContext, Propagator::Baggage, Propagator::B3, Propagator::B3Multi, Propagator::Jaeger];

/// Reads a legal context that is longer than the context that api passes on. As much of it as possible is
/// kept. The values of its tracestate consist of the character that takes the most room in JSON.
fn largest() -> Context {
    let mut headers = HashMap::new();
    headers.set("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
    headers.set(
        "tracestate",
        (10..42).map(|i| format!("k{i}={}", "\"".repeat(12))).collect::<Vec<_>>().join(","),
    );
    headers
        .set("baggage", (10..90).map(|i| format!("k{i}={}", "v".repeat(123))).collect::<Vec<_>>().join(","));
    composite(&ALL).extract_with_context(&Context::new(), &headers)
}

#[tokio::test]
async fn the_largest_context_fits_into_each_hop_with_room_to_spare() {
    global::set_text_map_propagator(composite(&ALL));
    let cx = largest();
    let mut context = HashMap::new();
    telemetry::inject(&cx, &mut context);
    let (tracestate, baggage) = (context["tracestate"].len(), context["baggage"].len());
    assert!((MAX_TRACESTATE - 20..=MAX_TRACESTATE).contains(&tracestate), "{tracestate}");
    assert!((MAX_BAGGAGE - 20..=MAX_BAGGAGE).contains(&baggage), "{baggage}");

    // The buffer for a caller's request has room for at least twice these headers.
    let size: usize = context.iter().map(|(name, value)| name.len() + value.len()).sum();
    assert!(size * 2 <= MAX_BUFFER, "{size}");

    // The size of a call's headers is calculated as HTTP/2 does it. A quarter of the largest size stays free.
    let kept = Arc::new(Mutex::new(HeaderMap::new()));
    let seen = kept.clone();
    let channel = service_fn(move |request: Request<Body>| {
        *kept.lock().unwrap() = request.headers().clone();
        async { Ok::<_, Infallible>(Status::not_found("").into_http::<Body>()) }
    });
    let limits =
        CallLimits { timeout: Duration::from_secs(2), attempts: 1, circuit_pause: Duration::from_secs(1) };
    let endpoint = "http://127.0.0.1:50051".parse().unwrap();
    let mut client = UsercenterClient::new(usercenter::in_layers(&endpoint, limits, channel));
    {
        let _attached = cx.clone().attach();
        let lookup = GetUserByMobileRequest { mobile: "13800138000".to_owned() };
        client.get_user_by_mobile(lookup).await.unwrap_err();
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen["baggage"].len(), baggage);
    let size: usize = seen.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
    assert!((size + OF_HTTP2) * 4 / 3 <= MAX_HEADERS as usize, "{size}");

    // The properties of a message leave room for the properties that retries add. An entry in the spool
    // contains the context only once.
    let message = Message::new(&cx, "0".repeat(36), "13800138000".to_owned().try_into().unwrap());
    let properties = message.properties(SystemTime::now());
    let written = gen_properties(&properties)(WriteContext::from(Vec::new())).unwrap().write.len();
    assert!((baggage..=FRAME / 8).contains(&written), "{written}");
    let (body, entry) = (message.body().len(), message.to_bytes().len());
    assert!((baggage..=FRAME / 8).contains(&body), "{body}");
    assert!(entry <= MAX_BAGGAGE + 2 * MAX_TRACESTATE + 1024, "{entry}");
}
