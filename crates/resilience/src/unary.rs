//! The base of a gRPC client's layers, which reduces a call to one message out and one message back.
//!
//! gRPC sends the outcome of a call in the trailers of the answer, after the message. Without [`UnaryLayer`],
//! another layer would have to read the body to its end to know whether a call failed. [`UnaryLayer`] reads
//! the body, and gives the layers around it the outcome as a [`Result`].

use crate::deadline::Deadline;
use bytes::Bytes;
use grpc_protocol::{code_of_http, status_code, transport_status};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Collected, Full, LengthLimitError, Limited};
use std::{
    pin::Pin,
    task::{self, Poll},
};
use tonic::{Code, Status};
use tower::{BoxError, Layer, Service};

/// Collects the answer, which may have at most 4 MiB, and turns every status except OK into an error. The
/// layer also tells the server how much time is left. It is only for unary calls, because all messages of a
/// stream would arrive only when the stream ends.
#[derive(Clone)]
pub struct UnaryLayer;

/// The longest message, in bytes, which is also tonic's own limit.
pub(crate) const MAX_MESSAGE: usize = 4 * 1024 * 1024;

impl<S> Layer<S> for UnaryLayer {
    type Service = Unary<S>;

    fn layer(&self, inner: S) -> Unary<S> {
        Unary { inner }
    }
}

/// A channel wrapped in the [`UnaryLayer`].
#[derive(Clone)]
pub struct Unary<S> {
    inner: S,
}

impl<S, B> Service<Request<Bytes>> for Unary<S>
where
    S: Service<Request<tonic::body::Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Collected<Bytes>>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), Status>> {
        self.inner.poll_ready(cx).map_err(|error| transport_status(error.into()))
    }

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let mut request = request.map(|message| tonic::body::Body::new(Full::new(message)));
        if let Some(deadline) = Deadline::current() {
            // The time left is written for each attempt, because a second attempt has less time left.
            deadline.write(request.headers_mut());
        }
        let response = self.inner.call(request);
        Box::pin(async move {
            let answer = response.await.map_err(|error| transport_status(error.into()))?;
            let (mut head, body) = answer.into_parts();
            keep_code(&mut head.headers);
            // If the answer has no message, its status is in the headers.
            outcome(&head.headers).unwrap_or(Ok(()))?;
            let body = body.map_frame(|mut frame| {
                if let Some(trailers) = frame.trailers_mut() {
                    keep_code(trailers);
                }
                frame
            });
            let body = Limited::new(body, MAX_MESSAGE).collect().await.map_err(|error| match error
                .is::<LengthLimitError>(
            ) {
                true => Status::out_of_range("the answer is too long"),
                false => transport_status(error),
            })?;
            let outcome = body.trailers().and_then(outcome).or_else(|| outcome(&head.headers));
            outcome.unwrap_or_else(|| Err(no_status(head.status)))?;
            Ok(Response::from_parts(head, body))
        })
    }
}

/// Reads the status from headers or trailers, if there is one.
fn outcome(headers: &HeaderMap) -> Option<Result<(), Status>> {
    Some(match status_code(headers)? {
        Code::Ok => Ok(()),
        code => Err(Status::new(code, "")),
    })
}

/// Removes the message and the details of a status, because malformed ones would hide the status code. If the
/// message is not UTF-8, tonic's client reports the code UNKNOWN. If the details are not base64, tonic's
/// client panics.
fn keep_code(headers: &mut HeaderMap) {
    headers.remove(Status::GRPC_MESSAGE);
    headers.remove(Status::GRPC_STATUS_DETAILS);
}

/// Makes the status for an answer that is not gRPC, or that broke off.
fn no_status(http: StatusCode) -> Status {
    let code = match http {
        // These statuses say that the request is too large, so they must not count as failures of the server.
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => Code::OutOfRange,
        _ => code_of_http(http),
    };
    Status::new(code, format!("no gRPC status, HTTP {http}"))
}
