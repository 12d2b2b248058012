//! OTLP/HTTP, in protobuf and in JSON.

use super::{MAX_BYTES, Sink, decode, response};
use crate::backend::Rejected;
use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
    routing::post,
};
use flate2::read::MultiGzDecoder;
use http::{HeaderMap, StatusCode, header};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use serde_json::json;
use std::{borrow::Cow, io::Read};
use tonic::{Code, Status};

/// `/v1/traces`
pub(crate) fn routes<S: Sink>(sink: S) -> Router {
    Router::new()
        .route("/v1/traces", post(export::<S>))
        .layer(DefaultBodyLimit::max(MAX_BYTES))
        .with_state(sink)
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
    match encoding {
        Encoding::Protobuf => decode::protobuf(&body),
        Encoding::Json => decode::json(&body),
    }
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
