//! Reads the whole body of a request before the request counts as in flight, because a thousand slow callers
//! must not keep out the others.

use crate::{
    bounds::{LINGER, MAX_BODIES, MAX_BODY},
    problem::Problem,
};
use axum::{
    body::{Body, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{
        Method,
        header::{CONNECTION, CONTENT_TYPE, EXPECT, TRANSFER_ENCODING},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::BodyExt;
use resilience::Deadline;
use std::sync::Arc;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{timeout, timeout_at},
};

/// Reads the whole body into a part of `memory`, at most until the request's deadline, and then passes the
/// request on. If the answer is known without the body, the body is not read. A caller who waits with
/// `Expect: 100-continue` then gets the final status at once (RFC 9110, section 10.1.1).
pub async fn read_first(State(memory): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    if request.extensions().get::<MatchedPath>().is_none() {
        return next.run(request).await;
    }
    let mut codings = request.headers().get_all(TRANSFER_ENCODING).iter();
    if !codings.all(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        // RFC 9112, section 6.1. hyper looks only at the last coding. The connection is closed, because a
        // proxy on the way may take the next bytes for a part of this request.
        return ([(CONNECTION, "close")], Problem::UnknownTransferCoding).into_response();
    }
    if request.body().size_hint().lower() > MAX_BODY as u64 {
        // Reading would tell a caller who waits with `Expect` to send the body.
        if !request.headers().contains_key(EXPECT) {
            tokio::spawn(timeout(LINGER, read_on(request.into_body())));
        }
        return Problem::BodyTooLarge.into_response();
    }
    if request.headers().contains_key(EXPECT) && !may_be_accepted(&request) {
        return next.run(request).await;
    }
    let (head, body) = request.into_parts();
    let reading = read(body, memory);
    // If the deadline passes before the whole body has arrived, that is the caller's fault.
    let read = match Deadline::current() {
        Some(Deadline(deadline)) => timeout_at(deadline, reading).await.unwrap_or(Err(Problem::BodyTooSlow)),
        None => reading.await,
    };
    match read {
        Ok((body, _memory)) => next.run(Request::from_parts(head, Body::from(body))).await,
        Err(problem) => problem.into_response(),
    }
}

/// Returns false if the request will be refused for its method or media type, because all routes that take a
/// body take JSON by POST. A route that takes another method or media type must be added here. Otherwise, the
/// body of a caller who waits with `Expect` would reach the handler unread, and without the bounds of
/// [`read_first`].
fn may_be_accepted(request: &Request) -> bool {
    let content_type = request.headers().get(CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    *request.method() == Method::POST
        && content_type.windows(4).any(|part| part.eq_ignore_ascii_case(b"json"))
}

/// Reads the rest of a body that is too large, at most `MAX_BODIES` bytes, so that the caller can send all of
/// it and read the answer before the connection is closed (RFC 9112, section 9.6).
async fn read_on(mut body: Body) {
    let mut left = MAX_BODIES;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, |data| data.len()));
        if left == 0 {
            return;
        }
    }
}

/// Reads a body, and reserves memory for it. The memory is given back when the returned permit is dropped.
async fn read(
    mut body: Body,
    memory: Arc<Semaphore>,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), Problem> {
    let mut read = Vec::new();
    let mut held: Option<OwnedSemaphorePermit> = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Problem::UnreadableBody)?;
        // Trailers are ignored.
        let Ok(data) = frame.into_data() else { continue };
        let size = read.len() + data.len();
        if size > MAX_BODY {
            tokio::spawn(timeout(LINGER, read_on(body)));
            return Err(Problem::BodyTooLarge);
        }
        let more =
            u32::try_from(data.len()).ok().and_then(|more| memory.clone().try_acquire_many_owned(more).ok());
        let more = more.ok_or(Problem::Overloaded)?;
        match &mut held {
            Some(held) => held.merge(more),
            None => held = Some(more),
        }
        read.extend_from_slice(&data);
    }
    Ok((read, held))
}
