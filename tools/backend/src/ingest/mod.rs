//! Receives OTLP over gRPC and HTTP, with gzip, zstd or no compression. A [`Sink`] accepts the received
//! signals. The sink is the backend's store, or the store of the receiver for tests.

mod decode;
mod grpc;
mod http;
mod lenient;

pub use self::grpc::serve as serve_grpc;
pub(crate) use self::http::routes as http_routes;

use super::Rejected;
use ::http::HeaderMap;
use opentelemetry_proto::tonic::collector::{
    logs::v1::{ExportLogsServiceRequest, logs_service_server},
    metrics::v1::{ExportMetricsServiceRequest, metrics_service_server},
    trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server,
    },
};
use prost::Message;
use serde::de::DeserializeOwned;
use tonic::Status;

/// The largest size of a request in bytes, both before and after it is decompressed. A batch of 512 spans has
/// a few hundred kilobytes.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Accepts the received signals. Each method gets a request with its headers, and returns how many items are
/// rejected, or an error if the whole request is refused.
pub trait Sink: Clone + Send + Sync + 'static {
    /// Accepts spans.
    ///
    /// # Errors
    /// If the sink refuses the request.
    fn traces(&self, headers: HeaderMap, request: ExportTraceServiceRequest) -> Result<Rejected, Status>;

    /// Accepts data points. The default implementation drops them.
    ///
    /// # Errors
    /// If the sink refuses the request.
    fn metrics(&self, _: HeaderMap, _: ExportMetricsServiceRequest) -> Result<Rejected, Status> {
        Ok(Rejected::default())
    }

    /// Accepts log records. The default implementation drops them.
    ///
    /// # Errors
    /// If the sink refuses the request.
    fn logs(&self, _: HeaderMap, _: ExportLogsServiceRequest) -> Result<Rejected, Status> {
        Ok(Rejected::default())
    }
}

/// An export request of one of the signals.
trait Export: Message + Default + DeserializeOwned + 'static {
    /// The signal's path in OTLP/HTTP.
    const PATH: &'static str;
    /// The signal's service name in OTLP/gRPC.
    const SERVICE: &'static str;
    /// The JSON name of the field that holds the number of rejected items.
    const REJECTED: &'static str;
    /// The messages that the request may contain.
    const KIND: &'static decode::Kind;

    fn give(self, sink: &impl Sink, headers: HeaderMap) -> Result<Rejected, Status>;
}

impl Export for ExportTraceServiceRequest {
    const PATH: &'static str = "/v1/traces";
    const SERVICE: &'static str = trace_service_server::SERVICE_NAME;
    const REJECTED: &'static str = "rejectedSpans";
    const KIND: &'static decode::Kind = &decode::TRACES;

    fn give(self, sink: &impl Sink, headers: HeaderMap) -> Result<Rejected, Status> {
        sink.traces(headers, self)
    }
}

impl Export for ExportMetricsServiceRequest {
    const PATH: &'static str = "/v1/metrics";
    const SERVICE: &'static str = metrics_service_server::SERVICE_NAME;
    const REJECTED: &'static str = "rejectedDataPoints";
    const KIND: &'static decode::Kind = &decode::METRICS;

    fn give(self, sink: &impl Sink, headers: HeaderMap) -> Result<Rejected, Status> {
        sink.metrics(headers, self)
    }
}

impl Export for ExportLogsServiceRequest {
    const PATH: &'static str = "/v1/logs";
    const SERVICE: &'static str = logs_service_server::SERVICE_NAME;
    const REJECTED: &'static str = "rejectedLogRecords";
    const KIND: &'static decode::Kind = &decode::LOGS;

    fn give(self, sink: &impl Sink, headers: HeaderMap) -> Result<Rejected, Status> {
        sink.logs(headers, self)
    }
}

/// Returns the response for any signal. In protobuf, the responses of the three signals differ only in their
/// names.
fn response(rejected: &Rejected) -> ExportTraceServiceResponse {
    // If no items are rejected, the field must be missing. A present field, even one with zero rejected
    // items, would say that something is wrong.
    let partial_success = (rejected.count > 0).then(|| ExportTracePartialSuccess {
        rejected_spans: i64::try_from(rejected.count).unwrap_or(i64::MAX),
        error_message: format!("the first rejected item: {}", rejected.reason),
    });
    ExportTraceServiceResponse { partial_success }
}
