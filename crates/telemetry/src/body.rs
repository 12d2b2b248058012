//! A response body that ends its span when the last frame passes, not when the handler returns.

use bytes::Buf;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use opentelemetry::Context;
use pin_project_lite::pin_project;
use std::{
    pin::Pin,
    task::{self, Poll, ready},
};

/// A span that waits for the end of a body. If it is dropped before that, it ends as cancelled.
pub trait AwaitsBody {
    /// Returns the context that is current while the body is produced.
    fn context(&self) -> &Context;

    /// Ends the span.
    fn end_of_body(self, end: BodyEnd<'_>);
}

/// How a body ended.
pub enum BodyEnd<'a> {
    /// The body ended with its last frame of data.
    Complete,
    /// The body ended with trailers, where gRPC has its status.
    Trailers(&'a HeaderMap),
    /// The body failed.
    Error,
}

pin_project! {
    /// A body and the span that it ends.
    #[derive(Debug)]
    pub struct TracedBody<B, S> {
        #[pin]
        body: B,
        span: Option<S>,
        // The number of bytes still to come, if the headers declare the length.
        left: Option<u64>,
    }
}

impl<B, S: AwaitsBody> TracedBody<B, S> {
    /// `span` is `None` if the span has already ended. `length` is the value of the header `content-length`.
    pub(crate) fn new(body: B, span: Option<S>, length: Option<u64>) -> Self {
        Self { body, span, left: length }
    }
}

impl<B: Body, S: AwaitsBody> Body for TracedBody<B, S> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        // The spans and logs of a streaming handler also belong to this request.
        let attached = this.span.as_ref().map(|span| span.context().clone().attach());
        let frame = ready!(this.body.as_mut().poll_frame(task));
        drop(attached);

        let end = match &frame {
            None => Some(BodyEnd::Complete),
            Some(Err(_)) => Some(BodyEnd::Error),
            Some(Ok(frame)) => match frame.trailers_ref() {
                Some(trailers) => Some(BodyEnd::Trailers(trailers)),
                // hyper may drop a body after its last frame, without polling it again.
                None => {
                    let length = frame.data_ref().map_or(0, |data| data.remaining() as u64);
                    *this.left = this.left.map(|left| left.saturating_sub(length));
                    let is_last = this.body.is_end_stream() || *this.left == Some(0);
                    is_last.then_some(BodyEnd::Complete)
                }
            },
        };
        if let Some(end) = end
            && let Some(span) = this.span.take()
        {
            span.end_of_body(end);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
