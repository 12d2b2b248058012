//! Trace ids and span ids, which are bytes in OTLP and hexadecimal digits in Jaeger's JSON.

use std::{
    fmt::{self, Display, Formatter},
    str::FromStr,
};

/// A trace id: 16 bytes, not all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct TraceId(u128);

/// A span id: 8 bytes, not all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SpanId(u64);

impl TraceId {
    /// Returns `None` unless there are 16 bytes, not all zero. All other ids are invalid in W3C Trace Context
    /// and OpenTelemetry.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let id = u128::from_be_bytes(bytes.try_into().ok()?);
        (id != 0).then_some(Self(id))
    }
}

impl SpanId {
    /// Returns `None` unless there are 8 bytes, not all zero.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let id = u64::from_be_bytes(bytes.try_into().ok()?);
        (id != 0).then_some(Self(id))
    }
}

impl Display for TraceId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Display for SpanId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Parses hexadecimal digits. Leading zeros may be missing, as in Jaeger.
impl FromStr for TraceId {
    type Err = String;

    fn from_str(digits: &str) -> Result<Self, String> {
        // `from_str_radix` alone would also accept a sign.
        if digits.is_empty() || digits.len() > 32 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err("a trace id has 1 to 32 hexadecimal digits".to_owned());
        }
        u128::from_str_radix(digits, 16).map(Self).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_may_be_left_out() {
        let id: TraceId = "4bf92f".parse().unwrap();
        assert_eq!(id.to_string(), "0000000000000000000000000".to_owned() + "04bf92f");
        assert_eq!(Ok(id), "000000000000000000000000004BF92F".parse());
    }

    #[test]
    fn what_is_no_hexadecimal_number_of_32_digits_at_most_is_refused() {
        for id in ["", "+1", "-1", " 1", "0x1", "g", "1_0", "é", &"1".repeat(33)] {
            assert!(id.parse::<TraceId>().is_err(), "{id}");
        }
    }

    #[test]
    fn ids_of_another_length_or_of_zeros_only_are_invalid() {
        assert!(TraceId::from_bytes(&[1; 16]).is_some());
        assert!(SpanId::from_bytes(&[1; 8]).is_some());
        for bytes in [&[][..], &[1; 8], &[0; 16], &[1; 17]] {
            assert!(TraceId::from_bytes(bytes).is_none());
        }
        for bytes in [&[][..], &[1; 16], &[0; 8], &[1; 7]] {
            assert!(SpanId::from_bytes(bytes).is_none());
        }
    }
}
