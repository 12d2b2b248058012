//! The attributes of a call in server spans and metrics.

use super::GrpcServerLayer;
use crate::{
    headers::{peer_attributes, server_attributes},
    metrics::Measurement,
    redaction::without_long_numbers,
    semconv::{self, OTHER},
};
use http::Request;
use opentelemetry::{
    Context, KeyValue,
    global::BoxedSpan,
    trace::{SpanBuilder, SpanKind, Tracer},
};
use tonic::transport::server::TcpConnectInfo;

impl GrpcServerLayer {
    /// Returns the name of the called method, or `_OTHER` if the method is unknown.
    fn method<B>(&self, request: &Request<B>) -> &str {
        let path = request.uri().path().trim_start_matches('/');
        self.methods.get(path).map_or(OTHER, String::as_str)
    }

    pub(super) fn measure<B>(&self, request: &Request<B>) -> Option<Measurement> {
        let duration = self.duration.as_ref()?;
        let method = KeyValue::new(semconv::RPC_METHOD, self.method(request).to_owned());
        Some(Measurement::start(duration, vec![KeyValue::new(semconv::RPC_SYSTEM_NAME, "grpc"), method]))
    }

    pub(super) fn start_span<B>(&self, request: &Request<B>, parent: &Context) -> BoxedSpan {
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
