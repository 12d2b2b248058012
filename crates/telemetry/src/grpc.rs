//! gRPC: a client layer and a server layer, which make the spans of every call.
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

mod request;
mod span;

pub use grpc_protocol::code_name;
pub use span::{GrpcSpan, cause};

use crate::{
    ErrorType,
    body::TracedBody,
    headers::{Headers, HeadersMut},
    metrics::{self, Measurement},
    scope::{layers_meter, layers_tracer},
    semconv,
};
use grpc_protocol::transport_status;
use http::{Request, Response, Uri};
use http_body::Body;
use http_body_util::BodyExt;
use opentelemetry::{
    Context, KeyValue,
    context::FutureExt,
    global::BoxedTracer,
    metrics::Histogram,
    trace::{SpanBuilder, SpanKind, Status as SpanStatus, TraceContextExt, Tracer},
};
use prost::Message;
use std::{
    collections::HashSet,
    error::Error,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{self, Poll},
};
use tonic::{Code, Status};
use tower::{Layer, Service};

/// Opens a CLIENT span for each call, named `{package.Service}/{Method}`.
#[derive(Clone)]
pub struct GrpcClientLayer {
    tracer: Arc<BoxedTracer>,
    /// The address and the port of the server, as configured.
    server: (Arc<str>, u16),
    duration: Option<Histogram<f64>>,
}

/// Makes the histogram `rpc.client.call.duration` or `rpc.server.call.duration` (semantic conventions 1.45),
/// if metrics are exported.
fn duration_histogram(name: &'static str) -> Option<Histogram<f64>> {
    metrics::are_exported().then(|| metrics::duration_histogram(&layers_meter(), name))
}

impl GrpcClientLayer {
    /// Makes a layer for a channel to `endpoint`. Make it after [`crate::Telemetry::start`].
    pub fn new(endpoint: &Uri) -> Self {
        let address = endpoint.host().unwrap_or_default().trim_matches(['[', ']']).into();
        let default_port = if endpoint.scheme_str() == Some("https") { 443 } else { 80 };
        let port = endpoint.port_u16().unwrap_or(default_port);
        Self {
            tracer: Arc::new(layers_tracer()),
            server: (address, port),
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
        let GrpcClientLayer { tracer, server: (address, port), duration } = self.layer.clone();
        let parent = Context::current();
        let method = request.uri().path().trim_start_matches('/').to_owned();
        let mut attributes = Vec::with_capacity(8);
        attributes.extend([
            KeyValue::new(semconv::RPC_SYSTEM_NAME, "grpc"),
            KeyValue::new(semconv::RPC_METHOD, method.clone()),
            KeyValue::new(semconv::SERVER_ADDRESS, address.clone()),
            KeyValue::new(semconv::SERVER_PORT, i64::from(port)),
        ]);
        let measured = duration.as_ref().map(|duration| Measurement::start(duration, attributes.clone()));
        let builder = SpanBuilder::from_name(method).with_kind(SpanKind::Client).with_attributes(attributes);
        let span = tracer.build_with_context(builder, &parent);
        let cx = crate::with_span(&parent, span);
        crate::inject(&cx, &mut HeadersMut(request.headers_mut()));
        let span = GrpcSpan::new(cx.clone(), SpanKind::Client, request.headers(), measured);
        let peer = crate::peer(&address, port.into());

        let response = {
            let _attached = cx.clone().attach();
            self.inner.call(request)
        };
        Box::pin(async move {
            match response.with_context(cx).await {
                Ok(response) => {
                    // The peer is set only now, because a call that this side refuses contacts no server.
                    span.cx.span().set_attributes(peer);
                    Ok(span.respond(response))
                }
                Err(error) => {
                    let status = transport_status(error.into());
                    let description = match cause(&status) {
                        Some(cause) => format!("connect to {address}:{port}: {cause}"),
                        None => status.message().to_owned(),
                    };
                    // `end` sets an error without a description, but the span keeps this description.
                    span.cx.span().set_status(SpanStatus::error(description));
                    span.end(status.code(), ErrorType::of(&status));
                    Err(status)
                }
            }
        })
    }
}

/// Opens a SERVER span for each call, named `{package.Service}/{Method}`, or `grpc` if the method is unknown.
///
/// Calls to gRPC's own services (`grpc.health.*`, `grpc.reflection.*`) make no span.
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
        Self { tracer: Arc::new(layers_tracer()), methods: Arc::new(methods), duration }
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
        let breaks_off = broke_off.clone();
        let watch = move |error| {
            breaks_off.store(true, Relaxed);
            error
        };
        let request = request.map(|body| tonic::body::Body::new(body.map_err(watch)));

        let response = {
            let _attached = cx.clone().attach();
            self.inner.call(request)
        };
        Box::pin(async move {
            match response.with_context(cx).await {
                // If the message breaks off, tonic answers INTERNAL, but the caller is gone and never gets
                // it. So the span is dropped without an outcome, which ends it as a cancelled or late call.
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
