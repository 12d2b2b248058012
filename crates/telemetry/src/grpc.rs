//! gRPC: the client span and the server span of every call, by a layer on either side.
//!
//! Both layers work on HTTP/2, below tonic, where a call's status is in the response's trailers, or in its
//! headers if there is no message. Attributes and status are those of semantic conventions 1.45, gRPC.
//!
//! ```no_run
//! # use tonic::transport::Endpoint;
//! use telemetry::grpc::{GrpcClientLayer, GrpcServerLayer};
//! use tower::{Layer, ServiceBuilder};
//!
//! # async fn client() {
//! let endpoint = Endpoint::from_static("http://127.0.0.1:50051");
//! let channel = GrpcClientLayer::new(endpoint.uri()).layer(endpoint.connect_lazy());
//! # }
//! # fn server(descriptors: &[u8]) {
//! let server = tonic::transport::Server::builder().layer(GrpcServerLayer::new(descriptors));
//! # }
//! ```

use crate::{
    ErrorType,
    body::{AwaitsBody, BodyEnd, TracedBody},
    headers::{Headers, HeadersMut, peer_attributes, server_attributes},
    metrics::{self, Measurement},
    redaction::without_long_numbers,
    semconv::{self, OTHER},
};
use bytes::Bytes;
pub use grpc_protocol::code_name;
use grpc_protocol::{GRPC_STATUS, code_of_http, parse_timeout, status_code, transport_status};
use http::{HeaderMap, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use opentelemetry::{
    Context, KeyValue,
    context::FutureExt,
    global::{BoxedSpan, BoxedTracer},
    metrics::Histogram,
    trace::{SpanBuilder, SpanKind, Status as SpanStatus, TraceContextExt, Tracer},
};
use pin_project_lite::pin_project;
use prost::Message;
use std::{
    collections::HashSet,
    error::Error,
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{self, Poll, ready},
    time::{Duration, Instant},
};
use tonic::{Code, Status, transport::server::TcpConnectInfo};
use tower::{Layer, Service};

/// Opens a CLIENT span for each call, named `{package.Service}/{Method}`.
#[derive(Clone)]
pub struct GrpcClientLayer {
    tracer: Arc<BoxedTracer>,
    server: Server,
    duration: Option<Histogram<f64>>,
}

/// Makes the histogram `rpc.client.call.duration` or `rpc.server.call.duration` (semantic conventions 1.45),
/// if metrics are exported.
fn duration_histogram(name: &'static str) -> Option<Histogram<f64>> {
    metrics::are_exported().then(|| metrics::duration_histogram(&metrics::meter(), name))
}

/// The address of the server, as configured.
#[derive(Clone)]
struct Server {
    address: Arc<str>,
    port: Option<u16>,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl GrpcClientLayer {
    /// Makes a layer for a channel to `endpoint`. Make it after [`crate::Telemetry::start`].
    pub fn new(endpoint: &Uri) -> Self {
        let address = endpoint.host().unwrap_or_default().trim_matches(['[', ']']).into();
        let default_port = if endpoint.scheme_str() == Some("https") { 443 } else { 80 };
        let port = Some(endpoint.port_u16().unwrap_or(default_port));
        Self {
            tracer: Arc::new(crate::layers_tracer()),
            server: Server { address, port },
            duration: duration_histogram("rpc.client.call.duration"),
        }
    }
}

impl<S> Layer<S> for GrpcClientLayer {
    type Service = GrpcClient<S>;

    fn layer(&self, inner: S) -> GrpcClient<S> {
        GrpcClient { inner, layer: self.clone() }
    }
}

/// A channel wrapped in the [`GrpcClientLayer`].
#[derive(Clone)]
pub struct GrpcClient<S> {
    inner: S,
    layer: GrpcClientLayer,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for GrpcClient<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    S::Future: Send + 'static,
    ResBody: Body,
{
    type Response = Response<TracedBody<ResBody, GrpcSpan>>;
    /// An error of the transport, converted to a gRPC status.
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), Status>> {
        self.inner.poll_ready(cx).map_err(|error| transport_status(error.into()))
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let GrpcClientLayer { tracer, server, duration } = &self.layer;
        let parent = Context::current();
        let method = request.uri().path().trim_start_matches('/').to_owned();
        let mut attributes = Vec::with_capacity(8);
        attributes.extend([
            KeyValue::new(semconv::RPC_SYSTEM_NAME, "grpc"),
            KeyValue::new(semconv::RPC_METHOD, method.clone()),
            KeyValue::new(semconv::SERVER_ADDRESS, server.address.clone()),
        ]);
        attributes.extend(server.port.map(|port| KeyValue::new(semconv::SERVER_PORT, i64::from(port))));
        let measured = duration.as_ref().map(|duration| Measurement::start(duration, attributes.clone()));
        let builder = SpanBuilder::from_name(method).with_kind(SpanKind::Client).with_attributes(attributes);
        let span = tracer.build_with_context(builder, &parent);
        let cx = crate::with_span(&parent, span);
        crate::inject(&cx, &mut HeadersMut(request.headers_mut()));
        let span = GrpcSpan::new(cx.clone(), SpanKind::Client, request.headers(), measured);
        let server = server.clone();
        let peer = server.port.map_or_else(Vec::new, |port| crate::peer(&server.address, port.into()));

        let response = {
            let _attached = cx.clone().attach();
            self.inner.call(request)
        };
        Box::pin(async move {
            match response.with_context(cx).await {
                Ok(response) => {
                    // A call that was refused on this side contacted nobody.
                    span.cx.span().set_attributes(peer);
                    Ok(span.respond(response))
                }
                Err(error) => {
                    let status = transport_status(error.into());
                    let description = match cause(&status) {
                        Some(cause) => format!("connect to {server}: {cause}"),
                        None => status.message().to_owned(),
                    };
                    // `end` sets no description, and of two errors a span keeps the one with a description.
                    span.cx.span().set_status(SpanStatus::error(description));
                    span.end(status.code(), ErrorType::of(&status));
                    Err(status)
                }
            }
        })
    }
}

/// Returns why a call did not reach its server, for example `Connection refused`; `None` if the status has no
/// cause on this side.
pub fn cause(status: &Status) -> Option<String> {
    let causes = std::iter::successors(status.source(), |&error| error.source());
    // An `ErrorType` is the span's `error.type` already.
    causes.filter(|cause| !cause.is::<ErrorType>()).last().map(ToString::to_string)
}

/// Opens a SERVER span for each call, named `{package.Service}/{Method}`, or `grpc` if the method is unknown.
///
/// Calls of gRPC's own services (`grpc.health.*`, `grpc.reflection.*`) make no span.
#[derive(Clone)]
pub struct GrpcServerLayer {
    tracer: Arc<BoxedTracer>,
    methods: Arc<HashSet<String>>,
    duration: Option<Histogram<f64>>,
}

impl GrpcServerLayer {
    /// `descriptors` is the encoded `FileDescriptorSet` of the services behind this layer, the same one that
    /// reflection needs. A caller can name any method, so a method that is not in the set counts as `_OTHER`.
    ///
    /// Make it after [`crate::Telemetry::start`].
    pub fn new(descriptors: &[u8]) -> Self {
        let files = prost_types::FileDescriptorSet::decode(descriptors).unwrap_or_default().file;
        let mut methods = HashSet::new();
        for file in &files {
            for service in &file.service {
                for method in &service.method {
                    let dot = if file.package().is_empty() { "" } else { "." };
                    methods.insert(format!("{}{dot}{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
        let duration = duration_histogram("rpc.server.call.duration");
        Self { tracer: Arc::new(crate::layers_tracer()), methods: Arc::new(methods), duration }
    }
}

impl<S> Layer<S> for GrpcServerLayer {
    type Service = GrpcServer<S>;

    fn layer(&self, inner: S) -> GrpcServer<S> {
        GrpcServer { inner, layer: self.clone() }
    }
}

/// A service wrapped in the [`GrpcServerLayer`].
#[derive(Clone)]
pub struct GrpcServer<S> {
    inner: S,
    layer: GrpcServerLayer,
}

impl<S, ResBody> Service<Request<tonic::body::Body>> for GrpcServer<S>
where
    S: Service<Request<tonic::body::Body>, Response = Response<ResBody>>,
    S::Future: Send + 'static,
    ResBody: Body,
{
    type Response = Response<TracedBody<ResBody, GrpcSpan>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        if request.uri().path().starts_with("/grpc.") {
            let response = self.inner.call(request);
            return Box::pin(async { Ok(response.await?.map(|body| TracedBody::new(body, None, None))) });
        }
        let parent = crate::extract(&Headers(request.headers()));
        let cx = crate::with_span(&parent, self.layer.start_span(&request, &parent));
        let span =
            GrpcSpan::new(cx.clone(), SpanKind::Server, request.headers(), self.layer.measure(&request));
        let broke_off = Arc::new(AtomicBool::new(false));
        let watch = |body| tonic::body::Body::new(WatchedBody { body, broke_off: broke_off.clone() });
        let request = request.map(watch);

        let response = {
            let _attached = cx.clone().attach();
            self.inner.call(request)
        };
        Box::pin(async move {
            match response.with_context(cx).await {
                // tonic answers INTERNAL to a message that breaks off. But the caller is gone, and does not hear
                // that. Without an outcome, the span ends as that of any other caller that is gone.
                Ok(response) if broke_off.load(Relaxed) => {
                    drop(span);
                    Ok(response.map(|body| TracedBody::new(body, None, None)))
                }
                Ok(response) => Ok(span.respond(response)),
                Err(error) => {
                    span.end(Code::Unknown, None);
                    Err(error)
                }
            }
        })
    }
}

pin_project! {
    /// The message of a call, which may break off because its caller cancels the call or is gone.
    struct WatchedBody {
        #[pin]
        body: tonic::body::Body,
        broke_off: Arc<AtomicBool>,
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(task));
        if let Some(Err(_)) = &frame {
            this.broke_off.store(true, Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl GrpcServerLayer {
    /// Returns the name of the called method, or `_OTHER` if the method is unknown.
    fn method<B>(&self, request: &Request<B>) -> &str {
        let path = request.uri().path().trim_start_matches('/');
        self.methods.get(path).map_or(OTHER, String::as_str)
    }

    fn measure<B>(&self, request: &Request<B>) -> Option<Measurement> {
        let duration = self.duration.as_ref()?;
        let method = KeyValue::new(semconv::RPC_METHOD, self.method(request).to_owned());
        Some(Measurement::start(duration, vec![KeyValue::new(semconv::RPC_SYSTEM_NAME, "grpc"), method]))
    }

    fn start_span<B>(&self, request: &Request<B>, parent: &Context) -> BoxedSpan {
        let path = request.uri().path().trim_start_matches('/');
        let method = self.method(request);
        let name = if method == OTHER { "grpc" } else { method };
        let mut attributes = Vec::with_capacity(12);
        attributes.extend([
            KeyValue::new(semconv::RPC_SYSTEM_NAME, "grpc"),
            KeyValue::new(semconv::RPC_METHOD, method.to_owned()),
        ]);
        if method == OTHER {
            let original = without_long_numbers(&path.chars().take(200).collect::<String>());
            attributes.push(KeyValue::new(semconv::RPC_METHOD_ORIGINAL, original));
        }
        if let Some(authority) = request.uri().authority() {
            attributes.extend(server_attributes(authority));
        }
        let connection = request.extensions().get::<TcpConnectInfo>();
        if let Some(peer) = connection.and_then(TcpConnectInfo::remote_addr) {
            attributes.extend(peer_attributes(peer));
        }
        let builder =
            SpanBuilder::from_name(name.to_owned()).with_kind(SpanKind::Server).with_attributes(attributes);
        self.tracer.build_with_context(builder, parent)
    }
}

/// The span of a call, on either side. It ends when the status is known. If it is dropped before that, the
/// call was cancelled or has passed its deadline.
#[derive(Debug)]
pub struct GrpcSpan {
    cx: Context,
    kind: SpanKind,
    deadline: Option<Instant>,
    /// The status that counts if the answer turns out to have no gRPC status.
    status: Code,
    measured: Option<Measurement>,
    /// The status of the call, and why this side refused it, if it did.
    outcome: Option<(Code, Option<ErrorType>)>,
}

impl GrpcSpan {
    fn new(cx: Context, kind: SpanKind, request: &HeaderMap, measured: Option<Measurement>) -> Self {
        let timeout = request.get("grpc-timeout").and_then(|value| parse_timeout(value.to_str().ok()?));
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Self { cx, kind, deadline, status: Code::Unknown, measured, outcome: None }
    }

    fn respond<B: Body>(mut self, response: Response<B>) -> Response<TracedBody<B, Self>> {
        self.status = code_of_http(response.status());
        // Without a message, the gRPC status is in the headers. If this isn't gRPC at all, the HTTP status
        // counts.
        let only_headers = response.headers().contains_key(GRPC_STATUS) || response.body().is_end_stream();
        let span = if only_headers {
            let reason = response.extensions().get::<ErrorType>().copied();
            let code = status_code(response.headers()).unwrap_or(self.status);
            self.end(code, reason);
            None
        } else {
            Some(self)
        };
        response.map(|body| TracedBody::new(body, span, None))
    }

    fn end(mut self, code: Code, reason: Option<ErrorType>) {
        self.outcome = Some((code, reason));
    }
}

impl AwaitsBody for GrpcSpan {
    fn context(&self) -> &Context {
        &self.cx
    }

    fn end_of_body(self, end: BodyEnd<'_>) {
        let code = match end {
            BodyEnd::Trailers(trailers) => status_code(trailers),
            // A stream that ends without a status broke off, or isn't gRPC.
            BodyEnd::Complete | BodyEnd::Error => None,
        };
        let code = code.unwrap_or(self.status);
        self.end(code, None);
    }
}

/// Ends the span. A client that refuses a call has no status from a server, so its reason is the error's type.
/// A server's error has its status as type, and the reason as description.
impl Drop for GrpcSpan {
    fn drop(&mut self) {
        let (code, reason) = self.outcome.unwrap_or_else(|| {
            // The timer that drops a span at its deadline is exact to a millisecond, and was started a little
            // earlier.
            let expired = self.deadline.is_some_and(|deadline| deadline <= Instant::now() + TIMER_SLACK);
            (if expired { Code::DeadlineExceeded } else { Code::Cancelled }, None)
        });
        let name = code_name(code);
        let (error_type, description) = match reason {
            Some(ErrorType(reason)) if self.kind == SpanKind::Client => (reason, ""),
            Some(ErrorType(reason)) if !reason.eq_ignore_ascii_case(name) => (name, reason),
            _ => (name, ""),
        };
        let error_type = is_error(code, &self.kind).then_some(error_type);
        if let Some(measured) = &mut self.measured {
            measured.set(semconv::RPC_STATUS_CODE, name);
            if let Some(error_type) = error_type {
                measured.set(semconv::ERROR_TYPE, error_type);
            }
            measured.record();
        }
        let span = self.cx.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new(semconv::RPC_STATUS_CODE, name));
            if let Some(error_type) = error_type {
                span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, error_type));
                span.set_status(SpanStatus::error(description));
            }
        }
        span.end();
    }
}

const TIMER_SLACK: Duration = Duration::from_millis(5);

/// Whether a status is an error. For a client every status but OK is one; for a server, only its own faults
/// are.
fn is_error(code: Code, kind: &SpanKind) -> bool {
    match code {
        Code::Ok => false,
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => true,
        _ => *kind == SpanKind::Client,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_to_blame_for_some_codes_a_client_sees_all_as_errors() {
        let server_errors = [2, 4, 12, 13, 14, 15];
        for code in 0..=16 {
            assert_eq!(is_error(Code::from(code), &SpanKind::Server), server_errors.contains(&code));
            assert_eq!(is_error(Code::from(code), &SpanKind::Client), code != 0);
        }
    }
}
