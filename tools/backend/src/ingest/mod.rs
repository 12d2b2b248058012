//! OTLP's receiving side, over gRPC and over HTTP, with gzip, zstd or neither. What is done
//! with the signals is the [`Sink`]'s business: the backend's store, or the tests' receiver.

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

/// The largest request, compressed or not: a batch of 512 spans has some hundred kilobytes.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Where the signals go. A method takes a request with its headers; it says how many items it does not
/// want, or refuses all.
pub trait Sink: Clone + Send + Sync + 'static {
    /// Takes spans.
    ///
    /// # Errors
    /// If it refuses the request.
    fn traces(&self, headers: HeaderMap, request: ExportTraceServiceRequest) -> Result<Rejected, Status>;

    /// Takes data points; by default it drops them.
    ///
    /// # Errors
    /// If it refuses the request.
    fn metrics(&self, _: HeaderMap, _: ExportMetricsServiceRequest) -> Result<Rejected, Status> {
        Ok(Rejected::default())
    }

    /// Takes log records; by default it drops them.
    ///
    /// # Errors
    /// If it refuses the request.
    fn logs(&self, _: HeaderMap, _: ExportLogsServiceRequest) -> Result<Rejected, Status> {
        Ok(Rejected::default())
    }
}

/// A request of one of the signals.
trait Export: Message + Default + DeserializeOwned + 'static {
    /// Its path in OTLP/HTTP.
    const PATH: &'static str;
    /// Its service in OTLP/gRPC.
    const SERVICE: &'static str;
    /// The JSON name of the number of items that were rejected.
    const REJECTED: &'static str;
    /// What is in its message.
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

/// The answer to any signal: in protobuf, the answers differ in nothing but their names.
fn response(rejected: &Rejected) -> ExportTraceServiceResponse {
    // A field that is there says that something is wrong, even with zero rejected items.
    let partial_success = (rejected.count > 0).then(|| ExportTracePartialSuccess {
        rejected_spans: i64::try_from(rejected.count).unwrap_or(i64::MAX),
        error_message: format!("the first of them: {}", rejected.reason),
    });
    ExportTraceServiceResponse { partial_success }
}
