//! Tests that every way in which a request can end also ends its span. The test has its own process, because
//! tracers are global.

use axum::{Router, body::Body, routing::get};
use futures_util::stream;
use http::Request;
use http_body_util::BodyExt;
use opentelemetry::{Context, Value, global, trace::SpanKind};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SdkTracerProvider, Span, SpanData, SpanProcessor},
};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};
use telemetry::http::HttpServerLayer;
use tokio::task;
use tower::ServiceExt;

/// Keeps the spans that ended.
#[derive(Debug, Default, Clone)]
struct Ended(Arc<Mutex<Vec<SpanData>>>);

impl SpanProcessor for Ended {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.lock().expect("no panic while the lock is held").push(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl Ended {
    /// Returns the name of the only span that ended since the last call, and its `error.type` if it has one.
    fn one(&self) -> (String, Option<String>) {
        let spans: Vec<_> = self.0.lock().expect("no panic while the lock is held").drain(..).collect();
        let [span] = &spans[..] else { panic!("{spans:#?}") };
        assert_eq!(span.span_kind, SpanKind::Server);
        let error = span.attributes.iter().find(|attribute| attribute.key.as_str() == "error.type");
        let error = error.map(|attribute| match &attribute.value {
            Value::String(value) => value.to_string(),
            other => panic!("{other:?}"),
        });
        (span.name.to_string(), error)
    }

    fn none(&self) {
        assert!(self.0.lock().expect("no panic while the lock is held").is_empty());
    }
}

fn request(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).expect("a request")
}

async fn file() -> ([(&'static str, &'static str); 1], Body) {
    let parts = ["ten ", "bytes."].map(Ok::<_, Infallible>);
    ([("content-length", "10")], Body::from_stream(stream::iter(parts)))
}

#[tokio::test]
async fn every_end_of_a_request_ends_its_span_once() {
    let ended = Ended::default();
    global::set_tracer_provider(SdkTracerProvider::builder().with_span_processor(ended.clone()).build());
    let app: Router = Router::new()
        .route("/answer", get(async || "answer"))
        .route("/file", get(file))
        .route("/fail", get(async || http::StatusCode::INTERNAL_SERVER_ERROR))
        .route("/panic", get(async || -> &'static str { panic!("on purpose") }))
        .route("/hang", get(async || std::future::pending::<&'static str>().await))
        .layer(HttpServerLayer::new());

    // The span ends with the last byte of the body, not when the handler returns.
    let response = app.clone().oneshot(request("/answer")).await.unwrap();
    ended.none();
    axum::body::to_bytes(response.into_body(), 100).await.unwrap();
    assert_eq!(ended.one(), ("GET /answer".to_owned(), None));

    // The answer has a `content-length`. hyper would not poll the body again after the last byte, so the span
    // must end with this byte.
    let response = app.clone().oneshot(request("/file")).await.unwrap();
    let mut body = response.into_body();
    body.frame().await.unwrap().unwrap();
    ended.none();
    body.frame().await.unwrap().unwrap();
    assert_eq!(ended.one(), ("GET /file".to_owned(), None));
    drop(body);
    ended.none();

    // Nobody reads this body to its end.
    drop(app.clone().oneshot(request("/answer")).await.unwrap());
    assert_eq!(ended.one(), ("GET /answer".to_owned(), Some("cancelled".to_owned())));

    // This answer has no body.
    let response = app.clone().oneshot(request("/fail")).await.unwrap();
    assert_eq!(ended.one(), ("GET /fail".to_owned(), Some("500".to_owned())));
    drop(response);
    ended.none();

    // This handler panics, and the layer passes the panic on.
    let panicking = task::spawn(app.clone().oneshot(request("/panic")));
    assert!(panicking.await.unwrap_err().is_panic());
    assert_eq!(ended.one(), ("GET /panic".to_owned(), Some("panic".to_owned())));

    // This caller hangs up before there is an answer.
    let hanging = task::spawn(app.clone().oneshot(request("/hang")));
    task::yield_now().await;
    ended.none();
    hanging.abort();
    assert!(hanging.await.unwrap_err().is_cancelled());
    assert_eq!(ended.one(), ("GET /hang".to_owned(), Some("cancelled".to_owned())));

    // No route has this path.
    drop(app.oneshot(request("/13800138000")).await.unwrap());
    assert_eq!(ended.one(), ("GET".to_owned(), None));
}
