//! Tests each layer around a small service, in memory.

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use resilience::{
    CallDeadlineLayer, CatchPanicLayer, Circuit, CircuitBreakerLayer, CircuitOpen, Deadline, DeadlineLayer,
    InFlight, Rejection, RetryLayer, ShedLayer, UnaryLayer,
};
use std::{
    convert::Infallible,
    future::{pending, ready},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use telemetry::ErrorType;
use tokio::time::Instant;
use tonic::{Code, Status};
use tower::{BoxError, Layer, Service, ServiceExt, service_fn};

const SECOND: Duration = Duration::from_secs(1);

fn request(path: &str) -> Request<()> {
    Request::post(path).body(()).expect("a request")
}

/// Makes the answer to a request that a layer rejects. The body of the answer is the reason.
fn refusal(why: Rejection) -> Response<&'static str> {
    Response::new(why.error_type())
}

fn error_type(answer: &Response<&str>) -> Option<&'static str> {
    answer.extensions().get::<ErrorType>().map(|error_type| error_type.0)
}

/// A service that is never ready.
struct Unready;

impl<R> Service<Request<R>> for Unready {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _: Request<R>) -> Self::Future {
        unreachable!("the service is not ready")
    }
}

#[test]
fn a_layer_is_ready_when_the_service_inside_is() {
    fn is_ready<R>(mut service: impl Service<Request<R>>) -> bool {
        service.ready().now_or_never().is_some()
    }
    let answer = |_| Response::new(Empty::new());
    assert!(!is_ready::<()>(CatchPanicLayer::new(answer).layer(Unready)));
    assert!(!is_ready::<()>(ShedLayer::new(InFlight::at_most(1), answer).layer(Unready)));
    assert!(!is_ready::<()>(DeadlineLayer::new(SECOND, answer).layer(Unready)));
    assert!(!is_ready(UnaryLayer.layer(Unready)));
}

#[tokio::test]
async fn a_panic_before_or_after_the_first_await_is_answered() {
    let served = service_fn(|request: Request<()>| {
        assert_ne!(request.uri(), "/at-once", "on purpose");
        async move {
            tokio::task::yield_now().await;
            assert_ne!(request.uri(), "/later", "on purpose");
            Ok::<_, Infallible>(Response::new("served"))
        }
    });
    for (path, body, why) in
        [("/at-once", "panic", Some("panic")), ("/later", "panic", Some("panic")), ("/", "served", None)]
    {
        let answer = CatchPanicLayer::new(refusal).layer(served).oneshot(request(path)).await.unwrap();
        assert_eq!((*answer.body(), error_type(&answer)), (body, why), "{path}");
    }
}

#[tokio::test]
async fn one_request_too_many_is_refused_until_another_is_answered() {
    let served = service_fn(|request: Request<()>| async move {
        if request.uri() == "/waits" {
            pending::<()>().await;
        }
        Ok::<_, Infallible>(Response::new("served"))
    });
    let mut shed = ShedLayer::new(InFlight::at_most(1), refusal).layer(served);
    let mut body = async |path| *shed.call(request(path)).await.unwrap().body();
    assert_eq!(body("/").await, "served");
    let waits = ShedLayer::new(InFlight::at_most(1), refusal);
    let (mut one, mut other) = (waits.layer(served), waits.layer(served));
    let waiting = one.call(request("/waits"));
    let refused = other.call(request("/")).await.unwrap();
    assert_eq!((*refused.body(), error_type(&refused)), ("overloaded", Some("overloaded")));
    assert_eq!(*other.call(request("/grpc.health.v1.Health/Check")).await.unwrap().body(), "served");
    drop(waiting);
    assert_eq!(*other.call(request("/")).await.unwrap().body(), "served");
}

#[tokio::test(start_paused = true)]
async fn a_handler_has_the_time_of_the_layer_and_of_a_grpc_caller() {
    let times = async |layer: DeadlineLayer<fn(Rejection) -> Response<&'static str>>, timeout| {
        let waits = service_fn(|_: Request<()>| pending::<Result<Response<&str>, Infallible>>());
        let mut request = request("/");
        request.headers_mut().insert("grpc-timeout", http::HeaderValue::from_static(timeout));
        let start = Instant::now();
        let answer = layer.layer(waits).oneshot(request).await.unwrap();
        assert_eq!((*answer.body(), error_type(&answer)), ("deadline_exceeded", Some("deadline_exceeded")));
        start.elapsed()
    };
    // tokio's timer counts whole milliseconds.
    let almost =
        |time: Duration, expected: u64| (expected..=expected + 1).contains(&(time.as_millis() as u64));
    assert!(almost(times(DeadlineLayer::grpc(SECOND, refusal), "100m").await, 97));
    assert!(almost(times(DeadlineLayer::grpc(SECOND, refusal), "2S").await, 1000));
    assert!(almost(times(DeadlineLayer::new(SECOND, refusal), "100m").await, 1000));
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_deadline() {
    let client = service_fn(|request: Request<()>| async move {
        let remaining = Deadline::current().map(Deadline::remaining);
        if request.uri() == "/waits" {
            pending::<()>().await;
        }
        Ok::<_, Status>(Response::new(remaining))
    });
    let mut client = CallDeadlineLayer::new(SECOND).layer(client);
    assert_eq!(*client.call(request("/")).await.unwrap().body(), Some(SECOND));
    let late = client.call(request("/waits")).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded);
}

#[tokio::test(start_paused = true)]
async fn the_circuit_opens_for_statuses_that_show_that_the_server_does_not_work() {
    for code in (0..17).map(Code::from_i32) {
        let circuit = Circuit::new("test", SECOND, SECOND);
        let calls = Arc::new(AtomicU32::new(0));
        let counted = calls.clone();
        let server = service_fn(move |_: Request<()>| {
            counted.fetch_add(1, Relaxed);
            ready(if code == Code::Ok { Ok(Response::new(())) } else { Err(Status::new(code, "")) })
        });
        let client = CircuitBreakerLayer::new(circuit).layer(server);
        for _ in 0..20 {
            let outcome = client.clone().oneshot(request("/")).await;
            assert_eq!(outcome.err().map_or(Code::Ok, |status| status.code()), code);
        }
        let outcome = client.oneshot(request("/")).await;
        let refused = outcome.as_ref().err().and_then(|status| CircuitOpen::of(status));
        let opens = matches!(
            code,
            Code::Unknown | Code::DeadlineExceeded | Code::Internal | Code::Unavailable | Code::DataLoss
        );
        assert_eq!(refused.map(|open| open.retry_after), opens.then_some(SECOND), "{code:?}");
        assert_eq!(calls.load(Relaxed), if opens { 20 } else { 21 }, "{code:?}");
        if opens {
            assert_eq!(outcome.unwrap_err().code(), Code::Unavailable);
        }
    }
}

/// Calls a server through the [`UnaryLayer`]. The server gives this answer. Returns the answer's message.
async fn unary(
    answer: Response<impl http_body::Body<Data = Bytes, Error = BoxError> + Send + 'static>,
) -> Result<Bytes, Status> {
    let mut answer = Some(answer);
    let server = service_fn(move |_: Request<tonic::body::Body>| {
        ready(Ok::<_, BoxError>(answer.take().expect("one call")))
    });
    let request = Request::post("/Service/Method").body(Bytes::from_static(b"question")).expect("a request");
    UnaryLayer.layer(server).oneshot(request).await.map(|answer| answer.into_body().to_bytes())
}

/// Returns an answer with this HTTP status, these headers, a message of this length, and these trailers.
fn answer(
    status: u16,
    headers: &[(&'static str, &'static [u8])],
    length: usize,
    trailers: &[(&'static str, &'static [u8])],
) -> Response<impl http_body::Body<Data = Bytes, Error = BoxError> + Send + use<>> {
    let map = |fields: &[(&'static str, &'static [u8])]| -> HeaderMap {
        let field = |(name, value): &(&'static str, &[u8])| {
            (http::HeaderName::from_static(name), http::HeaderValue::from_bytes(value).expect("a value"))
        };
        fields.iter().map(field).collect()
    };
    let trailers = (!trailers.is_empty()).then(|| Ok(map(trailers)));
    let body = Full::new(Bytes::from(vec![b'a'; length])).with_trailers(ready(trailers));
    let mut answer = Response::new(body.map_err(BoxError::from));
    *answer.status_mut() = StatusCode::from_u16(status).expect("a status");
    *answer.headers_mut() = map(headers);
    answer
}

#[tokio::test]
async fn a_status_is_read_from_trailers_or_headers_or_else_from_http() {
    const OK: (&str, &[u8]) = ("grpc-status", b"0");
    const NOT_FOUND: (&str, &[u8]) = ("grpc-status", b"5");
    const LONGEST: usize = 4 * 1024 * 1024;

    for (name, answer, expected) in [
        ("in the trailers", answer(200, &[], 3, &[OK]), Ok(3)),
        ("a failure in the trailers", answer(200, &[], 3, &[NOT_FOUND]), Err(Code::NotFound)),
        ("a failure in the trailers after an OK", answer(200, &[OK], 3, &[NOT_FOUND]), Err(Code::NotFound)),
        ("in the headers", answer(200, &[OK], 0, &[]), Ok(0)),
        ("a failure in the headers", answer(200, &[NOT_FOUND], 0, &[]), Err(Code::NotFound)),
        (
            "with a message",
            answer(200, &[NOT_FOUND, ("grpc-message", b"caf%E9")], 0, &[]),
            Err(Code::NotFound),
        ),
        ("no status", answer(200, &[], 3, &[]), Err(Code::Unknown)),
        ("no status, HTTP 413", answer(413, &[], 0, &[]), Err(Code::OutOfRange)),
        ("no status, HTTP 431", answer(431, &[], 0, &[]), Err(Code::OutOfRange)),
        ("no status, HTTP 503", answer(503, &[], 0, &[]), Err(Code::Unavailable)),
        ("the longest message", answer(200, &[], LONGEST, &[OK]), Ok(LONGEST)),
        ("a longer message", answer(200, &[], LONGEST + 1, &[OK]), Err(Code::OutOfRange)),
    ] {
        let outcome = unary(answer).await;
        assert_eq!(outcome.map(|message| message.len()).map_err(|status| status.code()), expected, "{name}");
    }
}

#[tokio::test]
async fn the_message_and_the_details_of_a_status_are_left_out() {
    let fields: [(&str, &[u8]); 3] =
        [("grpc-status", b"0"), ("grpc-message", b"caf%E9"), ("grpc-status-details-bin", b"?")];
    let server = service_fn(move |_: Request<tonic::body::Body>| {
        ready(Ok::<_, BoxError>(answer(200, &fields, 1, &fields)))
    });
    let request = Request::post("/").body(Bytes::new()).unwrap();
    let answer = UnaryLayer.layer(server).oneshot(request).await.unwrap();
    let trailers = answer.body().trailers().unwrap();
    for names in [answer.headers().keys(), trailers.keys()] {
        assert_eq!(names.collect::<Vec<_>>(), ["grpc-status"]);
    }
}

#[tokio::test(start_paused = true)]
async fn the_server_is_told_the_time_left_and_an_error_of_the_channel_is_a_status() {
    let server = service_fn(|request: Request<tonic::body::Body>| {
        assert_eq!(request.headers()["grpc-timeout"], "1000000u");
        ready(Err::<Response<Empty<Bytes>>, BoxError>("on purpose".into()))
    });
    let _attached = Deadline::within(SECOND).context().attach();
    let failed = UnaryLayer.layer(server).oneshot(Request::new(Bytes::new())).await.unwrap_err();
    assert_eq!(failed.code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn only_what_is_idempotent_and_found_nobody_is_called_again_and_always_with_the_whole_request() {
    let calls = Arc::new(AtomicU32::new(0));
    let client = |code| {
        let calls = calls.clone();
        calls.store(0, Relaxed);
        RetryLayer::new(&["/Service/Read"], 3).layer(service_fn(move |request: Request<Bytes>| {
            calls.fetch_add(1, Relaxed);
            let (head, body) = request.into_parts();
            assert_eq!(
                (head.method, head.version, &body[..]),
                (http::Method::POST, http::Version::HTTP_2, &b"?"[..])
            );
            assert_eq!(head.headers["te"], "trailers");
            ready(Err::<Response<()>, _>(Status::new(code, head.uri.path())))
        }))
    };
    for (path, code, expected) in [
        ("/Service/Read", Code::Unavailable, 3),
        ("/Service/Write", Code::Unavailable, 1),
        ("/Service/Read", Code::Internal, 1),
    ] {
        let request = Request::post(path).version(http::Version::HTTP_2).header("te", "trailers");
        let request = request.body(Full::new(Bytes::from_static(b"?"))).unwrap();
        let failed = client(code).oneshot(request).await.unwrap_err();
        assert_eq!((failed.code(), failed.message()), (code, path));
        assert_eq!(calls.load(Relaxed), expected, "{path} {code:?}");
    }
}
