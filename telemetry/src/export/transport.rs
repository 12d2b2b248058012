//! One attempt to hand a batch to the other side, and what its answer means (OTLP specification 1.7,
//! "OTLP/gRPC Response" and "OTLP/HTTP Response").

use crate::{
    config::{OtlpConfig, OtlpProtocol},
    grpc::{code_of_http, status_code, transport_status},
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compression, write::GzEncoder};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use percent_encoding::percent_decode;
use prost::Message;
use std::{io::Write, time::Duration};
use tokio::{task::spawn_blocking, time::timeout};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tower::ServiceExt;

/// A connection to a collector, made when first needed and again when lost.
pub(crate) enum Transport {
    Grpc {
        channel: Channel,
        headers: HeaderMap,
        gzip: bool,
        timeout: Duration,
    },
    Http {
        client: Box<Client<HttpConnector, Full<Bytes>>>,
        endpoint: Uri,
        headers: HeaderMap,
        gzip: bool,
        timeout: Duration,
    },
}

/// What the other side did with a batch that arrived.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Spans that it refused for good.
    pub rejected: u64,
    pub message: String,
}

/// Why a batch did not arrive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SendError {
    pub reason: String,
    pub retry: Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    Never,
    /// After a delay of our own choice.
    Later,
    /// The other side named the delay.
    After(Duration),
}

impl Transport {
    pub fn otlp(config: OtlpConfig) -> Self {
        let OtlpConfig { protocol, endpoint, headers, timeout, gzip } = config;
        let mut headers: HeaderMap = headers.into_iter().collect();
        // Unless the user has chosen another one.
        headers.entry(header::USER_AGENT).or_insert(USER_AGENT);
        match protocol {
            OtlpProtocol::Grpc => {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
                headers.insert(header::TE, HeaderValue::from_static("trailers"));
                if gzip {
                    headers.insert("grpc-encoding", HeaderValue::from_static("gzip"));
                }
                // A peer that is gone without a word is noticed while it is waited for.
                let channel = Endpoint::from(endpoint)
                    .connect_timeout(timeout.min(CONNECT_TIMEOUT))
                    .http2_keep_alive_interval(KEEP_ALIVE)
                    .keep_alive_timeout(KEEP_ALIVE)
                    .connect_lazy();
                Self::Grpc { channel, headers, gzip, timeout }
            }
            OtlpProtocol::HttpProtobuf => {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
                Self::http(endpoint, headers, timeout, gzip)
            }
        }
    }

    pub fn zipkin(endpoint: Uri, timeout: Duration) -> Self {
        let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Self::http(endpoint, HeaderMap::from_iter([json]), timeout, false)
    }

    fn http(endpoint: Uri, mut headers: HeaderMap, timeout: Duration, gzip: bool) -> Self {
        if gzip {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(timeout.min(CONNECT_TIMEOUT)));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
        Self::Http { client: Box::new(client), endpoint, headers, gzip, timeout }
    }

    /// Sends a request once.
    pub async fn send(&self, body: Bytes) -> Result<Answer, SendError> {
        let limit = match self {
            Self::Grpc { timeout, .. } | Self::Http { timeout, .. } => *timeout,
        };
        match timeout(limit, self.attempt(body)).await {
            Ok(result) => result,
            Err(_) => Err(SendError { reason: format!("no answer within {limit:?}"), retry: Retry::Later }),
        }
    }

    async fn attempt(&self, body: Bytes) -> Result<Answer, SendError> {
        match self {
            Self::Grpc { channel, headers, gzip, .. } => {
                let message = if *gzip { compress(body).await? } else { body };
                // Before a message: whether it is compressed, and its length (gRPC over HTTP/2, "Requests").
                let mut framed = BytesMut::with_capacity(FRAME_HEAD + message.len());
                framed.put_u8((*gzip).into());
                framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
                framed.put(message);
                let mut request = Request::new(tonic::body::Body::new(Full::new(framed.freeze())));
                *request.method_mut() = Method::POST;
                *request.uri_mut() =
                    Uri::from_static("/opentelemetry.proto.collector.trace.v1.TraceService/Export");
                *request.version_mut() = Version::HTTP_2;
                *request.headers_mut() = headers.clone();

                let broken = |error| grpc_error(&transport_status(error));
                let response =
                    channel.clone().oneshot(request).await.map_err(|error| broken(error.into()))?;
                let (parts, body) = response.into_parts();
                let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await.map_err(broken)?;
                // Not by tonic's client, which panics at a status with details that are not base64.
                let status =
                    [body.trailers(), Some(&parts.headers)].into_iter().flatten().find_map(grpc_status);
                match status.unwrap_or_else(|| Status::new(code_of_http(parts.status), parts.status.as_str()))
                {
                    ok if ok.code() == Code::Ok => {
                        let mut message = body.to_bytes();
                        message.advance(FRAME_HEAD.min(message.len()));
                        Ok(answer(message))
                    }
                    status => Err(grpc_error(&status)),
                }
            }
            Self::Http { client, endpoint, headers, gzip, .. } => {
                let body = if *gzip { compress(body).await? } else { body };
                let mut request = Request::new(Full::new(body));
                *request.method_mut() = Method::POST;
                *request.uri_mut() = endpoint.clone();
                *request.headers_mut() = headers.clone();

                let broken = |reason: String| SendError { reason, retry: Retry::Later };
                let response = client.request(request).await.map_err(|error| broken(chain(&error)))?;
                let (parts, body) = response.into_parts();
                if parts.status.is_success() {
                    // The batch has arrived; an answer that can't be read doesn't change that.
                    let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
                    return Ok(body.map(|body| answer(body.to_bytes())).unwrap_or_default());
                }
                Err(http_error(parts.status, &parts.headers))
            }
        }
    }
}

/// Who sends this (OTLP exporter specification, "User Agent").
const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("Throughline-OTLP-Exporter-Rust/", env!("CARGO_PKG_VERSION")));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Less than half of the time that an attempt has, by default.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Bytes before a gRPC message.
const FRAME_HEAD: usize = 5;

async fn compress(body: Bytes) -> Result<Bytes, SendError> {
    let compressed = spawn_blocking(move || {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&body)?;
        encoder.finish()
    });
    match compressed.await {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        failed => Err(SendError { reason: format!("gzip: {failed:?}"), retry: Retry::Never }),
    }
}

/// RESOURCE_EXHAUSTED is retryable only if the server says when; that detail is rare, so here it counts
/// as overload like UNAVAILABLE.
fn grpc_error(status: &Status) -> SendError {
    let retry = match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => Retry::Later,
        // What tonic makes of a stream that HTTP/2 has ended, for want of a connection, say.
        Code::Internal if std::error::Error::source(status).is_some() => Retry::Later,
        _ => Retry::Never,
    };
    SendError { reason: format!("{:?}: {}", status.code(), short(status.message())), retry }
}

/// The status in headers or trailers, if there is one.
fn grpc_status(headers: &HeaderMap) -> Option<Status> {
    let code = status_code(headers)?;
    let message = headers.get("grpc-message").map(|message| percent_decode(message.as_bytes()));
    Some(Status::new(
        code,
        message.map(|message| message.decode_utf8_lossy().into_owned()).unwrap_or_default(),
    ))
}

fn http_error(status: StatusCode, headers: &HeaderMap) -> SendError {
    let retry_after =
        || headers.get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs);
    let retry = match status.as_u16() {
        429 | 502 | 503 | 504 => retry_after().map_or(Retry::Later, Retry::After),
        _ => Retry::Never,
    };
    SendError { reason: format!("HTTP status {status}"), retry }
}

/// What a peer wrote goes into a log line: bounded, and without control characters.
fn short(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// `ExportTraceServiceResponse`
#[derive(Clone, PartialEq, Message)]
struct ExportResponse {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<PartialSuccess>,
}

/// `ExportTracePartialSuccess`
#[derive(Clone, PartialEq, Message)]
struct PartialSuccess {
    #[prost(int64, tag = "1")]
    rejected_spans: i64,
    #[prost(string, tag = "2")]
    error_message: String,
}

fn answer(body: impl Buf) -> Answer {
    let partial = ExportResponse::decode(body).ok().and_then(|response| response.partial_success);
    let PartialSuccess { rejected_spans, error_message } = partial.unwrap_or_default();
    Answer { rejected: rejected_spans.try_into().unwrap_or(0), message: short(&error_message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_a_request_are_told_apart_as_the_specification_demands() {
        for code in 1..=16 {
            let code = Code::from(code);
            let retryable = matches!(
                code,
                Code::Cancelled
                    | Code::DeadlineExceeded
                    | Code::ResourceExhausted
                    | Code::Aborted
                    | Code::OutOfRange
                    | Code::Unavailable
                    | Code::DataLoss
            );
            assert_eq!(grpc_error(&Status::new(code, "")).retry == Retry::Later, retryable, "{code:?}");
        }
        for (status, retryable) in
            [(400, false), (401, false), (404, false), (429, true), (500, false), (503, true)]
        {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(http_error(status, &HeaderMap::new()).retry == Retry::Later, retryable, "{status}");
        }
        let headers = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_static("7"))]);
        assert_eq!(
            http_error(StatusCode::TOO_MANY_REQUESTS, &headers).retry,
            Retry::After(Duration::from_secs(7))
        );
    }

    #[test]
    fn partial_success_is_read_and_garbage_ignored() {
        let partial_success = PartialSuccess { rejected_spans: 3, error_message: "too\nold".into() };
        let body = ExportResponse { partial_success: Some(partial_success) }.encode_to_vec();
        assert_eq!(answer(&body[..]), Answer { rejected: 3, message: "tooold".into() });
        assert_eq!(answer(&b""[..]), Answer::default());
        assert_eq!(answer(&b"\xff\xff\xff"[..]), Answer::default());
    }
}
