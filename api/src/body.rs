//! The body of a request, read whole before the request takes a place among those in flight: a thousand
//! callers that take their time with it must not keep out those that don't.

use crate::problem::Problem;
use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::BodyExt;
use resilience::Deadline;
use std::sync::Arc;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout_at,
};

/// The largest body, in bytes.
const LIMIT: usize = 1024 * 1024;

/// Of all requests together, in bytes: it bounds what thousands of callers can make this service keep.
const LIMIT_OF_ALL: usize = 64 * 1024 * 1024;

/// What bodies may take of memory.
#[derive(Clone)]
pub struct BodyMemory(Arc<Semaphore>);

impl BodyMemory {
    /// All of it, for one router.
    #[expect(clippy::new_without_default, reason = "there is nothing to default")]
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(LIMIT_OF_ALL)))
    }
}

/// Reads the body, by the deadline of the request, and goes on with it.
pub async fn read_first(State(memory): State<BodyMemory>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let reading = read(body, memory);
    // The deadline is the caller's fault if it passes while the body has not come.
    let read = match Deadline::current() {
        Some(Deadline(deadline)) => timeout_at(deadline, reading).await.unwrap_or(Err(Problem::BodyTooSlow)),
        None => reading.await,
    };
    match read {
        Ok((body, _memory)) => next.run(Request::from_parts(head, Body::from(body))).await,
        Err(problem) => problem.into_response(),
    }
}

/// The memory that it takes is given back with the permit.
async fn read(
    mut body: Body,
    BodyMemory(memory): BodyMemory,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), Problem> {
    let mut read = Vec::new();
    let mut held: Option<OwnedSemaphorePermit> = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Problem::UnreadableBody)?;
        // Trailers are of no interest.
        let Ok(data) = frame.into_data() else { continue };
        let size = read.len() + data.len();
        if size > LIMIT {
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
