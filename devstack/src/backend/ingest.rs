//! OTLP's receiving side: gRPC, HTTP with protobuf and HTTP with JSON, each with gzip or without. What is
//! done with the spans is the [`Sink`]'s business: the backend's store, or the tests' receiver.

use super::store::Rejected;
use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
    routing::post,
};
use flate2::read::MultiGzDecoder;
use http::{HeaderMap, StatusCode, header};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use prost::Message;
use serde_json::json;
use std::{borrow::Cow, io::Read};
use tokio::net::TcpListener;
use tonic::{Code, Request, Status, codec::CompressionEncoding, transport::server::TcpIncoming};
use tower::util::MapResponseLayer;

/// The largest request, compressed or not: a batch of 512 spans has some hundred kilobytes.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Where the spans go.
pub(crate) trait Sink: Clone + Send + Sync + 'static {
    /// Takes the spans of a request with these headers; says which it does not want, or refuses all.
    fn take(&self, headers: HeaderMap, request: ExportTraceServiceRequest) -> Result<Rejected, Status>;
}

/// Serves OTLP/gRPC until the runtime ends.
pub(crate) async fn serve_grpc(listener: TcpListener, sink: impl Sink) {
    let service = TraceServiceServer::new(Grpc(sink))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAX_BYTES);
    let server = tonic::transport::Server::builder()
        .layer(MapResponseLayer::new(undecodable_is_invalid))
        .add_service(service)
        // Otherwise the end of an answer waits for the client to acknowledge its beginning: 40 ms.
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    // It ends with its runtime, and has nobody to tell.
    drop(server.await);
}

/// OTLP/HTTP.
pub(crate) fn http_routes<S: Sink>(sink: S) -> Router {
    Router::new()
        .route("/v1/traces", post(export::<S>))
        .layer(DefaultBodyLimit::max(MAX_BYTES))
        .with_state(sink)
}

#[derive(Clone)]
struct Grpc<S>(S);

#[tonic::async_trait]
impl<S: Sink> TraceService for Grpc<S> {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let rejected = self.0.take(metadata.into_headers(), request)?;
        Ok(tonic::Response::new(response(&rejected)))
    }
}

/// tonic answers INTERNAL to a message that it can't decode or decompress. The mistake is the client's,
/// and OTLP says so: INVALID_ARGUMENT. Nothing else here answers INTERNAL.
fn undecodable_is_invalid<B>(mut response: http::Response<B>) -> http::Response<B> {
    if let Some(status) = response.headers_mut().get_mut(Status::GRPC_STATUS)
        && Code::from_bytes(status.as_bytes()) == Code::Internal
    {
        *status = i32::from(Code::InvalidArgument).into();
    }
    response
}

async fn export<S: Sink>(
    State(sink): State<S>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let Some(encoding) = Encoding::of(&headers) else {
        let why = "the content type must be application/x-protobuf or application/json";
        return (StatusCode::UNSUPPORTED_MEDIA_TYPE, why).into_response();
    };
    let compressed = match headers.get(header::CONTENT_ENCODING).map(|value| value.as_bytes()) {
        None | Some(b"identity") => false,
        Some(b"gzip") => true,
        Some(_) => {
            let why = "the content encoding must be gzip, if there is one";
            return (StatusCode::UNSUPPORTED_MEDIA_TYPE, why).into_response();
        }
    };
    let rejected = match body {
        Ok(body) => decode(encoding, compressed, &body).and_then(|request| sink.take(headers, request)),
        Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large()),
        Err(rejection) => Err(Status::invalid_argument(rejection.body_text())),
    };
    match rejected {
        Ok(rejected) => encoding.success(&rejected),
        Err(status) => encoding.failure(&status),
    }
}

fn decode(encoding: Encoding, compressed: bool, body: &[u8]) -> Result<ExportTraceServiceRequest, Status> {
    let body = if compressed { Cow::Owned(unzip(body)?) } else { Cow::Borrowed(body) };
    let request = match encoding {
        Encoding::Protobuf => ExportTraceServiceRequest::decode(&*body).map_err(|error| error.to_string()),
        Encoding::Json => serde_json::from_slice(&body).map_err(|error| error.to_string()),
    };
    request.map_err(Status::invalid_argument)
}

/// A few kilobytes of gzip can become gigabytes: it is read up to the limit, and not further.
fn unzip(body: &[u8]) -> Result<Vec<u8>, Status> {
    let mut unzipped = Vec::new();
    MultiGzDecoder::new(body)
        .take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut unzipped)
        .map_err(|error| Status::invalid_argument(format!("gzip: {error}")))?;
    if unzipped.len() > MAX_BYTES { Err(too_large()) } else { Ok(unzipped) }
}

fn too_large() -> Status {
    Status::resource_exhausted(format!("a request may have {MAX_BYTES} bytes"))
}

fn response(rejected: &Rejected) -> ExportTraceServiceResponse {
    // A field that is there says that something is wrong, even with zero rejected spans.
    let partial_success = (rejected.spans > 0).then(|| ExportTracePartialSuccess {
        rejected_spans: i64::try_from(rejected.spans).unwrap_or(i64::MAX),
        error_message: format!("of the first span: {}", rejected.reason),
    });
    ExportTraceServiceResponse { partial_success }
}

/// How a request is written, and so its answer.
#[derive(Clone, Copy)]
enum Encoding {
    Protobuf,
    Json,
}

/// `google.rpc.Status`, as far as it is used: the body of errors in OTLP/HTTP.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let content_type = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
        // What follows the `;` (a charset, say) changes nothing: both formats say how text is written.
        match content_type.split(';').next()?.trim().to_ascii_lowercase().as_str() {
            "application/x-protobuf" => Some(Self::Protobuf),
            "application/json" => Some(Self::Json),
            _ => None,
        }
    }

    fn success(self, rejected: &Rejected) -> Response {
        let response = response(rejected);
        let json = match &response.partial_success {
            None => json!({}),
            // Protobuf's JSON has 64-bit integers as strings.
            Some(partial) => json!({ "partialSuccess": {
                "rejectedSpans": partial.rejected_spans.to_string(),
                "errorMessage": partial.error_message,
            }}),
        };
        self.answer(StatusCode::OK, &response, &json)
    }

    fn failure(self, status: &Status) -> Response {
        let http_status = match status.code() {
            Code::InvalidArgument => StatusCode::BAD_REQUEST,
            // 429, its usual counterpart, would have the client send the same again.
            Code::ResourceExhausted => StatusCode::PAYLOAD_TOO_LARGE,
            Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let status = RpcStatus { code: status.code().into(), message: status.message().to_owned() };
        self.answer(http_status, &status, &json!({ "code": status.code, "message": status.message }))
    }

    fn answer(self, status: StatusCode, protobuf: &impl Message, json: &serde_json::Value) -> Response {
        let (content_type, body) = match self {
            Self::Protobuf => ("application/x-protobuf", protobuf.encode_to_vec()),
            Self::Json => ("application/json", json.to_string().into_bytes()),
        };
        (status, [(header::CONTENT_TYPE, content_type)], body).into_response()
    }
}
