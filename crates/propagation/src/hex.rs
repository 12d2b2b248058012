//! Parses the hex digits of ids.

/// Parses exactly `2 * N` lower-case hex digits, as the W3C formats demand.
pub(crate) fn lower_hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    fn nibble(digit: u8) -> Option<u8> {
        match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        }
    }
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

/// Parses the ids of B3 and Jaeger. Unlike [`lower_hex`], this function accepts upper case, and pads with
/// zeros on the left.
pub(crate) fn padded_hex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let width = 2 * N;
    // An empty text is refused here, because it would be padded to zeros. `lower_hex` refuses too many
    // digits.
    let padded = (!digits.is_empty()).then(|| format!("{:0>width$}", digits.to_ascii_lowercase()))?;
    lower_hex(padded.as_bytes())
}
