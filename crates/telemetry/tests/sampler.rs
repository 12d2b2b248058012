//! Tests that a sampler can base its decision on the attributes of a request. The test has its own process,
//! because tracers are global.

use axum::{Router, body::Body, routing::get};
use http::{Request, Response};
use opentelemetry::{
    Context, KeyValue, global,
    trace::{Link, SpanKind, TraceContextExt, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{SamplingDecision, SamplingResult, SdkTracerProvider, ShouldSample};
use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto, ServiceDescriptorProto};
use std::convert::Infallible;
use telemetry::{
    grpc::{GrpcClientLayer, GrpcServerLayer},
    http::HttpServerLayer,
};
use tower::{Layer, ServiceExt, service_fn};

const HTTP: [(&str, &str); 4] = [
    ("http.request.method", "GET"),
    ("url.path", "/users"),
    ("url.scheme", "http"),
    ("server.address", "example.org"),
];
const GRPC: [(&str, &str); 3] =
    [("rpc.system.name", "grpc"), ("rpc.method", "test.Users/Get"), ("server.address", "example.org")];

/// Samples a span if it has all attributes of one of the lists above when it starts.
#[derive(Debug, Clone)]
struct ByAttributes;

impl ShouldSample for ByAttributes {
    fn should_sample(
        &self,
        _: Option<&Context>,
        _: TraceId,
        _: &str,
        _: &SpanKind,
        attributes: &[KeyValue],
        _: &[Link],
    ) -> SamplingResult {
        let has = |(name, value): &(&str, &str)| {
            attributes.iter().any(|of| of.key.as_str() == *name && of.value.as_str() == *value)
        };
        let decision = match HTTP.iter().all(has) || GRPC.iter().all(has) {
            true => SamplingDecision::RecordAndSample,
            false => SamplingDecision::Drop,
        };
        SamplingResult { decision, attributes: Vec::new(), trace_state: TraceState::default() }
    }
}

/// Returns whether the current span is sampled.
fn is_sampled() -> bool {
    Context::current().span().span_context().is_sampled()
}

#[tokio::test]
async fn a_sampler_sees_the_attributes_of_a_request() {
    global::set_tracer_provider(SdkTracerProvider::builder().with_sampler(ByAttributes).build());

    let app: Router =
        Router::new().route("/{page}", get(async || is_sampled().to_string())).layer(HttpServerLayer::new());
    for (path, sampled) in [("users", "true"), ("other", "false")] {
        let request = Request::get(format!("http://example.org/{path}")).body(Body::empty()).unwrap();
        let response = app.clone().oneshot(request).await.unwrap();
        assert_eq!(axum::body::to_bytes(response.into_body(), 10).await.unwrap(), sampled, "{path}");
    }

    let method = |name: &str| MethodDescriptorProto { name: Some(name.to_owned()), ..Default::default() };
    let service = ServiceDescriptorProto {
        name: Some("Users".to_owned()),
        method: vec![method("Get"), method("Other")],
        ..Default::default()
    };
    let file = FileDescriptorProto {
        package: Some("test".to_owned()),
        service: vec![service],
        ..Default::default()
    };
    let descriptors = FileDescriptorSet { file: vec![file] }.encode_to_vec();
    let answer = service_fn(async |_: Request<tonic::body::Body>| {
        Ok::<_, Infallible>(
            Response::builder().header("sampled", is_sampled().to_string()).body(String::new()).unwrap(),
        )
    });
    let server = GrpcServerLayer::new(&descriptors).layer(answer);
    let client = GrpcClientLayer::new(&"http://example.org".parse().unwrap()).layer(answer);
    for (path, sampled) in [("Get", "true"), ("Other", "false")] {
        let request = || {
            let uri = format!("http://example.org/test.Users/{path}");
            Request::post(uri).body(tonic::body::Body::empty()).unwrap()
        };
        let by_server = server.clone().oneshot(request()).await.unwrap();
        assert_eq!(by_server.headers()["sampled"], sampled, "server, {path}");
        let by_client = client.clone().oneshot(request()).await.unwrap();
        assert_eq!(by_client.headers()["sampled"], sampled, "client, {path}");
    }
}
