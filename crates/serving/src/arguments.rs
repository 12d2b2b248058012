//! Reads flags and environment variables.

use clap::Parser;
use std::env;

/// Reads flags and environment variables. An empty variable counts as unset, as for OpenTelemetry's own
/// variables, because a compose file can't unset a variable, only leave it empty. Ends the process with exit
/// code 2 if a value can't be honoured.
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
