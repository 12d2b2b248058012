//! Parses frames from the bytes that a peer sent, and appends frames to the output for a peer.
//!
//! Methods and tables use `amq-protocol`, which is lapin's codec. Its parser recurses for each nested table,
//! so tables that are nested too deeply are refused before they are parsed.

use super::{exception::Exception, message::Message};
use amq_protocol::{
    frame::{AMQPFrame, gen_frame, parsing::parse_content_header},
    protocol::{AMQPClass, BasicProperties, constants, parse_class},
};
use amqp::content_header::{CONTENT_HEAD, Fault, check_content_header, check_table, skip, skip_short_string};
use bytes::BytesMut;

/// The largest frame that the broker negotiates, in bytes. It is not 0 ("no limit"), because lapin does not
/// accept 0.
pub const FRAME_MAX: usize = 131_072;

/// The bytes that open a connection. The broker also sends them to a peer that speaks another protocol
/// (section 4.2.2).
pub const PROTOCOL_HEADER: &[u8; 8] = b"AMQP\0\0\x09\x01";

/// The number of bytes before the payload of a frame: the type, the channel and the size (section 4.2.3).
const HEADER: usize = 7;

/// The number of bytes of a frame without its payload. After the payload, there is only the end mark.
const OVERHEAD: usize = HEADER + 1;

/// A frame that a client may send.
#[derive(Debug, PartialEq)]
pub enum Frame {
    /// A method.
    Method(u16, AMQPClass),
    /// A content header: the size of the body, the parsed properties, and the properties as received.
    Header(u16, u64, Box<BasicProperties>, Vec<u8>),
    /// A part of a body.
    Body(u16, Vec<u8>),
    /// A heartbeat.
    Heartbeat,
}

/// Takes the next frame, or returns `None` if the frame is incomplete.
pub fn take_frame(buffer: &mut BytesMut, frame_max: usize) -> Result<Option<Frame>, Exception> {
    let Some((&[kind, channel_high, channel_low, a, b, c, d], _)) = buffer.split_first_chunk() else {
        return Ok(None);
    };
    let channel = u16::from_be_bytes([channel_high, channel_low]);
    let size = u32::from_be_bytes([a, b, c, d]) as usize;
    // Some clients forget that `frame_max` includes the header and the end mark, and RabbitMQ accepts their
    // frames, too.
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
        _ => Err(Exception::frame_error(format!("a frame of type {kind} is not valid on channel {channel}"))),
    }
}

fn method(payload: &[u8]) -> Result<AMQPClass, Exception> {
    let malformed = || Exception::syntax_error("malformed method");
    let Some((&[a, b, c, d], mut arguments)) = payload.split_first_chunk() else {
        return Err(malformed());
    };
    let id = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    // The arguments before the table, as three numbers: first the number of bytes, then the number of short
    // strings, then the number of bytes that follow these strings.
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
        skip(&mut arguments, bytes).map_err(syntax_error)?;
        for _ in 0..strings {
            skip_short_string(&mut arguments).map_err(syntax_error)?;
        }
        skip(&mut arguments, more_bytes).map_err(syntax_error)?;
        check_table(arguments).map_err(syntax_error)?;
    }
    match parse_class(payload) {
        Ok(([], method)) => Ok(method),
        _ => Err(malformed()),
    }
}

/// Parses a content header. The broker passes well-formed properties on unchanged, even if their strings are
/// not UTF-8 or their tables are nested too deep. The broker can't read such properties, so it acts as if the
/// message had none. RabbitMQ also passes them on, because it does not check them.
fn header(channel: u16, payload: &[u8]) -> Result<Frame, Exception> {
    let malformed = || Exception::syntax_error("malformed content header");
    let (head, properties) = payload.split_at_checked(CONTENT_HEAD).ok_or_else(malformed)?;
    let class = u16::from_be_bytes([head[0], head[1]]);
    let read = match check_content_header(payload) {
        Ok(()) => parse_content_header(payload).map(|(_, header)| header.properties).unwrap_or_default(),
        Err(Fault::TooDeep) => BasicProperties::default(),
        Err(Fault::Malformed) => return Err(malformed()),
    };
    if class != 60 {
        return Err(Exception::unexpected_frame(format!(
            "a content header for class {class}, which has no content"
        )));
    }
    let body_size = u64::from_be_bytes(*head.last_chunk().ok_or_else(malformed)?);
    Ok(Frame::Header(channel, body_size, Box::new(read), properties.to_vec()))
}

fn syntax_error(fault: Fault) -> Exception {
    Exception::syntax_error(match fault {
        Fault::Malformed => "malformed method",
        Fault::TooDeep => "a table is nested too deep",
    })
}

/// Appends a method.
pub fn put_method(buffer: &mut Vec<u8>, channel: u16, method: AMQPClass) {
    put(buffer, &AMQPFrame::Method(channel, method));
}

/// Appends a heartbeat.
pub fn put_heartbeat(buffer: &mut Vec<u8>) {
    put(buffer, &AMQPFrame::Heartbeat);
}

fn put(buffer: &mut Vec<u8>, frame: &AMQPFrame) {
    let appended = gen_frame(frame)(std::mem::take(buffer).into());
    *buffer = appended.expect("a Vec takes all that is written").into_inner().0;
}

/// Appends the content of a message: its header, then its body in as many frames as needed.
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
    // The cast loses nothing, because no payload is longer than a frame may be.
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
    use amqp::content_header::MAX_DEPTH;
    use proptest::{collection::vec, prelude::*};

    fn declare(arguments: FieldTable) -> AMQPClass {
        let declare = queue::Declare { queue: "q".into(), arguments, ..Default::default() };
        AMQPClass::Queue(queue::AMQPMethod::Declare(declare))
    }

    /// Makes `depth` nested tables, with an array in the innermost table.
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

    /// Encodes frames of every kind that a client may send.
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

        // This is the deepest nesting of arrays that fits into a frame. It would overflow the parser's stack.
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
