//! Checks the content header of a message (AMQP 0-9-1, section 4.2.6.1) before it is parsed. lapin's parser
//! calls itself for each table inside a table, and the producer decides how deep the tables are nested.

use bytes::Buf;

/// The deepest nesting of tables and arrays that is allowed. Real messages have three or four levels.
pub const MAX_DEPTH: usize = 32;

/// The length in bytes of a frame's head, which is its type, channel and size. The payload and one more byte
/// follow (AMQP 0-9-1, section 4.2.3).
pub const FRAME_HEAD: usize = 7;

/// The length in bytes of class, weight and body size, which come before the properties of a content header
/// (section 4.2.6.1).
pub const CONTENT_HEAD: usize = 12;

/// Why a table, or properties with a table, can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A length or a type is wrong.
    Malformed,
    /// Tables and arrays are nested deeper than [`MAX_DEPTH`] levels.
    TooDeep,
}

/// Checks that the lengths in the payload of a content header are right, and that its table of headers is not
/// nested too deep. Does not check whether strings are UTF-8.
///
/// # Errors
/// If the payload is malformed, or nested too deep.
pub fn check_content_header(payload: &[u8]) -> Result<(), Fault> {
    #[derive(Clone, Copy)]
    enum Property {
        Bytes(usize),
        ShortString,
        Table,
    }
    use Property::{Bytes, ShortString, Table};
    /// The properties in the order of their flags, from the highest bit down, as in the specification's class
    /// `basic`.
    const PROPERTIES: [Property; 14] = [
        ShortString, // content-type
        ShortString, // content-encoding
        Table,       // headers
        Bytes(1),    // delivery-mode
        Bytes(1),    // priority
        ShortString, // correlation-id
        ShortString, // reply-to
        ShortString, // expiration
        ShortString, // message-id
        Bytes(8),    // timestamp
        ShortString, // type
        ShortString, // user-id
        ShortString, // app-id
        ShortString, // cluster-id
    ];

    let mut rest = payload.get(CONTENT_HEAD..).ok_or(Fault::Malformed)?;
    let flags = rest.try_get_u16().map_err(|_| Fault::Malformed)?;
    for (_, property) in PROPERTIES.iter().enumerate().filter(|(i, _)| flags & (1 << 15 >> i) != 0) {
        match property {
            Bytes(count) => skip(&mut rest, *count)?,
            ShortString => skip_short_string(&mut rest)?,
            Table => rest = check_table(rest)?,
        }
    }
    // No property belongs to the last two flags.
    if flags & 0b11 == 0 && rest.is_empty() { Ok(()) } else { Err(Fault::Malformed) }
}

/// Checks that the lengths in the table at the start of `bytes` are right, and that it is not nested too
/// deep. Returns the bytes after the table.
///
/// # Errors
/// If the table is malformed, or nested too deep.
pub fn check_table(bytes: &[u8]) -> Result<&[u8], Fault> {
    // For each table or array around the current position: where it ends, and whether its values have names.
    let mut around: Vec<(usize, bool)> = Vec::new();
    let mut rest = bytes;
    let table_end = |rest: &mut &[u8]| {
        let length = rest.try_get_u32().map_err(|_| Fault::Malformed)? as usize;
        if length > rest.len() { Err(Fault::Malformed) } else { Ok(bytes.len() - rest.len() + length) }
    };
    around.push((table_end(&mut rest)?, true));
    while let Some(&(end, has_names)) = around.last() {
        let position = bytes.len() - rest.len();
        if position >= end {
            around.pop();
            continue;
        }
        if has_names {
            skip_short_string(&mut rest)?;
        }
        let size = match rest.try_get_u8().map_err(|_| Fault::Malformed)? {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'S' | b'x' => rest.try_get_u32().map_err(|_| Fault::Malformed)? as usize,
            kind @ (b'F' | b'A') => {
                if around.len() == MAX_DEPTH {
                    return Err(Fault::TooDeep);
                }
                around.push((table_end(&mut rest)?, kind == b'F'));
                0
            }
            _ => return Err(Fault::Malformed),
        };
        skip(&mut rest, size)?;
    }
    Ok(rest)
}

/// Skips a byte that contains a length, and then this many bytes.
///
/// # Errors
/// If there are fewer bytes.
pub fn skip_short_string(bytes: &mut &[u8]) -> Result<(), Fault> {
    let length = bytes.try_get_u8().map_err(|_| Fault::Malformed)?;
    skip(bytes, length.into())
}

/// Skips `count` bytes.
///
/// # Errors
/// If there are fewer bytes.
pub fn skip(bytes: &mut &[u8], count: usize) -> Result<(), Fault> {
    *bytes = bytes.get(count..).ok_or(Fault::Malformed)?;
    Ok(())
}
