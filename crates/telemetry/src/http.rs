//! HTTP: a layer on the axum router, which makes the server span of every request.
//!
//! ```
//! # use axum::{Router, routing::get};
//! use telemetry::http::HttpServerLayer;
//!
//! let app: Router = Router::new()
//!     .route("/users/{id}", get(|| async { "traced" }))
//!     .layer(HttpServerLayer::new())
//!     .route("/healthz", get(|| async { "added after the layer, so not traced" }));
//! ```
//!
//! Attributes and status are those of semantic conventions 1.45, HTTP server spans. The span
//! continues the caller's trace. The response carries the span's id in the header `traceparent`, so that
//! `curl -i` shows which trace to look up.

mod request;

use crate::{
    ErrorType,
    body::{AwaitsBody, BodyEnd, TracedBody},
    headers::{Headers, TRACEPARENT},
    metrics,
    scope::layers_tracer,
    semconv::{self, CANCELLED, OTHER, PANIC},
};
use axum::extract::MatchedPath;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body;
use opentelemetry::{
    Context, KeyValue, StringValue,
    context::FutureExt,
    global::{BoxedSpan, BoxedTracer},
    trace::{SpanBuilder, SpanKind, Status, TraceContextExt, Tracer},
};
use request::{Measured, Metrics, known_method, request_attributes};
use std::{
    borrow::Cow,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
    thread,
};
use tower::{Layer, Service};

/// Opens a SERVER span for each request, named `{method} {route}`.
///
/// Mount the layer with [`axum::Router::layer`], because the matched route is known there. Make it after
/// [`crate::Telemetry::start`], which sets the tracer that the layer uses.
#[derive(Clone)]
pub struct HttpServerLayer {
    tracer: Arc<BoxedTracer>,
    metrics: Option<Metrics>,
}

impl HttpServerLayer {
    /// Makes a layer that uses the current global tracer provider.
    #[expect(clippy::new_without_default, reason = "it reads global state, which no default should do")]
    pub fn new() -> Self {
        let metrics = metrics::are_exported().then(Metrics::new);
        Self { tracer: Arc::new(layers_tracer()), metrics }
    }
}

impl<S> Layer<S> for HttpServerLayer {
    type Service = HttpServer<S>;

    fn layer(&self, inner: S) -> HttpServer<S> {
        HttpServer { inner, layer: self.clone() }
    }
}

/// A service wrapped in the [`HttpServerLayer`].
#[derive(Clone)]
pub struct HttpServer<S> {
    inner: S,
    layer: HttpServerLayer,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for HttpServer<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Future: Send + 'static,
    ResBody: Body,
{
    type Response = Response<TracedBody<ResBody, HttpServerSpan>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let parent = crate::extract(&Headers(request.headers()));
        let cx = crate::with_span(&parent, start_span(&self.layer.tracer, &request, &parent));
        let span = HttpServerSpan {
            cx: cx.clone(),
            is_head: request.method() == Method::HEAD,
            measured: self.layer.metrics.as_ref().map(|metrics| Measured::start(metrics, &request)),
            outcome: None,
        };

        let response = {
            let _attached = cx.clone().attach();
            self.inner.call(request)
        };
        Box::pin(async move {
            match response.with_context(cx).await {
                Ok(response) => Ok(span.respond(response)),
                Err(error) => {
                    span.end(Err(OTHER));
                    Err(error)
                }
            }
        })
    }
}

fn start_span<B>(tracer: &BoxedTracer, request: &Request<B>, parent: &Context) -> BoxedSpan {
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let name = match (method, route) {
        (Some(method), Some(route)) => format!("{method} {route}").into(),
        (None, Some(route)) => format!("HTTP {route}").into(),
        (Some(method), None) => Cow::Borrowed(method),
        (None, None) => Cow::Borrowed("HTTP"),
    };
    // Samplers see the attributes that a span has from its start.
    let builder = SpanBuilder::from_name(name)
        .with_kind(SpanKind::Server)
        .with_attributes(request_attributes(request, method, route));
    tracer.build_with_context(builder, parent)
}

/// A server span that ends with the response's body. If it is dropped before that, it ends with an error.
#[derive(Debug)]
pub struct HttpServerSpan {
    cx: Context,
    is_head: bool,
    measured: Option<Measured>,
    /// How the request ended: `Ok` after a whole response of any status, or `Err` with the `error.type`.
    outcome: Option<Result<(), &'static str>>,
}

impl HttpServerSpan {
    fn respond<B: Body>(mut self, mut response: Response<B>) -> Response<TracedBody<B, Self>> {
        let status = response.status();
        // A 4xx status is the caller's fault, so it is not an error of the server (HTTP spans, "Status").
        let error_type = status.is_server_error().then(|| match response.extensions().get::<ErrorType>() {
            Some(ErrorType(reason)) => StringValue::from(*reason),
            None => status.as_str().to_owned().into(),
        });
        if let Some(Measured { duration, .. }) = &mut self.measured {
            duration.set(semconv::HTTP_RESPONSE_STATUS_CODE, i64::from(status.as_u16()));
            if let Some(error_type) = &error_type {
                duration.set(semconv::ERROR_TYPE, error_type.clone());
            }
        }
        let span = self.cx.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new(semconv::HTTP_RESPONSE_STATUS_CODE, i64::from(status.as_u16())));
            if let Some(error_type) = error_type {
                span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, error_type));
                span.set_status(Status::error(""));
            }
        }
        if let Some(Ok(value)) = propagation::traceparent(&self.cx).map(HeaderValue::try_from) {
            response.headers_mut().insert(TRACEPARENT.clone(), value);
        }
        let length = response.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        // hyper doesn't poll the bodies of these responses.
        let has_no_body = self.is_head
            || status.is_informational()
            || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
            || length == Some(0)
            || response.body().is_end_stream();
        let span = if has_no_body {
            self.end(Ok(()));
            None
        } else {
            Some(self)
        };
        response.map(|body| TracedBody::new(body, span, length))
    }

    fn end(mut self, outcome: Result<(), &'static str>) {
        self.outcome = Some(outcome);
    }
}

impl AwaitsBody for HttpServerSpan {
    fn context(&self) -> &Context {
        &self.cx
    }

    fn end_of_body(self, end: BodyEnd<'_>) {
        self.end(match end {
            BodyEnd::Complete | BodyEnd::Trailers(_) => Ok(()),
            BodyEnd::Error => Err("body_error"),
        });
    }
}

/// Ends the span. If it has no outcome yet, the caller hung up, or the handler panicked.
impl Drop for HttpServerSpan {
    fn drop(&mut self) {
        let lost = if thread::panicking() { PANIC } else { CANCELLED };
        let span = self.cx.span();
        if let Err(error_type) = self.outcome.unwrap_or(Err(lost)) {
            span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, error_type));
            span.set_status(Status::error(""));
            if let Some(Measured { duration, .. }) = &mut self.measured {
                duration.set(semconv::ERROR_TYPE, error_type);
            }
        }
        if let Some(Measured { duration, .. }) = &self.measured {
            duration.record();
        }
        span.end();
    }
}
