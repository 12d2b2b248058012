//! OTLP over HTTP, in protobuf and in JSON.

use super::{Export, MAX_BYTES, Sink, decode, response};
use crate::Rejected;
use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
    routing::post,
};
use flate2::read::MultiGzDecoder;
use http::{HeaderMap, StatusCode, header};
use opentelemetry_proto::tonic::collector::{
    logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
    trace::v1::ExportTraceServiceRequest,
};
use prost::Message;
use serde_json::json;
use std::{
    borrow::Cow,
    io::{self, Read},
};
use tonic::{Code, Status};

/// The largest window of a zstd frame, as an exponent of two. This exponent means 8 MiB, which RFC 9659
/// allows in HTTP. With zstd's own default, a frame of a few bytes can make the decoder allocate 128 MiB.
const MAX_WINDOW_LOG: u32 = 23;

/// Returns the routes `/v1/traces`, `/v1/metrics` and `/v1/logs`.
pub(crate) fn routes<S: Sink>(sink: S) -> Router {
    Router::new()
        .route(ExportTraceServiceRequest::PATH, post(export::<S, ExportTraceServiceRequest>))
        .route(ExportMetricsServiceRequest::PATH, post(export::<S, ExportMetricsServiceRequest>))
        .route(ExportLogsServiceRequest::PATH, post(export::<S, ExportLogsServiceRequest>))
        .layer(DefaultBodyLimit::max(MAX_BYTES))
        .with_state(sink)
}

async fn export<S: Sink, E: Export>(
    State(sink): State<S>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let Some(encoding) = Encoding::of(&headers) else {
        let why = "the content type must be application/x-protobuf or application/json";
        return (StatusCode::UNSUPPORTED_MEDIA_TYPE, why).into_response();
    };
    let decompress = match headers.get(header::CONTENT_ENCODING).map(|value| value.as_bytes()) {
        None | Some(b"identity") => None,
        Some(b"gzip") => Some(gunzip as Decompress),
        Some(b"zstd") => Some(unzstd as Decompress),
        Some(_) => {
            let why = "the content encoding must be gzip or zstd, if there is one";
            return (StatusCode::UNSUPPORTED_MEDIA_TYPE, why).into_response();
        }
    };
    let rejected = match body {
        Ok(body) => decode::<E>(encoding, decompress, &body).and_then(|request| request.give(&sink, headers)),
        Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large()),
        Err(rejection) => Err(Status::invalid_argument(rejection.body_text())),
    };
    match rejected {
        Ok(rejected) => encoding.success::<E>(&rejected),
        Err(status) => encoding.failure(&status),
    }
}

fn decode<E: Export>(encoding: Encoding, decompress: Option<Decompress>, body: &[u8]) -> Result<E, Status> {
    let body = match decompress {
        Some(decompress) => {
            let decompressed = decompress(body);
            Cow::Owned(decompressed.map_err(|error| Status::invalid_argument(error.to_string()))?)
        }
        None => Cow::Borrowed(body),
    };
    if body.len() > MAX_BYTES {
        return Err(too_large());
    }
    match encoding {
        Encoding::Protobuf => decode::protobuf(&body),
        Encoding::Json => decode::json(&body),
    }
}

type Decompress = fn(&[u8]) -> io::Result<Vec<u8>>;

fn gunzip(body: &[u8]) -> io::Result<Vec<u8>> {
    read(MultiGzDecoder::new(body))
}

fn unzstd(body: &[u8]) -> io::Result<Vec<u8>> {
    let mut decoder = zstd::Decoder::with_buffer(body)?;
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    read(decoder)
}

/// Reads the decompressed body, up to one byte beyond the limit, because a few kilobytes can decompress to
/// gigabytes.
fn read(decoder: impl Read) -> io::Result<Vec<u8>> {
    let mut decompressed = Vec::new();
    decoder.take(MAX_BYTES as u64 + 1).read_to_end(&mut decompressed)?;
    Ok(decompressed)
}

fn too_large() -> Status {
    Status::resource_exhausted(format!("a request may have at most {MAX_BYTES} bytes"))
}

/// The encoding of a request and of its response.
#[derive(Clone, Copy)]
enum Encoding {
    Protobuf,
    Json,
}

/// The fields of `google.rpc.Status` that are used here. This message is the body of an error in OTLP/HTTP.
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
        // Parameters after the `;`, such as a charset, are ignored, because both formats define how text is
        // encoded.
        match content_type.split(';').next()?.trim().to_ascii_lowercase().as_str() {
            "application/x-protobuf" => Some(Self::Protobuf),
            "application/json" => Some(Self::Json),
            _ => None,
        }
    }

    fn success<E: Export>(self, rejected: &Rejected) -> Response {
        let response = response(rejected);
        let json = match &response.partial_success {
            None => json!({}),
            // Protobuf's JSON writes 64-bit integers as strings.
            Some(partial) => json!({ "partialSuccess": {
                E::REJECTED: partial.rejected_spans.to_string(),
                "errorMessage": partial.error_message,
            }}),
        };
        self.answer(StatusCode::OK, &response, &json)
    }

    fn failure(self, status: &Status) -> Response {
        let http_status = match status.code() {
            Code::InvalidArgument => StatusCode::BAD_REQUEST,
            // 429, the usual equivalent, would make the client send the same request again.
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
