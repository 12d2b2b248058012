//! Carries the reason for a refusal to the span around the layer that refuses.

use std::iter;

/// The `error.type` of a span, set by an inner layer that knows a more exact reason than the status. For
/// example, `overloaded` says more than `503`.
///
/// A server layer puts the value into the extensions of its response. A client layer makes it a source of the
/// [`tonic::Status`] that it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ErrorType(pub &'static str);

impl ErrorType {
    /// Finds the `ErrorType` among `error` and its sources.
    pub(crate) fn of(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        iter::successors(Some(error), |&error| error.source()).find_map(|error| error.downcast_ref().copied())
    }
}
