//! Frames as bytes: taken from what a peer has sent, and appended to what it will get.
//!
//! Methods and tables are `amq-protocol`'s, lapin's own codec. Its parser calls itself for each table in a
//! table, so what is nested too deep is refused before it gets there.

use super::{exception::Exception, message::Message};
use amq_protocol::{
    frame::{AMQPFrame, gen_frame, parsing::parse_content_header},
    protocol::{AMQPClass, BasicProperties, constants, parse_class},
};
use bytes::{Buf, BytesMut};

/// The largest frame that is negotiated, in bytes. It is never 0, "no limit", which lapin does not take.
pub const FRAME_MAX: usize = 131_072;

/// What opens a connection, and what a peer that speaks something else is answered (section 4.2.2).
pub const PROTOCOL_HEADER: &[u8; 8] = b"AMQP\0\0\x09\x01";

/// Tables and arrays inside of each other; real ones have three or four.
const MAX_DEPTH: usize = 32;

/// Type, channel and size before the payload; the end mark after it (section 4.2.3).
const HEADER: usize = 7;
const OVERHEAD: usize = HEADER + 1;

/// A frame that a client may send.
#[derive(Debug, PartialEq)]
pub enum Frame {
    /// A method.
    Method(u16, AMQPClass),
    /// A content header: the size of the body, the properties, and the same as they came.
    Header(u16, u64, Box<BasicProperties>, Vec<u8>),
    /// A part of a body.
    Body(u16, Vec<u8>),
    /// A sign of life.
    Heartbeat,
}

/// Takes the next frame, if all of it is there.
pub fn take_frame(buffer: &mut BytesMut, frame_max: usize) -> Result<Option<Frame>, Exception> {
    let Some((&[kind, channel_high, channel_low, a, b, c, d], _)) = buffer.split_first_chunk() else {
        return Ok(None);
    };
    let channel = u16::from_be_bytes([channel_high, channel_low]);
    let size = u32::from_be_bytes([a, b, c, d]) as usize;
    // Some clients forget to count what is around the payload; RabbitMQ doesn't mind either.
    if size > frame_max {
        return Err(Exception::frame_error(format!("a frame of type {kind} has {size} bytes")));
    }
    if buffer.len() < size + OVERHEAD {
        return Ok(None);
    }
    let frame = buffer.split_to(size + OVERHEAD);
    let (payload, end) = frame[HEADER..].split_at(size);
    if end != [constants::FRAME_END] {
        return Err(Exception::frame_error(format!("a frame of type {kind} has no end mark")));
    }
    match kind {
        constants::FRAME_METHOD => Ok(Some(Frame::Method(channel, method(payload)?))),
        constants::FRAME_HEADER => header(channel, payload).map(Some),
        constants::FRAME_BODY => Ok(Some(Frame::Body(channel, payload.to_vec()))),
        constants::FRAME_HEARTBEAT if channel == 0 => Ok(Some(Frame::Heartbeat)),
        _ => Err(Exception::frame_error(format!("no frame has type {kind} on channel {channel}"))),
    }
}

fn method(payload: &[u8]) -> Result<AMQPClass, Exception> {
    let malformed = || Exception::syntax_error("malformed method");
    let Some((&[a, b, c, d], mut arguments)) = payload.split_first_chunk() else {
        return Err(malformed());
    };
    let id = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    // What is before the table: bytes, short strings, bytes.
    let before_the_table = match id {
        (10, 11) => Some((0, 0, 0)),
        (40, 10) | (60, 20) => Some((2, 2, 1)),
        (40, 30 | 40) | (50, 20) => Some((2, 3, 1)),
        (50, 10) => Some((2, 1, 1)),
        (50, 50) => Some((2, 3, 0)),
        (10, 31 | 40 | 50 | 51 | 70) | (20, 10 | 20 | 21 | 40 | 41) | (30, 10) | (40, 20) => None,
        (50, 30 | 40) | (60, 10 | 30 | 31 | 40 | 70 | 80 | 90 | 100 | 110 | 120) => None,
        (85, 10) | (90, 10 | 20 | 30) => None,
        _ => return Err(Exception::command_invalid(format!("unimplemented method {id:?}"))),
    };
    if let Some((bytes, strings, more_bytes)) = before_the_table {
        skip(&mut arguments, bytes).ok_or_else(malformed)?;
        for _ in 0..strings {
            let length = arguments.try_get_u8().map_err(|_| malformed())?;
            skip(&mut arguments, length.into()).ok_or_else(malformed)?;
        }
        skip(&mut arguments, more_bytes).ok_or_else(malformed)?;
        check_depth(arguments)?;
    }
    match parse_class(payload) {
        Ok(([], method)) => Ok(method),
        _ => Err(malformed()),
    }
}

fn header(channel: u16, payload: &[u8]) -> Result<Frame, Exception> {
    /// Class, weight and body size.
    const BEFORE_PROPERTIES: usize = 12;
    const CONTENT_TYPE: u16 = 1 << 15;
    const CONTENT_ENCODING: u16 = 1 << 14;
    const HEADERS: u16 = 1 << 13;
    const UNKNOWN: u16 = 0b11;

    let malformed = || Exception::syntax_error("malformed content header");
    let properties = payload.get(BEFORE_PROPERTIES..).ok_or_else(malformed)?;
    let mut rest = properties;
    let flags = rest.try_get_u16().map_err(|_| malformed())?;
    if flags & UNKNOWN != 0 {
        return Err(malformed());
    }
    for string in [CONTENT_TYPE, CONTENT_ENCODING] {
        if flags & string != 0 {
            let length = rest.try_get_u8().map_err(|_| malformed())?;
            skip(&mut rest, length.into()).ok_or_else(malformed)?;
        }
    }
    if flags & HEADERS != 0 {
        check_depth(rest)?;
    }
    match parse_content_header(payload) {
        Ok(([], header)) if header.class_id == 60 => {
            Ok(Frame::Header(channel, header.body_size, Box::new(header.properties), properties.to_vec()))
        }
        Ok(([], header)) => {
            let class = header.class_id;
            Err(Exception::unexpected_frame(format!("a content header for class {class}, which has none")))
        }
        _ => Err(malformed()),
    }
}

fn skip(bytes: &mut &[u8], count: usize) -> Option<()> {
    *bytes = bytes.get(count..)?;
    Some(())
}

/// Whether the table that `bytes` begin with is well formed as to lengths, and not nested too deep.
fn check_depth(bytes: &[u8]) -> Result<(), Exception> {
    let malformed = || Exception::syntax_error("malformed table");
    // The tables and arrays around the current position: where each ends, and whether it has names.
    let mut around: Vec<(usize, bool)> = Vec::new();
    let mut rest = bytes;
    let table_end = |rest: &mut &[u8]| -> Option<usize> {
        let length = rest.try_get_u32().ok()? as usize;
        (length <= rest.len()).then(|| bytes.len() - rest.len() + length)
    };
    around.push((table_end(&mut rest).ok_or_else(malformed)?, true));
    while let Some(&(end, has_names)) = around.last() {
        let position = bytes.len() - rest.len();
        if position >= end {
            around.pop();
            continue;
        }
        if has_names {
            let length = rest.try_get_u8().map_err(|_| malformed())?;
            skip(&mut rest, length.into()).ok_or_else(malformed)?;
        }
        let size = match rest.try_get_u8().map_err(|_| malformed())? {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'S' | b'x' => rest.try_get_u32().map_err(|_| malformed())? as usize,
            kind @ (b'F' | b'A') => {
                if around.len() == MAX_DEPTH {
                    return Err(Exception::syntax_error("a table is nested too deep"));
                }
                around.push((table_end(&mut rest).ok_or_else(malformed)?, kind == b'F'));
                0
            }
            _ => return Err(malformed()),
        };
        skip(&mut rest, size).ok_or_else(malformed)?;
    }
    Ok(())
}

/// Appends a method.
pub fn put_method(buffer: &mut Vec<u8>, channel: u16, method: AMQPClass) {
    put(buffer, &AMQPFrame::Method(channel, method));
}

/// Appends a sign of life.
pub fn put_heartbeat(buffer: &mut Vec<u8>) {
    put(buffer, &AMQPFrame::Heartbeat);
}

fn put(buffer: &mut Vec<u8>, frame: &AMQPFrame) {
    let appended = gen_frame(frame)(std::mem::take(buffer).into());
    *buffer = appended.expect("a Vec takes all that is written").into_inner().0;
}

/// Appends the content of a message: its header, then its body in as many frames as it takes.
pub fn put_content(buffer: &mut Vec<u8>, channel: u16, message: &Message, frame_max: usize) {
    let mut header = vec![0, 60, 0, 0];
    header.extend((message.body.len() as u64).to_be_bytes());
    put_raw(buffer, constants::FRAME_HEADER, channel, &[&header, &message.properties]);
    for part in message.body.chunks(frame_max - OVERHEAD) {
        put_raw(buffer, constants::FRAME_BODY, channel, &[part]);
    }
}

fn put_raw(buffer: &mut Vec<u8>, kind: u8, channel: u16, payload: &[&[u8]]) {
    let size: usize = payload.iter().map(|part| part.len()).sum();
    buffer.reserve(size + OVERHEAD);
    buffer.push(kind);
    buffer.extend(channel.to_be_bytes());
    // No part is longer than what was taken from a frame, or than a frame may be.
    buffer.extend((size as u32).to_be_bytes());
    for part in payload {
        buffer.extend_from_slice(part);
    }
    buffer.push(constants::FRAME_END);
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::{
        protocol::{basic, queue},
        types::{AMQPValue, FieldArray, FieldTable},
    };
    use proptest::{collection::vec, prelude::*};

    fn declare(arguments: FieldTable) -> AMQPClass {
        let declare = queue::Declare { queue: "q".into(), arguments, ..Default::default() };
        AMQPClass::Queue(queue::AMQPMethod::Declare(declare))
    }

    /// A table in a table, so many times, the innermost in an array.
    fn nested(depth: usize) -> FieldTable {
        let mut array = FieldArray::default();
        array.push(AMQPValue::LongInt(1));
        let mut table = FieldTable::default();
        table.insert("array".into(), AMQPValue::FieldArray(array));
        for _ in 0..depth {
            let mut outer = FieldTable::default();
            outer.insert("t".into(), AMQPValue::FieldTable(table));
            table = outer;
        }
        table
    }

    fn message() -> Message {
        let properties = BasicProperties::default()
            .with_content_type("text/plain".into())
            .with_headers(nested(2))
            .with_expiration("5".into());
        let properties = amq_protocol::protocol::basic::gen_properties(&properties)(Vec::new().into());
        Message {
            exchange: "x".into(),
            routing_key: "k".into(),
            properties: properties.unwrap().into_inner().0,
            body: vec![7; 10_000].into(),
            expiration: None,
        }
    }

    /// Everything that a client may send in one go.
    fn valid() -> Vec<u8> {
        let mut bytes = Vec::new();
        put_method(&mut bytes, 1, declare(nested(3)));
        let publish = basic::Publish { exchange: "x".into(), mandatory: true, ..Default::default() };
        put_method(&mut bytes, 1, AMQPClass::Basic(basic::AMQPMethod::Publish(publish)));
        put_content(&mut bytes, 1, &message(), 4096);
        put_heartbeat(&mut bytes);
        bytes
    }

    fn take_all(bytes: &[u8]) -> Outcome {
        let mut buffer = BytesMut::from(bytes);
        while take_frame(&mut buffer, FRAME_MAX)?.is_some() {}
        Ok(())
    }

    type Outcome = Result<(), Exception>;

    #[test]
    fn what_is_put_is_taken_again() {
        let mut buffer = BytesMut::from(&valid()[..]);
        let mut take = || take_frame(&mut buffer, 4096).unwrap();
        assert_eq!(take(), Some(Frame::Method(1, declare(nested(3)))));
        assert!(matches!(take(), Some(Frame::Method(1, AMQPClass::Basic(_)))));
        let Some(Frame::Header(1, 10_000, properties, raw)) = take() else { panic!("no header") };
        assert_eq!((properties.expiration().as_ref().unwrap().as_str(), raw), ("5", message().properties));
        for size in [4088, 4088, 1824] {
            assert_eq!(take(), Some(Frame::Body(1, vec![7; size])));
        }
        assert_eq!((take(), take()), (Some(Frame::Heartbeat), None));
    }

    #[test]
    fn a_frame_is_waited_for_until_it_is_complete() {
        let mut bytes = Vec::new();
        put_method(&mut bytes, 1, declare(nested(3)));
        for length in 0..bytes.len() {
            let mut buffer = BytesMut::from(&bytes[..length]);
            assert_eq!(take_frame(&mut buffer, FRAME_MAX), Ok(None), "{length}");
            assert_eq!(buffer.len(), length);
        }
    }

    #[test]
    fn a_table_that_is_nested_too_deep_is_refused_before_it_is_parsed() {
        let mut bytes = Vec::new();
        put_method(&mut bytes, 1, declare(nested(MAX_DEPTH - 2)));
        assert_eq!(take_all(&bytes), Ok(()));
        bytes.clear();
        put_method(&mut bytes, 1, declare(nested(MAX_DEPTH - 1)));
        assert_eq!(take_all(&bytes).unwrap_err().code(), 502);

        // As many arrays as fit into a frame: the parser would overflow the stack.
        let depth = (FRAME_MAX - 64) / 5;
        let mut table = vec![1, b'a'];
        for level in 0..depth {
            table.push(b'A');
            table.extend((((depth - 1 - level) * 5) as u32).to_be_bytes());
        }
        let mut payload = vec![0, 50, 0, 10, 0, 0, 0, 0];
        payload.extend((table.len() as u32).to_be_bytes());
        payload.extend(table);
        let mut bytes = Vec::new();
        put_raw(&mut bytes, constants::FRAME_METHOD, 1, &[&payload]);
        assert_eq!(take_all(&bytes).unwrap_err().code(), 502);
    }

    #[test]
    fn a_method_with_something_behind_it_is_refused() {
        let mut bytes = Vec::new();
        put_raw(&mut bytes, constants::FRAME_METHOD, 1, &[&[0, 20, 0, 10, 0, b'x']]);
        assert_eq!(take_all(&bytes).unwrap_err().code(), 502);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in vec(any::<u8>(), 0..2000)) {
            let _ = take_all(&bytes);
        }

        #[test]
        fn no_payload_is_too_strange(kind in 1_u8..9, class in 0_u16..100, method in 0_u16..120, rest in vec(any::<u8>(), 0..300)) {
            let mut bytes = Vec::new();
            put_raw(&mut bytes, kind, 1, &[&class.to_be_bytes(), &method.to_be_bytes(), &rest]);
            let _ = take_all(&bytes);
        }

        #[test]
        fn no_change_is_too_subtle(changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8)) {
            let mut bytes = valid();
            for (index, byte) in changes {
                let index = index.index(bytes.len());
                bytes[index] = byte;
            }
            let _ = take_all(&bytes);
        }
    }
}
