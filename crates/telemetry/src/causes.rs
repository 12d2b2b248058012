//! The text of an error with its causes, for log lines and for descriptions of spans.

use std::{error::Error, iter};

/// Joins the texts of an error and of its causes. A text that is already included is left out, because in
/// some libraries the text of an error includes the text of its cause.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in iter::successors(error.source(), |&cause| cause.source()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Outer {
        text: &'static str,
        source: io::Error,
    }

    #[test]
    fn a_cause_is_told_once() {
        for (text, expected) in
            [("IO error: gone", "IO error: gone"), ("can't read", "can't read: gone"), ("gone", "gone")]
        {
            assert_eq!(causes(&Outer { text, source: io::Error::other("gone") }), expected);
        }
    }
}
