//! Carries the reason for a refusal to the span around the layer that refuses.

/// The `error.type` of a span, set by a layer inside the span that knows more than the status says:
/// `overloaded` says more than `503`.
///
/// A server's layer puts it into the extensions of its response. A client's layer makes it a source of the
/// [`tonic::Status`] that it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ErrorType(pub &'static str);

impl ErrorType {
    /// Finds the `ErrorType` among `error` and its sources.
    pub(crate) fn of(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut source = Some(error);
        while let Some(error) = source {
            if let Some(error_type) = error.downcast_ref::<Self>() {
                return Some(*error_type);
            }
            source = error.source();
        }
        None
    }
}
