//! HTTP: the server span of every request, by a layer on the axum router.
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
//! Attributes and status are those of semantic conventions 1.45, HTTP server spans. The caller's trace
//! is continued; the response carries the span's id in the header `traceparent`, so that `curl -i` leads
//! to the trace.

use crate::{
    ErrorType,
    body::{AwaitsBody, BodyEnd, TracedBody},
    config::KNOWN_METHODS_VARIABLE,
    headers::{Headers, TRACEPARENT, peer_attributes, server_attributes},
    metrics::{self, Measurement},
    redaction::{user_agent, without_long_numbers},
    semconv::{self, CANCELLED, OTHER, PANIC},
};
use axum::extract::{ConnectInfo, MatchedPath};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body::Body;
use opentelemetry::{
    Context, KeyValue, StringValue, Value,
    context::FutureExt,
    global::{BoxedSpan, BoxedTracer},
    metrics::{Histogram, UpDownCounter},
    trace::{SpanBuilder, SpanKind, Status, TraceContextExt, Tracer},
};
use std::{
    borrow::Cow,
    env,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{self, Poll},
    thread,
};
use tower::{Layer, Service};

/// Opens a SERVER span for each request, named `{method} {route}`.
///
/// Mount it with [`axum::Router::layer`], because the matched route is known there. Make it after
/// [`crate::Telemetry::start`], because it uses the tracer that is set there.
#[derive(Clone)]
pub struct HttpServerLayer {
    tracer: Arc<BoxedTracer>,
    metrics: Option<Metrics>,
}

/// The metrics `http.server.*` of semantic conventions 1.45. Values that a caller can choose freely, such as
/// a path or a host, are not among their attributes.
#[derive(Clone)]
struct Metrics {
    duration: Histogram<f64>,
    active: UpDownCounter<i64>,
}

impl HttpServerLayer {
    /// Makes a layer that uses the current global tracer provider.
    #[expect(clippy::new_without_default, reason = "it reads global state, which a default should not")]
    pub fn new() -> Self {
        let metrics = metrics::are_exported().then(|| {
            let meter = metrics::meter();
            Metrics {
                duration: metrics::duration_histogram(&meter, "http.server.request.duration"),
                active: meter
                    .i64_up_down_counter("http.server.active_requests")
                    .with_unit("{request}")
                    .build(),
            }
        });
        Self { tracer: Arc::new(crate::layers_tracer()), metrics }
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

fn request_attributes<B>(
    request: &Request<B>,
    method: Option<&'static str>,
    route: Option<&str>,
) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(16);
    let mut set = |key: &'static str, value: Value| attributes.push(KeyValue::new(key, value));

    set(semconv::HTTP_REQUEST_METHOD, method.unwrap_or(OTHER).into());
    if method.is_none() {
        set(semconv::HTTP_REQUEST_METHOD_ORIGINAL, without_long_numbers(request.method().as_str()).into());
    }
    if let Some(route) = route {
        set(semconv::HTTP_ROUTE, route.to_owned().into());
    }
    // The query is left out, because personal data and secrets are often sent there by mistake.
    set(semconv::URL_PATH, without_long_numbers(request.uri().path()).into());
    set(
        semconv::URL_SCHEME,
        request.uri().scheme_str().map_or("http".into(), |scheme| scheme.to_owned().into()),
    );
    if let Some(agent) = request.headers().get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()) {
        set(semconv::USER_AGENT_ORIGINAL, user_agent(agent).into());
    }
    if let Some(version) = protocol_version(request.version()) {
        set(semconv::NETWORK_PROTOCOL_VERSION, version.into());
    }
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let authority = request.uri().authority().map(|authority| authority.as_str()).or(host);
    if let Some(authority) = authority.and_then(|authority| authority.parse::<http::uri::Authority>().ok()) {
        attributes.extend(server_attributes(&authority));
    }
    if let Some(ConnectInfo(peer)) = request.extensions().get::<ConnectInfo<SocketAddr>>() {
        attributes.extend(peer_attributes(*peer));
    }
    attributes
}

/// A server span that ends with the response's body. If it is dropped before that, it ends with an error.
#[derive(Debug)]
pub struct HttpServerSpan {
    cx: Context,
    is_head: bool,
    measured: Option<Measured>,
    /// How the request ended. An error has its `error.type`; the status of a response tells the rest.
    outcome: Option<Result<(), &'static str>>,
}

/// Measures one request, which counts as active until this is dropped.
#[derive(Debug)]
struct Measured {
    duration: Measurement,
    active: UpDownCounter<i64>,
    of_active: [KeyValue; 2],
}

impl Measured {
    fn start<B>(metrics: &Metrics, request: &Request<B>) -> Self {
        let scheme = if request.uri().scheme_str() == Some("https") { "https" } else { "http" };
        let of_active = [
            KeyValue::new(semconv::HTTP_REQUEST_METHOD, known_method(request.method()).unwrap_or(OTHER)),
            KeyValue::new(semconv::URL_SCHEME, scheme),
        ];
        metrics.active.add(1, &of_active);
        let mut duration = Measurement::start(&metrics.duration, of_active.to_vec());
        if let Some(route) = request.extensions().get::<MatchedPath>() {
            duration.set(semconv::HTTP_ROUTE, route.as_str().to_owned());
        }
        if let Some(version) = protocol_version(request.version()) {
            duration.set(semconv::NETWORK_PROTOCOL_VERSION, version);
        }
        Self { duration, active: metrics.active.clone(), of_active }
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.active.add(-1, &self.of_active);
    }
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

/// The methods of RFC 9110, PATCH of RFC 5789, and QUERY.
const KNOWN_METHODS: &str = "CONNECT,DELETE,GET,HEAD,OPTIONS,PATCH,POST,PUT,QUERY,TRACE";

/// Returns the name of a known method. Any other method is reported as `_OTHER`, because callers can invent
/// methods.
fn known_method(method: &Method) -> Option<&'static str> {
    static KNOWN: LazyLock<Vec<String>> = LazyLock::new(|| {
        let list = env::var(KNOWN_METHODS_VARIABLE).ok().filter(|list| !list.trim().is_empty());
        let list = list.as_deref().unwrap_or(KNOWN_METHODS);
        list.split(',').map(|method| method.trim().to_owned()).collect()
    });
    KNOWN.iter().map(String::as_str).find(|known| *known == method.as_str())
}

fn protocol_version(version: Version) -> Option<&'static str> {
    Some(match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_11 => "1.1",
        Version::HTTP_2 => "2",
        _ => return None,
    })
}
