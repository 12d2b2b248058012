//! OTLP's receiving side, over [gRPC](grpc) and over [HTTP](http), with gzip or without. What is done with
//! the spans is the [`Sink`]'s business: the backend's store, or the tests' receiver.

mod decode;
mod grpc;
mod http;

pub(crate) use self::{grpc::serve as serve_grpc, http::routes as http_routes};

use super::Rejected;
use ::http::HeaderMap;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tonic::Status;

/// The largest request, compressed or not: a batch of 512 spans has some hundred kilobytes.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Where the spans go.
pub(crate) trait Sink: Clone + Send + Sync + 'static {
    /// Takes the spans of a request with these headers; says which it does not want, or refuses all.
    fn take(&self, headers: HeaderMap, request: ExportTraceServiceRequest) -> Result<Rejected, Status>;
}

fn response(rejected: &Rejected) -> ExportTraceServiceResponse {
    // A field that is there says that something is wrong, even with zero rejected spans.
    let partial_success = (rejected.spans > 0).then(|| ExportTracePartialSuccess {
        rejected_spans: i64::try_from(rejected.spans).unwrap_or(i64::MAX),
        error_message: format!("of the first span: {}", rejected.reason),
    });
    ExportTraceServiceResponse { partial_success }
}
