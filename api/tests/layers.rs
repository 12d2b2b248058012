//! Tests the layers of api in memory. They must have the right order, and every request must have a span that
//! ends, even if a layer refuses the request or the handler panics.

use api::{
    router,
    usercenter::{self, Layered},
};
use axum::{Router, body::Body, response::Response, routing::get};
use http::{HeaderMap, Request, StatusCode};
use opentelemetry::{
    Context, Value, global,
    trace::{SpanKind, Status as SpanStatus, TraceContextExt},
};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SdkTracerProvider, Span, SpanData, SpanProcessor},
};
use proto::usercenter::v1::{GetUserByMobileRequest, usercenter_client::UsercenterClient};
use resilience::Deadline;
use std::{
    convert::Infallible,
    future::pending,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};
use telemetry::propagation;
use tokio::sync::Notify;
use tonic::{Code, Status};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

/// The spans that ended in this process, whichever test made them.
#[derive(Debug, Default)]
struct Ended(Mutex<Vec<SpanData>>);

static ENDED: LazyLock<&Ended> = LazyLock::new(|| {
    let ended: &Ended = Box::leak(Box::default());
    global::set_text_map_propagator(propagation::TraceContextPropagator);
    global::set_tracer_provider(SdkTracerProvider::builder().with_span_processor(Keep(ended)).build());
    ended
});

#[derive(Debug)]
struct Keep(&'static Ended);

impl SpanProcessor for Keep {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.0.lock().expect("no panic while the lock is held").push(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Returns the only ended span that has this name.
fn span(name: &str) -> SpanData {
    let ended = ENDED.0.lock().expect("no panic while the lock is held");
    let mut named = ended.iter().filter(|span| span.name == name);
    let (Some(span), None) = (named.next(), named.next()) else {
        panic!("not exactly one span is named {name}: {ended:#?}");
    };
    span.clone()
}

fn attribute<'a>(span: &'a SpanData, key: &str) -> &'a Value {
    let found = span.attributes.iter().filter(|attribute| attribute.key.as_str() == key).collect::<Vec<_>>();
    assert_eq!(found.len(), 1, "{key} in {span:#?}");
    &found[0].value
}

fn layered(routes: Router, limits: router::RequestLimits) -> Router {
    LazyLock::force(&ENDED);
    router::in_layers(routes, limits)
}

const LIMITS: router::RequestLimits =
    router::RequestLimits { max_in_flight: 10, deadline: Duration::from_secs(3) };

fn request(path: &str) -> Request<Body> {
    Request::get(path).header("host", "api").body(Body::empty()).expect("a request")
}

/// Checks that `answer` is this problem and belongs to the trace of the span with this name. The span must
/// have this `error.type`.
async fn assert_refused(answer: Response, span_name: &str, status: u16, kind: &str, error_type: &str) {
    let (head, body) = answer.into_parts();
    let body = axum::body::to_bytes(body, 10_000).await.expect("a body");
    let problem: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
    let span = span(span_name);
    assert_eq!(head.status, status);
    assert_eq!(problem["type"], format!("urn:throughline:problem:{kind}"));
    assert_eq!(problem["traceId"], span.span_context.trace_id().to_string());
    let traceparent = head.headers["traceparent"].to_str().expect("text");
    assert!(traceparent.contains(&span.span_context.span_id().to_string()));
    assert_eq!(attribute(&span, "error.type").as_str(), error_type);
    assert_eq!(attribute(&span, "http.response.status_code"), &Value::I64(i64::from(status)));
    assert_eq!(span.status, SpanStatus::error(""));
}

#[tokio::test]
async fn a_handler_runs_inside_of_the_span_and_of_the_deadline() {
    let app = layered(
        Router::new().route(
            "/inside",
            get(async || {
                let remaining = Deadline::current().expect("a deadline").remaining();
                assert!(remaining <= LIMITS.deadline && !remaining.is_zero());
                Context::current().span().span_context().span_id().to_string()
            }),
        ),
        LIMITS,
    );
    let answer = app.oneshot(request("/inside")).await.unwrap();
    let body = axum::body::to_bytes(answer.into_body(), 100).await.unwrap();
    assert_eq!(body, span("GET /inside").span_context.span_id().to_string());
}

#[tokio::test]
async fn a_panic_is_an_answer_closes_its_span_and_frees_its_place() {
    let limits = router::RequestLimits { max_in_flight: 1, ..LIMITS };
    let routes = Router::new()
        .route("/panic", get(async || -> &'static str { panic!("on purpose") }))
        .route("/after-panic", get(async || "served"));
    let app = layered(routes, limits);
    let answer = app.clone().oneshot(request("/panic")).await.unwrap();
    assert_refused(answer, "GET /panic", 500, "internal", "panic").await;
    assert_eq!(app.oneshot(request("/after-panic")).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_takes_too_long_is_dropped_and_the_caller_told() {
    let app = layered(Router::new().route("/hang", get(pending::<&str>)), LIMITS);
    let began = tokio::time::Instant::now();
    let answer = app.oneshot(request("/hang")).await.unwrap();
    assert_eq!(began.elapsed().as_secs(), LIMITS.deadline.as_secs());
    assert_refused(answer, "GET /hang", 504, "deadline-exceeded", "deadline_exceeded").await;
}

#[tokio::test]
async fn what_is_one_too_many_is_refused_in_a_span_and_never_seen_by_a_handler() {
    let limits = router::RequestLimits { max_in_flight: 1, deadline: Duration::from_secs(3600) };
    let release = Arc::new(Notify::new());
    let released = release.clone();
    let routes = Router::new()
        .route("/busy", get(async move || released.notified().await))
        .route("/one-too-many", get(async || -> &'static str { unreachable!("refused before") }));
    let app = layered(routes, limits);
    let busy = tokio::spawn(app.clone().oneshot(request("/busy")));
    tokio::task::yield_now().await;
    let answer = app.clone().oneshot(request("/one-too-many")).await.unwrap();
    assert_refused(answer, "GET /one-too-many", 503, "overloaded", "overloaded").await;
    release.notify_one();
    assert_eq!(busy.await.unwrap().unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn of_layers_in_a_row_the_first_listed_sees_a_request_first_and_its_answer_last() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = |what: &'static str| {
        let seen = seen.clone();
        move || seen.lock().expect("no panic while the lock is held").push(what)
    };
    let (first, first_back) = (log("first"), log("first, back"));
    let (second, second_back) = (log("second"), log("second, back"));
    let handler = log("handler");
    let routes = Router::new().route("/order", get(async move || handler())).layer(
        ServiceBuilder::new()
            .map_request(move |request: Request<Body>| {
                first();
                request
            })
            .map_response(move |response: Response| {
                first_back();
                response
            })
            .map_request(move |request: Request<Body>| {
                second();
                request
            })
            .map_response(move |response: Response| {
                second_back();
                response
            }),
    );
    layered(routes, LIMITS).oneshot(request("/order")).await.unwrap();
    assert_eq!(
        *seen.lock().expect("no panic while the lock is held"),
        ["first", "second", "handler", "second, back", "first, back"]
    );
}

type Seen = Arc<Mutex<Vec<HeaderMap>>>;

/// Makes a client with api's layers around a channel. The channel keeps the headers that reach it, and
/// answers with `outcome`.
fn client(
    outcome: impl Fn(usize) -> Code + Clone + Send + 'static,
    limits: usercenter::CallLimits,
) -> (Seen, UsercenterClient<Layered<impl Channel>>) {
    LazyLock::force(&ENDED);
    let seen = Seen::default();
    let kept = seen.clone();
    let channel = service_fn(move |request: Request<tonic::body::Body>| {
        let mut kept = kept.lock().expect("no panic while the lock is held");
        kept.push(request.headers().clone());
        let answer = Status::new(outcome(kept.len()), "").into_http::<tonic::body::Body>();
        async { Ok::<_, Infallible>(answer) }
    });
    let endpoint = "http://127.0.0.1:50051".parse().expect("a URL");
    (seen, UsercenterClient::new(usercenter::in_layers(&endpoint, limits, channel)))
}

/// The bounds that tonic requires of a channel.
trait Channel:
    Service<
        Request<tonic::body::Body>,
        Response = http::Response<tonic::body::Body>,
        Error = Infallible,
        Future: Send,
    > + Clone
    + Send
    + 'static
{
}

impl<S> Channel for S where
    S: Service<
            Request<tonic::body::Body>,
            Response = http::Response<tonic::body::Body>,
            Error = Infallible,
            Future: Send,
        > + Clone
        + Send
        + 'static
{
}

#[tokio::test(start_paused = true)]
async fn a_client_has_one_span_around_all_attempts_and_one_deadline() {
    let limits = usercenter::CallLimits {
        timeout: Duration::from_secs(2),
        attempts: 3,
        circuit_pause: Duration::from_secs(1),
    };
    let outcome = |attempt| if attempt < 3 { Code::Unavailable } else { Code::NotFound };
    let (seen, mut client) = client(outcome, limits);
    let lookup = GetUserByMobileRequest { mobile: "13800138000".to_owned() };
    assert_eq!(client.get_user_by_mobile(lookup).await.unwrap_err().code(), Code::NotFound);

    let span = span("usercenter.v1.Usercenter/GetUserByMobile");
    assert_eq!(span.span_kind, SpanKind::Client);
    assert_eq!(span.events.iter().filter(|event| event.name == "retry").count(), 2);
    let id = span.span_context.span_id().to_string();
    let seen = seen.lock().expect("no panic while the lock is held");
    // Retries are inside the span, so each attempt carries the span's id. Retries are also inside the
    // deadline, so each attempt has less time than the attempt before it.
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|headers| headers["traceparent"].to_str().unwrap().contains(&id)), "{seen:?}");
    let micros = |headers: &HeaderMap| {
        let timeout = headers["grpc-timeout"].to_str().unwrap();
        timeout.strip_suffix('u').and_then(|micros| micros.parse::<u64>().ok()).expect("microseconds")
    };
    assert!(seen.iter().map(micros).is_sorted_by(|earlier, later| earlier > later), "{seen:?}");
}
