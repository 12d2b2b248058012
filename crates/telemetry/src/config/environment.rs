//! Reads a variable as a value of the expected type. An error names the variable.

use http::{Uri, uri::Scheme};
use std::{ffi::OsString, str::FromStr, time::Duration};

/// A variable whose value can't be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct ConfigError {
    variable: String,
    /// Contains no secret, because the values of headers are left out.
    problem: String,
}

impl ConfigError {
    pub(crate) fn new(variable: &str, problem: impl Into<String>) -> Self {
        Self { variable: variable.to_owned(), problem: problem.into() }
    }
}

/// Looks up variables by name. Tests pass their own function.
pub(super) struct Environment<'a>(pub &'a dyn Fn(&str) -> Option<OsString>);

impl Environment<'_> {
    /// Returns the value, or `None` if the variable is unset or empty, which the specification treats alike.
    pub fn get(&self, variable: &str) -> Result<Option<String>, ConfigError> {
        let Some(value) = (self.0)(variable) else {
            return Ok(None);
        };
        let value = value.into_string().map_err(|_| ConfigError::new(variable, "the value is not UTF-8"))?;
        Ok(Some(value.trim().to_owned()).filter(|value| !value.is_empty()))
    }

    /// Returns the first of `variables` that is set. List the specific name before the general one.
    pub fn first<'v>(&self, variables: &[&'v str]) -> Result<Option<(&'v str, String)>, ConfigError> {
        for variable in variables {
            if let Some(value) = self.get(variable)? {
                return Ok(Some((variable, value)));
            }
        }
        Ok(None)
    }

    pub fn parse<T: FromStr>(&self, variable: &str, expected: &str) -> Result<Option<T>, ConfigError> {
        self.get(variable)?.map(|value| parse(variable, &value, expected)).transpose()
    }

    pub fn number<T: FromStr>(&self, variables: &[&str], default: T) -> Result<T, ConfigError> {
        match self.first(variables)? {
            Some((variable, value)) => parse(variable, &value, "a whole number"),
            None => Ok(default),
        }
    }

    /// Reads a time in milliseconds, of at most a year, because adding a longer time to an
    /// `Instant` may overflow.
    pub fn milliseconds(&self, variables: &[&str], default: u64) -> Result<Duration, ConfigError> {
        const LONGEST: u64 = 31_557_600_000;

        let Some((variable, value)) = self.first(variables)? else {
            return Ok(Duration::from_millis(default));
        };
        match parse(variable, &value, "a whole number")? {
            milliseconds @ 0..=LONGEST => Ok(Duration::from_millis(milliseconds)),
            _ => Err(ConfigError::new(variable, format!("expected at most {LONGEST}"))),
        }
    }

    /// Reads a time-out in milliseconds, for which zero means no limit.
    pub fn timeout(&self, variables: &[&str], default: u64) -> Result<Duration, ConfigError> {
        Ok(match self.milliseconds(variables, default)? {
            Duration::ZERO => Duration::MAX,
            timeout => timeout,
        })
    }

    pub fn boolean(&self, variable: &str) -> Result<bool, ConfigError> {
        match self.get(variable)?.map(|value| value.to_ascii_lowercase()).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => Err(unknown(variable, other, "true, false")),
        }
    }

    /// Reads a name and returns it in lower case, because known names are compared without regard to case.
    pub fn name<'v>(&self, variables: &[&'v str]) -> Result<Option<(&'v str, String)>, ConfigError> {
        Ok(self.first(variables)?.map(|(variable, name)| (variable, name.to_ascii_lowercase())))
    }

    /// Reads comma-separated names and returns them in lower case, each once.
    pub fn list(&self, variable: &str, default: &str) -> Result<Vec<String>, ConfigError> {
        let list = self.get(variable)?.map_or_else(|| default.to_owned(), |list| list.to_ascii_lowercase());
        let mut names: Vec<String> = Vec::new();
        for name in list.split(',').map(str::trim) {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Reads an absolute URL. A missing scheme is an error, because libraries disagree on which scheme is
    /// meant.
    pub fn endpoint<'v>(&self, variables: &[&'v str]) -> Result<Option<(&'v str, Uri)>, ConfigError> {
        let Some((variable, value)) = self.first(variables)? else {
            return Ok(None);
        };
        let malformed = |problem: &str| Err(ConfigError::new(variable, problem));
        let Ok(endpoint) = value.parse::<Uri>() else {
            return malformed("expected a URL like http://127.0.0.1:4317");
        };
        match (endpoint.scheme(), endpoint.authority()) {
            (Some(_), Some(authority)) if authority.as_str().contains('@') => {
                malformed("credentials belong in OTEL_EXPORTER_OTLP_HEADERS, not in the URL")
            }
            // The parser treats an invalid port as missing, so port 80 would be used.
            (Some(_), Some(authority))
                if authority.port_u16().is_none() && !authority.as_str().ends_with(authority.host()) =>
            {
                malformed("the port is not a number up to 65535")
            }
            (Some(scheme), Some(_)) if [Scheme::HTTP, Scheme::HTTPS].contains(scheme) => {
                Ok(Some((variable, endpoint)))
            }
            _ => malformed("expected a URL with its scheme, like http://127.0.0.1:4317"),
        }
    }
}

pub(super) fn parse<T: FromStr>(variable: &str, value: &str, expected: &str) -> Result<T, ConfigError> {
    value.parse().map_err(|_| ConfigError::new(variable, format!("expected {expected}, found {value:?}")))
}

pub(super) fn unknown(variable: &str, value: &str, known: &str) -> ConfigError {
    ConfigError::new(variable, format!("unknown value {value:?}; known values are {known}"))
}
