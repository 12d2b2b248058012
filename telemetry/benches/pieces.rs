//! What the pieces cost: `cargo bench -p telemetry`.
//!
//! Each is beside what it is compared with: the SDK's propagator, the same service without a layer.

use axum::{Router, body::Body, routing::get};
use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, Request};
use opentelemetry::{
    Context, global,
    propagation::TextMapPropagator,
    trace::{TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    propagation::TraceContextPropagator as Stock,
    trace::{Sampler, SdkTracerProvider, SpanData, SpanProcessor},
};
use std::time::Duration;
use telemetry::{
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

/// Drops each span that ends, where an exporter would take it.
#[derive(Debug)]
struct Drops;

impl SpanProcessor for Drops {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

    fn on_end(&self, _: SpanData) {}

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
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
    let recording = SdkTracerProvider::builder().with_span_processor(Drops).build();
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

criterion_group!(pieces, propagators, http_layer, contexts);
criterion_main!(pieces);
