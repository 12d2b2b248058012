//! An OTLP receiver of traces, metrics and logs, over gRPC and HTTP, for tests. It keeps everything it
//! receives, so a test sees what a service really exported. It also accepts Zipkin's JSON.

use crate::{
    Rejected, conventions, ingest,
    ingest::Sink,
    log::{self, LogRecord},
    metric::{self, Metric},
    trace::{self, Span},
};
use anyhow::Result;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use loopback::{PATIENCE, background::Background, poll};
use opentelemetry_proto::tonic::collector::{
    logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
    trace::v1::ExportTraceServiceRequest,
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tonic::Status;

/// A running receiver. It stops when this value is dropped.
pub struct Receiver {
    /// The address for OTLP/gRPC.
    pub grpc: SocketAddr,
    /// The address for OTLP/HTTP (`/v1/traces`, `/v1/metrics`, `/v1/logs`) and Zipkin (`/api/v2/spans`).
    pub http: SocketAddr,
    store: Store,
    _runtime: Background,
}

#[derive(Clone, Default)]
struct Store(Arc<Mutex<Received>>);

#[derive(Default)]
struct Received {
    spans: Vec<Span>,
    metrics: Vec<Metric>,
    logs: Vec<LogRecord>,
    faults: BTreeSet<String>,
    zipkin: Vec<Value>,
    /// The headers of each request with spans, including gRPC metadata.
    requests: Vec<HeaderMap>,
    metrics_requests: Vec<HeaderMap>,
    logs_requests: Vec<HeaderMap>,
    /// The refusals with which the receiver answers the next requests with spans. Afterwards, such requests
    /// succeed again.
    refusals: Vec<Refusal>,
}

/// A response to a request with spans that is an error or a partial success.
#[derive(Debug, Clone, Copy)]
pub enum Refusal {
    /// UNAVAILABLE or 503, so the client should retry.
    Unavailable,
    /// INVALID_ARGUMENT or 400, so the client should not retry.
    Invalid,
    /// A partial success: one span is rejected, and should not be sent again.
    OneSpan,
}

impl Receiver {
    /// Listens on free ports.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn start() -> Result<Self> {
        Self::start_at("127.0.0.1:0".parse()?).await
    }

    /// Listens for gRPC at this address, and for HTTP on a free port.
    ///
    /// # Errors
    /// If the address is in use.
    pub async fn start_at(grpc: SocketAddr) -> Result<Self> {
        let store = Store::default();
        let runtime = Background::start(1, 1)?;
        let grpc = runtime.listen(grpc)?;
        let http = runtime.listen("127.0.0.1:0".parse()?)?;
        let addresses = (grpc.local_addr()?, http.local_addr()?);

        let router = ingest::http_routes(store.clone())
            .merge(Router::new().route("/api/v2/spans", post(zipkin)).with_state(store.clone()));
        runtime.spawn(ingest::serve_grpc(grpc, store.clone()));
        runtime.serve_http(http, router);
        Ok(Self { grpc: addresses.0, http: addresses.1, store, _runtime: runtime })
    }

    /// Returns all spans received so far.
    pub fn spans(&self) -> Vec<Span> {
        self.store.lock().spans.clone()
    }

    /// Returns the spans of a trace received so far.
    pub fn trace(&self, trace_id: &str) -> Vec<Span> {
        self.store.lock().spans.iter().filter(|span| span.trace_id == trace_id).cloned().collect()
    }

    /// Returns the spans received as Zipkin's JSON.
    pub fn zipkin(&self) -> Vec<Value> {
        self.store.lock().zipkin.clone()
    }

    /// Returns all data points received so far, in the order of their arrival. The last point of a series is
    /// its latest.
    pub fn metrics(&self) -> Vec<Metric> {
        self.store.lock().metrics.clone()
    }

    /// Returns all log records received so far.
    pub fn logs(&self) -> Vec<LogRecord> {
        self.store.lock().logs.clone()
    }

    /// Returns how the spans, metrics and log records received so far break the [`conventions`].
    pub fn faults(&self) -> BTreeSet<String> {
        self.store.lock().faults.clone()
    }

    /// Returns the headers of each request with spans.
    pub fn requests(&self) -> Vec<HeaderMap> {
        self.store.lock().requests.clone()
    }

    /// Returns the headers of each request with metrics.
    pub fn metrics_requests(&self) -> Vec<HeaderMap> {
        self.store.lock().metrics_requests.clone()
    }

    /// Returns the headers of each request with logs.
    pub fn logs_requests(&self) -> Vec<HeaderMap> {
        self.store.lock().logs_requests.clone()
    }

    /// Refuses the next requests that contain spans, one request for each of these refusals. Requests with
    /// metrics or logs still succeed.
    pub fn refuse(&self, refusals: impl IntoIterator<Item = Refusal>) {
        self.store.lock().refusals.extend(refusals);
    }

    /// Waits until a trace looks like `expected` (see [`trace::tree`]), and returns its spans. Blank lines in
    /// `expected`, and indentation that all of its lines share, are ignored. `remote_parent` is the span id
    /// that the caller sent, or empty.
    ///
    /// # Panics
    /// If the trace does not look like `expected` in time. The message shows the trace.
    pub async fn expect_tree_below(&self, remote_parent: &str, trace_id: &str, expected: &str) -> Vec<Span> {
        let expected = trace::dedent(expected);
        let seen = poll(PATIENCE, async || {
            let spans = self.trace(trace_id);
            (trace::tree(&spans, remote_parent) == expected).then_some(spans)
        });
        match seen.await {
            Some(spans) => spans,
            None => panic!(
                "trace {trace_id}\nexpected:\n{expected}\nreceived:\n{}",
                trace::tree(&self.trace(trace_id), remote_parent)
            ),
        }
    }

    /// Does the same as [`Receiver::expect_tree_below`] for a trace that starts in the service.
    pub async fn expect_tree(&self, trace_id: &str, expected: &str) -> Vec<Span> {
        self.expect_tree_below("", trace_id, expected).await
    }

    /// Waits for a log record that `wanted` accepts, and returns the first such log record.
    ///
    /// # Panics
    /// If no such log record arrives in time.
    pub async fn expect_log(&self, wanted: impl Fn(&LogRecord) -> bool) -> LogRecord {
        let seen = poll(PATIENCE, async || self.logs().into_iter().find(|record| wanted(record)));
        match seen.await {
            Some(record) => record,
            None => panic!("no such log record among:\n{:#?}", self.logs()),
        }
    }

    /// Waits for a span that `wanted` accepts, and returns the first such span.
    ///
    /// # Panics
    /// If no such span arrives in time.
    pub async fn expect_span(&self, wanted: impl Fn(&Span) -> bool) -> Span {
        let seen = poll(PATIENCE, async || self.spans().into_iter().find(|span| wanted(span)));
        match seen.await {
            Some(span) => span,
            None => panic!("no such span among:\n{}", trace::tree(&self.spans(), "")),
        }
    }
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, Received> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Store {
    fn traces(&self, headers: HeaderMap, request: ExportTraceServiceRequest) -> Result<Rejected, Status> {
        let mut received = self.lock();
        received.requests.push(headers);
        if !received.refusals.is_empty() {
            return match received.refusals.remove(0) {
                Refusal::Unavailable => Err(Status::unavailable("refused")),
                Refusal::Invalid => Err(Status::invalid_argument("refused")),
                Refusal::OneSpan => Ok(Rejected { count: 1, reason: "refused" }),
            };
        }
        received.faults.extend(conventions::of_traces(&request));
        received.spans.extend(request.resource_spans.iter().flat_map(trace::spans));
        Ok(Rejected::default())
    }

    fn metrics(&self, headers: HeaderMap, request: ExportMetricsServiceRequest) -> Result<Rejected, Status> {
        let mut received = self.lock();
        received.metrics_requests.push(headers);
        received.faults.extend(conventions::of_metrics(&request));
        received.metrics.extend(request.resource_metrics.iter().flat_map(metric::metrics));
        Ok(Rejected::default())
    }

    fn logs(&self, headers: HeaderMap, request: ExportLogsServiceRequest) -> Result<Rejected, Status> {
        let mut received = self.lock();
        received.logs_requests.push(headers);
        received.faults.extend(conventions::of_logs(&request));
        received.logs.extend(request.resource_logs.iter().flat_map(log::records));
        Ok(Rejected::default())
    }
}

async fn zipkin(State(store): State<Store>, body: Bytes) -> StatusCode {
    let Ok(Value::Array(spans)) = serde_json::from_slice(&body) else {
        return StatusCode::BAD_REQUEST;
    };
    store.lock().zipkin.extend(spans);
    StatusCode::ACCEPTED
}
