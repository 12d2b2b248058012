//! Flags and environment.

use clap::Parser;
use std::env;

/// Reads flags and environment. A variable that is empty counts as unset, as OpenTelemetry has it for its own:
/// compose files can only leave one empty. Ends the process with 2 if something can't be honoured.
pub fn parse<C: Parser>() -> C {
    let command = C::command().mut_args(|argument| {
        let is_empty = |variable| env::var_os(variable).is_some_and(|value| value.is_empty());
        match argument.get_env().is_some_and(is_empty) {
            true => argument.env(None::<&'static str>),
            false => argument,
        }
    });
    C::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}
