//! Refuses requests that are not gRPC, because tonic would treat them as calls. Also corrects one of tonic's
//! statuses.

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use std::{
    pin::Pin,
    task::{self, Poll},
};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

/// Refuses requests that are not gRPC, as the specification says (gRPC over HTTP/2, "Requests"). A method
/// other than POST gets 405, and another content type gets 415. A call whose message is too large ends with
/// RESOURCE_EXHAUSTED instead of tonic's OUT_OF_RANGE.
#[derive(Clone)]
pub struct ProtocolLayer;

impl<S> Layer<S> for ProtocolLayer {
    type Service = Protocol<S>;

    fn layer(&self, inner: S) -> Protocol<S> {
        Protocol(inner)
    }
}

/// A service wrapped in the [`ProtocolLayer`].
#[derive(Clone)]
pub struct Protocol<S>(S);

impl<S> Service<Request<Body>> for Protocol<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if let Some(refusal) = refusal(&request) {
            return Box::pin(async { Ok(refusal) });
        }
        let answer = self.0.call(request);
        Box::pin(async { Ok(corrected(answer.await?)) })
    }
}

fn refusal(request: &Request<Body>) -> Option<Response<Body>> {
    let mut response = Response::new(Body::empty());
    if request.method() != Method::POST {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return Some(response);
    }
    // A format, such as `+proto`, or parameters may follow this prefix.
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let rest = content_type.and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    if rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';'))) {
        return None;
    }
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    Some(response)
}

fn corrected(response: Response<Body>) -> Response<Body> {
    let status = response.extensions().get::<Status>();
    let is_too_large = |status: &&Status| {
        status.code() == Code::OutOfRange && status.message().contains("message length too large")
    };
    match status.filter(is_too_large) {
        Some(status) => Status::resource_exhausted(status.message()).into_http(),
        None => response,
    }
}
