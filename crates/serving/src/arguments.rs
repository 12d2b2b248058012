//! Reads flags and environment variables.

use clap::{Parser, error::ErrorKind};
use std::{env, time::Duration};

/// The longest duration that is accepted, which is a year. Adding a much longer duration to an `Instant` may
/// overflow, which panics.
const LONGEST: Duration = Duration::from_secs(31_557_600);

/// Reads flags and environment variables. An empty variable counts as unset, as for OpenTelemetry's own
/// variables, because a compose file can leave a variable empty, but can't unset it. Ends the process with
/// exit code 2 if a value is invalid, or if `check` refuses the configuration.
///
/// Check secrets in `check`, because clap's own messages quote the value.
pub fn parse<C: Parser>(check: impl FnOnce(&C) -> Result<(), String>) -> C {
    let command = C::command().mut_args(|argument| {
        let is_empty = |variable| env::var_os(variable).is_some_and(|value| value.is_empty());
        match argument.get_env().is_some_and(is_empty) {
            true => argument.env(None::<&'static str>),
            false => argument,
        }
    });
    let config = C::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    if let Err(problem) = check(&config) {
        C::command().error(ErrorKind::ValueValidation, problem).exit();
    }
    config
}

/// Reads a duration like `500ms`, of at most a year.
///
/// # Errors
/// If the duration is malformed, or longer than a year. The error says what is wrong.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration > LONGEST => Err("must be at most 1year".to_owned()),
        duration => duration.map_err(|error| error.to_string()),
    }
}

/// Reads a duration like [`duration`] does, but refuses 0.
///
/// # Errors
/// As for [`duration`], or if the duration is 0.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be more than 0".to_owned()),
        duration => Ok(duration),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_at_most_a_year() {
        assert_eq!(duration("1year"), Ok(LONGEST));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for refused in ["1year 1ns", "500000000000y", "99999999999999999999y", "-1s", "soon", ""] {
            assert!(duration(refused).is_err(), "{refused}");
            assert!(positive_duration(refused).is_err(), "{refused}");
        }
        assert!(positive_duration("0s").is_err());
    }
}
