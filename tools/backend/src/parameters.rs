//! The parameters of a query, in the forms in which Jaeger's clients write them.

use super::ids::TraceId;
use axum::{
    extract::FromRequestParts,
    http::{StatusCode, request::Parts},
};
use std::{
    convert::Infallible,
    time::{SystemTime, UNIX_EPOCH},
};

/// The largest number of traces in one response. Jaeger's page never asks for more.
const MAX_TRACES: usize = 1500;

/// The parameters in the URL, after the `?`.
pub(super) struct Parameters(Vec<(String, String)>);

/// The status and the message with which a query is refused.
#[derive(Debug, PartialEq)]
pub(super) struct Refusal(pub StatusCode, pub String);

impl<S: Sync> FromRequestParts<S> for Parameters {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::parse(parts.uri.query().unwrap_or_default()))
    }
}

impl Parameters {
    pub fn parse(query: &str) -> Self {
        Self(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    /// Returns the parameter's first value that is not empty.
    pub fn first(&self, name: &str) -> Option<&str> {
        self.all(name).find(|value| !value.is_empty())
    }

    /// Returns all values of the parameter.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Parses the parameter's first value with `parse`.
    pub fn parsed<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Refusal> {
        let value = self.first(name).map(parse).transpose();
        value.map_err(|error| Refusal::malformed(&format!("unable to parse param '{name}': {error}")))
    }

    /// Returns how many traces the query asks for.
    pub fn limit(&self, name: &str, default: usize) -> Result<usize, Refusal> {
        let limit = self.parsed(name, |value| match value.parse::<u32>() {
            Ok(1..) => value.parse::<usize>().map_err(|error| error.to_string()),
            _ => Err("a number above zero is required".to_owned()),
        })?;
        Ok(limit.unwrap_or(default).min(MAX_TRACES))
    }
}

impl Refusal {
    pub fn malformed(why: &str) -> Self {
        Self(StatusCode::BAD_REQUEST, why.to_owned())
    }
}

/// Parses a trace id of 1 to 32 hexadecimal digits.
pub(super) fn trace_id(digits: &str) -> Result<TraceId, String> {
    digits.parse()
}

/// Parses microseconds since 1970; returns nanoseconds.
pub(super) fn microseconds(value: &str) -> Result<u64, String> {
    whole(value, 1000)
}

/// Parses milliseconds; returns nanoseconds.
pub(super) fn milliseconds(value: &str) -> Result<u64, String> {
    whole(value, 1_000_000)
}

fn whole(value: &str, unit: u64) -> Result<u64, String> {
    let number: u64 = value.parse().map_err(|_| format!("'{value}' is not a number"))?;
    // Times after the year 2554 don't fit into 64 bits, and become the latest time that fits.
    Ok(number.saturating_mul(unit))
}

/// Parses a duration as Go writes it, such as `1.5s`, `1h30m` or `250us`; returns nanoseconds. Also accepts
/// days, which Jaeger's page writes in `lookback`.
pub(super) fn duration(value: &str) -> Result<u64, String> {
    let malformed = || format!("'{value}' is not a duration such as 1.5s or 100ms");
    let mut rest = value;
    let mut sum = 0.0;
    if rest.is_empty() {
        return Err(malformed());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, unit_and_rest) = rest.split_at(digits);
        let letters = unit_and_rest.find(|c: char| c.is_ascii_digit() || c == '.');
        let (unit, after) = unit_and_rest.split_at(letters.unwrap_or(unit_and_rest.len()));
        let unit = match unit {
            "ns" => 1.0,
            // The second spelling has U+00B5, the micro sign. The third has U+03BC, the Greek letter.
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            "d" => 86400e9,
            _ => return Err(malformed()),
        };
        sum += number.parse::<f64>().map_err(|_| malformed())? * unit;
        rest = after;
    }
    // The conversion saturates, so an infinite duration becomes the largest number.
    Ok(sum.round() as u64)
}

/// Returns the current time in nanoseconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, nanoseconds) in [
            ("1ns", 1),
            ("1.2ms", 1_200_000),
            ("100us", 100_000),
            ("7µs", 7_000),
            ("7μs", 7_000),
            ("1h30m", 5_400_000_000_000),
            ("2d", 172_800_000_000_000),
            (".5s", 500_000_000),
            ("99999999999999999999h", u64::MAX),
        ] {
            assert_eq!(duration(text), Ok(nanoseconds), "{text}");
        }
        for text in ["", "1", "ms", "1 ms", "-1s", "1.2.3s", "1x", "1s2", "custom", ".s", "1é"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_parameter_may_come_more_than_once_and_percent_encoded() {
        let parameters = Parameters::parse("tag=a%3Ab&tag=c:d+e&empty=&tags=%7B%7D&x");
        assert_eq!(parameters.all("tag").collect::<Vec<_>>(), ["a:b", "c:d e"]);
        assert_eq!(parameters.first("empty"), None);
        assert_eq!(parameters.first("tags"), Some("{}"));
    }

    proptest! {
        #[test]
        fn nothing_that_is_asked_panics(text in any::<String>(), number in any::<f64>()) {
            let _ = (duration(&text), microseconds(&text), milliseconds(&text), trace_id(&text));
            let _ = duration(&format!("{number}s"));
            let parameters = Parameters::parse(&text);
            let _ = parameters.limit(&text, 1);
        }

        #[test]
        fn durations_in_whole_units_are_exact(number in 0..4_000_000_000u64) {
            prop_assert_eq!(duration(&format!("{number}ns")), Ok(number));
            prop_assert_eq!(duration(&format!("{number}us")), Ok(number * 1_000));
            prop_assert_eq!(duration(&format!("{number}ms")), Ok(number * 1_000_000));
        }
    }
}
