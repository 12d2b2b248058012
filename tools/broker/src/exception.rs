//! The errors that close a channel or a connection. They have the reply codes of the specification (section
//! 1.2), and their texts begin like RabbitMQ's.

use amq_protocol::{
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::ShortString,
};

/// An error that is reported to the peer. A soft error closes the channel; a hard error closes the
/// connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Exception {
    kind: AMQPErrorKind,
    text: String,
    method: (u16, u16),
}

/// The result of an operation. An error is reported to the peer.
pub type Outcome<T = ()> = Result<T, Exception>;

impl Exception {
    /// Creates error 403: the client may not do this.
    pub fn access_refused(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::ACCESSREFUSED, text)
    }

    /// Creates error 404: there is no such queue or exchange.
    pub fn not_found(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::NOTFOUND, text)
    }

    /// Creates error 405: the queue belongs to another connection.
    pub fn resource_locked(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::RESOURCELOCKED, text)
    }

    /// Creates error 406: a precondition of the operation is not met, or an argument is invalid.
    pub fn precondition_failed(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::PRECONDITIONFAILED, text)
    }

    /// Creates error 501: the bytes are not a valid frame.
    pub fn frame_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::FRAMEERROR, text)
    }

    /// Creates error 502: the payload of the frame cannot be parsed.
    pub fn syntax_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::SYNTAXERROR, text)
    }

    /// Creates error 503: the broker does not accept this method, or not with these arguments.
    pub fn command_invalid(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::COMMANDINVALID, text)
    }

    /// Creates error 504: the frame is not allowed on this channel, or not in the channel's current state.
    pub fn channel_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::CHANNELERROR, text)
    }

    /// Creates error 505: the broker expected another frame at this point.
    pub fn unexpected_frame(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::UNEXPECTEDFRAME, text)
    }

    /// Creates error 506: the operation would take too much memory.
    pub fn resource_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::RESOURCEERROR, text)
    }

    /// Creates error 530: a rule of the broker forbids the operation.
    pub fn not_allowed(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::NOTALLOWED, text)
    }

    /// Creates error 540: this broker does not implement the feature, even if RabbitMQ does.
    pub fn not_implemented(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::NOTIMPLEMENTED, text)
    }

    /// Sets the class id and the method id of the method that caused the error.
    pub fn of(self, method: (u16, u16)) -> Self {
        Self { method, ..self }
    }

    /// Returns the class id and the method id of the method that caused the error, or zeros if there is no
    /// such method.
    pub fn method(&self) -> (u16, u16) {
        self.method
    }

    /// Returns whether the error closes the connection rather than only the channel.
    pub fn is_hard(&self) -> bool {
        matches!(self.kind, AMQPErrorKind::Hard(_))
    }

    /// Returns the reply code.
    pub fn code(&self) -> u16 {
        self.kind.get_id()
    }

    /// Returns the reply text, such as `NOT_FOUND - no queue 'q' in vhost '/'`, cut to the length of a short
    /// string.
    pub fn text(&self) -> ShortString {
        const LONGEST: usize = 255;

        let kind = match &self.kind {
            AMQPErrorKind::Soft(kind) => kind.to_string(),
            AMQPErrorKind::Hard(kind) => kind.to_string(),
        };
        let mut text = format!("{} - {}", kind.replace('-', "_"), self.text);
        text.truncate(text.floor_char_boundary(LONGEST));
        text.into()
    }

    fn soft(kind: AMQPSoftError, text: impl Into<String>) -> Self {
        Self { kind: kind.into(), text: text.into(), method: (0, 0) }
    }

    fn hard(kind: AMQPHardError, text: impl Into<String>) -> Self {
        Self { kind: kind.into(), text: text.into(), method: (0, 0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_where_a_short_string_ends_and_never_inside_of_a_character() {
        let exception = Exception::not_found("é".repeat(300));
        assert_eq!(exception.text().as_str().len(), 254);
        assert!(exception.text().as_str().starts_with("NOT_FOUND - éé"));
    }
}
