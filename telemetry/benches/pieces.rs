//! What the pieces cost: `cargo bench -p telemetry`.
//!
//! Each is beside what it is compared with: the SDK's propagator, the published exporter's conversion,
//! the same service without a layer.

use axum::{Router, body::Body, routing::get};
use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, Request};
use opentelemetry::{
    Context, KeyValue, global,
    propagation::TextMapPropagator,
    trace::{Span, SpanKind, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator as Stock,
    trace::{Sampler, SdkTracerProvider, SpanData, SpanProcessor},
};
use std::{
    hint::black_box,
    sync::{Arc, Mutex},
    time::Duration,
};
use telemetry::{
    bench::SpanEncoder,
    http::{Headers, HeadersMut, HttpServerLayer},
    propagation::TraceContextPropagator,
};
use tower::ServiceExt;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn propagators(c: &mut Criterion) {
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", HeaderValue::from_static(TRACEPARENT));
    let empty = Context::new();
    let cx = TraceContextPropagator.extract_with_context(&empty, &Headers(&headers));

    let mut group = c.benchmark_group("W3C extract");
    group.bench_function("strict", |b| {
        b.iter(|| TraceContextPropagator.extract_with_context(&empty, &Headers(&headers)))
    });
    group.bench_function("SDK", |b| b.iter(|| Stock::new().extract_with_context(&empty, &Headers(&headers))));
    group.finish();

    let mut group = c.benchmark_group("W3C inject");
    group.bench_function("strict", |b| {
        b.iter(|| TraceContextPropagator.inject_context(&cx, &mut HeadersMut(&mut headers)))
    });
    group.bench_function("SDK", |b| {
        b.iter(|| Stock::new().inject_context(&cx, &mut HeadersMut(&mut headers)))
    });
    group.finish();
}

/// Keeps the last span that ended.
#[derive(Debug, Default, Clone)]
struct Keep(Arc<Mutex<Option<SpanData>>>);

impl SpanProcessor for Keep {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        *self.0.lock().expect("no panic while it is held") = Some(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

fn encoding(c: &mut Criterion) {
    let kept = Keep::default();
    let provider = SdkTracerProvider::builder().with_span_processor(kept.clone()).build();
    let tracer = provider.tracer("bench");
    let mut span = tracer
        .span_builder("usercenter.v1.Usercenter/GetUserByMobile")
        .with_kind(SpanKind::Client)
        .start(&tracer);
    for (key, value) in [
        ("rpc.system.name", "grpc"),
        ("rpc.method", "usercenter.v1.Usercenter/GetUserByMobile"),
        ("server.address", "127.0.0.1"),
        ("rpc.status_code", "OK"),
        ("network.peer.address", "127.0.0.1"),
    ] {
        span.set_attribute(KeyValue::new(key, value));
    }
    span.set_attribute(KeyValue::new("server.port", 50051));
    span.end();
    let span = kept.0.lock().expect("no panic while it is held").take().expect("the span has ended");

    let mut group = c.benchmark_group("encode a span");
    let mut encoder = SpanEncoder::default();
    group.bench_function("direct", |b| b.iter(|| encoder.encode(black_box(&span)).len()));
    let resource = Resource::builder_empty().build();
    let resource =
        opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema::from(&resource);
    group.bench_function("by the published exporter's structures", |b| {
        b.iter(|| {
            use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
            use prost::Message;
            let spans = group_spans_by_resource_and_scope(vec![black_box(&span).clone()], &resource);
            spans[0].encode_to_vec().len()
        });
    });
    group.finish();
}

fn http_layer(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let plain = || Router::new().route("/", get(async || "answer"));
    let mut group = c.benchmark_group("an axum request");
    let mut measure = |name, app: Router| {
        group.bench_function(name, |b| {
            b.iter(|| {
                runtime.block_on(async {
                    let request = Request::get("/")
                        .header("host", "127.0.0.1:8888")
                        .body(Body::empty())
                        .expect("a request");
                    let response = app.clone().oneshot(request).await.expect("infallible");
                    axum::body::to_bytes(response.into_body(), 1024).await.expect("a body")
                })
            });
        });
    };
    measure("no layer", plain());
    global::set_text_map_propagator(TraceContextPropagator);
    measure("layer, SDK disabled", plain().layer(HttpServerLayer::new()));
    global::set_tracer_provider(SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOff).build());
    measure("layer, sampled off", plain().layer(HttpServerLayer::new()));
    let recording = SdkTracerProvider::builder().with_span_processor(Keep::default()).build();
    global::set_tracer_provider(recording);
    measure("layer, recording", plain().layer(HttpServerLayer::new()));
    group.finish();
}

/// That there is a span must be asked before its attributes are made.
fn contexts(c: &mut Criterion) {
    let provider = SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOff).build();
    let tracer = provider.tracer("bench");
    c.bench_function("a span that is not sampled", |b| {
        b.iter(|| Context::new().with_span(tracer.start("span")).span().is_recording())
    });
}

criterion_group!(pieces, propagators, encoding, http_layer, contexts);
criterion_main!(pieces);
