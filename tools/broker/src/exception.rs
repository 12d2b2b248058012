//! What ends a channel or a connection: the reply codes of the specification (section 1.2), with texts
//! that begin as RabbitMQ's do.

use amq_protocol::{
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::ShortString,
};

/// An error that its peer is told. A soft one closes the channel, a hard one the connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Exception {
    kind: AMQPErrorKind,
    text: String,
    method: (u16, u16),
}

/// What an operation that the peer asked for comes to.
pub type Outcome<T = ()> = Result<T, Exception>;

impl Exception {
    /// 403: it must not be touched.
    pub fn access_refused(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::ACCESSREFUSED, text)
    }

    /// 404: there is no such queue or exchange.
    pub fn not_found(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::NOTFOUND, text)
    }

    /// 405: it belongs to another connection.
    pub fn resource_locked(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::RESOURCELOCKED, text)
    }

    /// 406: not as it is now.
    pub fn precondition_failed(text: impl Into<String>) -> Self {
        Self::soft(AMQPSoftError::PRECONDITIONFAILED, text)
    }

    /// 501: the bytes are no frame.
    pub fn frame_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::FRAMEERROR, text)
    }

    /// 502: the frame holds nothing legible.
    pub fn syntax_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::SYNTAXERROR, text)
    }

    /// 503: that can't be asked of a broker, or not in these words.
    pub fn command_invalid(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::COMMANDINVALID, text)
    }

    /// 504: not on this channel.
    pub fn channel_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::CHANNELERROR, text)
    }

    /// 505: another frame is due.
    pub fn unexpected_frame(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::UNEXPECTEDFRAME, text)
    }

    /// 506: it would take too much memory.
    pub fn resource_error(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::RESOURCEERROR, text)
    }

    /// 530: a rule forbids it.
    pub fn not_allowed(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::NOTALLOWED, text)
    }

    /// 540: RabbitMQ may do it, this broker does not.
    pub fn not_implemented(text: impl Into<String>) -> Self {
        Self::hard(AMQPHardError::NOTIMPLEMENTED, text)
    }

    /// The same, of this method.
    pub fn of(self, method: (u16, u16)) -> Self {
        Self { method, ..self }
    }

    /// The class and the method that it came of, or zeros.
    pub fn method(&self) -> (u16, u16) {
        self.method
    }

    /// Whether it closes the connection and not just the channel.
    pub fn is_hard(&self) -> bool {
        matches!(self.kind, AMQPErrorKind::Hard(_))
    }

    /// The reply code.
    pub fn code(&self) -> u16 {
        self.kind.get_id()
    }

    /// The reply text, such as `NOT_FOUND - no queue 'q' in vhost '/'`; at most as long as one may be.
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
