//! The reason of a refusal, on its way to the span around it.

/// The `error.type` of a span, where a layer inside of the span's knows it better than the status does:
/// `overloaded` says more than `503`.
///
/// A server's layer puts it into the extensions of the response that it makes; a client's makes it a source
/// of the [`tonic::Status`] that it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ErrorType(pub &'static str);

impl ErrorType {
    /// The one among the sources of `error`.
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
