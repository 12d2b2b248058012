//! Why an attempt failed, as its span, the log and the dead letter show it.

use crate::history::Refused;
use proto::login::LoginMessageError;
use std::error::Error;
use telemetry::semconv;

/// Why an attempt failed.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// A short name of bounded cardinality, for `error.type` and the dead-letter header.
    pub reason: &'static str,
    /// The text for the span and the log, which holds nothing of the message's content.
    pub text: String,
    /// Whether another attempt would end like this one.
    pub is_final: bool,
}

impl Failure {
    /// The service, or a layer around it, returned an error.
    pub fn of_processing(error: &(dyn Error + Send + Sync + 'static)) -> Self {
        match error.downcast_ref::<Refused>() {
            Some(refused) => refused.clone().into(),
            // The text of an unknown error is not used, because it may hold anything.
            None => Self::passing(semconv::OTHER, "the processing failed"),
        }
    }

    /// The processing failed, but another attempt may succeed.
    pub fn passing(reason: &'static str, text: &str) -> Self {
        Self { reason, text: text.to_owned(), is_final: false }
    }

    /// Another attempt would fail in the same way.
    pub fn last(reason: &'static str, text: impl Into<String>) -> Self {
        Self { reason, text: text.into(), is_final: true }
    }
}

impl From<LoginMessageError> for Failure {
    fn from(error: LoginMessageError) -> Self {
        Self::last(error.reason, error.text)
    }
}

impl From<Refused> for Failure {
    fn from(error: Refused) -> Self {
        // This is not final, because the rules in the database can be changed without a new release.
        Self::passing("refused_by_database", &error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_an_unknown_error_is_not_shown() {
        let error: tower::BoxError = "no such number: 13800138000".into();
        let failure = Failure::of_processing(&*error);
        assert_eq!((failure.reason, failure.is_final), ("_OTHER", false));
        assert!(!failure.text.contains("138"), "{failure:?}");
    }

    #[test]
    fn an_error_of_the_database_tells_its_code() {
        let error: tower::BoxError = Refused { code: "1811".to_owned() }.into();
        let failure = Failure::of_processing(&*error);
        assert_eq!(failure.reason, "refused_by_database");
        assert!(failure.text.contains("1811"), "{failure:?}");
    }
}
