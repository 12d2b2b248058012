//! Parses the hex digits of ids.

/// Parses exactly `length` lower-case hex digits, as the W3C formats demand.
pub(crate) fn lower_hex(digits: &str, length: usize) -> Option<u128> {
    let is_legal = digits.len() == length && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    is_legal.then(|| u128::from_str_radix(digits, 16).ok())?
}

/// Parses at most `longest` hex digits of either case, for the ids of B3 and Jaeger.
pub(crate) fn short_hex(digits: &str, longest: usize) -> Option<u128> {
    let is_legal = digits.len() <= longest && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_legal.then(|| u128::from_str_radix(digits, 16).ok())?
}
