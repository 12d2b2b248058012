//! Divides the bytes from a broker into frames, and replaces the content headers that lapin can't read. The
//! module `inbound` gives the reasons.

use crate::{
    content_header::{CONTENT_HEAD, FRAME_HEAD, check_content_header},
    properties::{BODY_CUT, UNREADABLE, encoded, fit},
};
use amq_protocol::{
    frame::parsing::parse_content_header,
    protocol::{BasicProperties, constants},
    types::AMQPValue,
};
use bytes::BytesMut;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// The longest unreadable properties, in bytes, that are kept.
const LONGEST_KEPT: usize = 64 * 1024;

/// The longest frame in bytes that is negotiated, and that is buffered for a check. Brokers rarely allow
/// frames above 128 KiB. A frame above this limit goes to lapin unchecked, and lapin refuses it.
pub const LONGEST_FRAME: usize = 1024 * 1024;

/// The longest frame and the longest body that are passed on to lapin.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The longest frame in bytes, as negotiated. No content arrives before the negotiation.
    pub frame_max: Arc<AtomicUsize>,
    /// The longest body of a message in bytes.
    pub longest_body: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { frame_max: Arc::new(LONGEST_FRAME.into()), longest_body: usize::MAX }
    }
}

/// Divides the bytes of a connection into frames.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    limits: Limits,
    /// The bytes that lapin may read.
    pub checked: BytesMut,
    /// The buffered start of a frame: its head, or all bytes so far if the frame is inspected.
    held: BytesMut,
    /// How many more bytes belong to a frame that needs no check.
    passing: usize,
    /// The channels whose current body is cut, and how many bytes of it may still pass.
    cut: BTreeMap<[u8; 2], usize>,
}

impl Frames {
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Takes the next bytes from the broker.
    pub fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let missing = match self.passing {
                0 => self.wanted() - self.held.len(),
                passing => passing,
            };
            let (now, later) = bytes.split_at(bytes.len().min(missing));
            bytes = later;
            if self.passing > 0 {
                self.checked.extend_from_slice(now);
                self.passing -= now.len();
                continue;
            }
            self.held.extend_from_slice(now);
            if self.held.len() == self.wanted() {
                let mut held = std::mem::take(&mut self.held);
                self.release(&held);
                held.clear();
                self.held = held;
            }
        }
    }

    /// Returns how many bytes of a frame must be buffered: the whole frame if it is inspected, otherwise only
    /// its head.
    fn wanted(&self) -> usize {
        match self.held.first_chunk() {
            Some(head) if self.is_looked_at(head) => FRAME_HEAD + size(head) + 1,
            _ => FRAME_HEAD,
        }
    }

    /// Whether the frame is inspected. A frame is inspected if it is a content header, or a part of a body
    /// that is cut, and if it is short enough to be buffered.
    fn is_looked_at(&self, head: &[u8; FRAME_HEAD]) -> bool {
        let is_cut = |channel| self.cut.contains_key(&channel);
        let [kind, a, b, ..] = *head;
        size(head) <= LONGEST_FRAME
            && (kind == constants::FRAME_HEADER || kind == constants::FRAME_BODY && is_cut([a, b]))
    }

    /// Passes on the buffered bytes, or other bytes in their place.
    fn release(&mut self, held: &[u8]) {
        let Some(head @ &[kind, a, b, ..]) = held.first_chunk::<FRAME_HEAD>() else {
            return;
        };
        if !self.is_looked_at(head) {
            self.checked.extend_from_slice(held);
            // A broker that does not understand the client answers with "AMQP" and a version. Nothing follows
            // that answer.
            self.passing = if kind == b'A' { usize::MAX } else { size(head) + 1 };
            return;
        }
        let payload = &held[FRAME_HEAD..FRAME_HEAD + size(head)];
        match self.cut.get_mut(&[a, b]).filter(|_| kind == constants::FRAME_BODY) {
            Some(left) => {
                let part = &payload[..payload.len().min(*left)];
                *left -= part.len();
                // lapin expects no further part once the body is complete.
                if !part.is_empty() {
                    put(&mut self.checked, kind, [a, b], &[part]);
                }
            }
            None => match self.replacement([a, b], payload) {
                Some(parts) => put(&mut self.checked, kind, [a, b], &[&parts.0, &parts.1]),
                None => self.checked.extend_from_slice(held),
            },
        }
    }

    /// If lapin can't or must not read this content header, returns the two parts of its replacement. Also
    /// notes whether the body that follows is cut.
    fn replacement(&mut self, channel: [u8; 2], payload: &[u8]) -> Option<([u8; CONTENT_HEAD], Vec<u8>)> {
        // lapin refuses a payload that is too short.
        let (head, properties) = payload.split_first_chunk::<CONTENT_HEAD>()?;
        let frame_max = self.limits.frame_max.load(Relaxed);
        let body_size = u64::from_be_bytes(*head.last_chunk()?);
        let body_left = body_size.min(self.limits.longest_body as u64);
        let read = read(payload);
        self.cut.remove(&channel);
        if read.is_some() && body_left == body_size && FRAME_HEAD + payload.len() < frame_max {
            return None;
        }
        let mut added = Vec::new();
        if read.is_none() {
            let kept = if properties.len() <= LONGEST_KEPT.min(frame_max / 2) { properties } else { &[] };
            added.push((UNREADABLE, AMQPValue::LongString(kept.into())));
        }
        if body_left < body_size {
            added.push((BODY_CUT, AMQPValue::LongLongInt(body_size.try_into().unwrap_or(i64::MAX))));
            self.cut.insert(channel, self.limits.longest_body);
        }
        let mut head = *head;
        head[4..].copy_from_slice(&body_left.to_be_bytes());
        Some((head, encoded(&fit(read.unwrap_or_default(), &added, frame_max))))
    }
}

/// Returns the size of a frame's payload.
fn size(&[_, _, _, a, b, c, d]: &[u8; FRAME_HEAD]) -> usize {
    u32::from_be_bytes([a, b, c, d]) as usize
}

/// Reads the payload of a content header. Returns `None` if lapin can't read it.
fn read(payload: &[u8]) -> Option<BasicProperties> {
    check_content_header(payload).ok()?;
    match parse_content_header(payload) {
        Ok(([], header)) => Some(header.properties),
        _ => None,
    }
}

/// Appends a frame.
fn put(out: &mut BytesMut, kind: u8, [a, b]: [u8; 2], payload: &[&[u8]]) {
    let size: usize = payload.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&[kind, a, b]);
    out.extend_from_slice(&(size as u32).to_be_bytes());
    payload.iter().for_each(|part| out.extend_from_slice(part));
    out.extend_from_slice(&[constants::FRAME_END]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content_header::MAX_DEPTH;
    use amq_protocol::{
        frame::{AMQPFrame, WriteContext, gen_frame, parse_frame},
        types::FieldTable,
    };
    use proptest::{collection::vec, prelude::*};

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![kind, 0, 7];
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        frame.push(constants::FRAME_END);
        frame
    }

    /// A content header for a body of five bytes.
    fn content_header(properties: &[u8]) -> Vec<u8> {
        let payload = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5], properties].concat();
        frame(constants::FRAME_HEADER, &payload)
    }

    /// Returns properties with one header, whose value is nested arrays.
    fn nested(depth: usize) -> Vec<u8> {
        let mut value = vec![b'V'];
        for _ in 0..depth {
            let mut array = vec![b'A'];
            array.extend((value.len() as u32).to_be_bytes());
            array.extend(&value);
            value = array;
        }
        let mut properties = vec![0x20, 0];
        properties.extend((value.len() as u32 + 2).to_be_bytes());
        properties.extend([1, b'k']);
        properties.extend(value);
        properties
    }

    /// Returns the bytes that pass the check if `bytes` arrive in pieces of this size.
    fn checked(bytes: &[u8], piece: usize) -> Vec<u8> {
        let mut frames = Frames::default();
        bytes.chunks(piece).for_each(|piece| frames.take(piece));
        frames.checked.to_vec()
    }

    /// Properties with a message id of two bytes that are not UTF-8.
    const NOT_UTF8: &[u8] = &[0x00, 0x80, 2, 0xff, 0xfe];

    #[test]
    fn what_can_be_read_passes_as_it_came_whatever_the_pieces() {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), AMQPValue::LongString("00-x".into()));
        let properties = BasicProperties::default().with_headers(headers).with_message_id("id".into());
        let stream = [
            frame(constants::FRAME_METHOD, b"a method"),
            content_header(&encoded(&properties)),
            frame(constants::FRAME_BODY, b"hello"),
            frame(constants::FRAME_HEARTBEAT, b""),
            content_header(&nested(MAX_DEPTH - 1)),
            content_header(&[0, 0]),
        ]
        .concat();
        for piece in [1, 2, 7, 8, 13, stream.len()] {
            assert_eq!(checked(&stream, piece), stream, "{piece}");
        }
        assert_eq!(checked(b"AMQP\0\0\x09\x01", 3), b"AMQP\0\0\x09\x01");
    }

    #[test]
    fn what_cannot_be_read_is_replaced_and_the_message_stays() {
        for (properties, kept) in [
            (NOT_UTF8, NOT_UTF8),
            (&nested(MAX_DEPTH), &nested(MAX_DEPTH)),
            // So many arrays would overflow the stack.
            (&nested(20_000), b""),
            // The first table is longer than its frame, and the second one has a value of an unknown type.
            (b"\x20\0\0\0\0\x09\x01k", b"\x20\0\0\0\0\x09\x01k"),
            (b"\x20\0\0\0\0\x03\x01k?", b"\x20\0\0\0\0\x03\x01k?"),
        ] {
            // The frames before a content header must not let it pass unchecked.
            let before = [
                frame(constants::FRAME_HEARTBEAT, b""),
                frame(constants::FRAME_METHOD, b"a method"),
                frame(constants::FRAME_BODY, b""),
                content_header(&[0, 0]),
            ]
            .concat();
            let body = frame(constants::FRAME_BODY, b"hello");
            for piece in [1, 1000] {
                let out = checked(&[&before[..], &content_header(properties), &body].concat(), piece);
                let out = out.strip_prefix(&before[..]).unwrap();
                let (rest, header) = parse_frame(out).unwrap();
                let AMQPFrame::Header(7, header) = header else { panic!("{header:?}") };
                assert_eq!((header.class_id, header.body_size), (60, 5));
                let headers = header.properties.headers().clone().unwrap();
                assert_eq!(headers.inner()[UNREADABLE], AMQPValue::LongString(kept.into()));
                assert_eq!(rest, body);
            }
        }
    }

    /// Returns the frames that pass the check, with these limits, if `bytes` arrive in pieces of this size.
    fn limited(bytes: &[u8], piece: usize, longest_body: usize) -> Vec<AMQPFrame> {
        let limits = Limits { frame_max: Arc::new(4096.into()), longest_body };
        let mut frames = Frames::new(limits);
        bytes.chunks(piece).for_each(|piece| frames.take(piece));
        let (mut rest, mut read) = (&frames.checked[..], Vec::new());
        while !rest.is_empty() {
            let (after, frame) = parse_frame(rest).unwrap();
            assert!(rest.len() - after.len() <= 4096, "{frame:?}");
            rest = after;
            read.push(frame);
        }
        read
    }

    #[test]
    fn a_content_header_that_is_longer_than_a_frame_loses_its_longest_header() {
        let mut headers = FieldTable::default();
        headers.insert("long".into(), AMQPValue::LongString("x".repeat(6000).into()));
        headers.insert("short".into(), AMQPValue::LongString("y".into()));
        let properties = BasicProperties::default().with_headers(headers).with_message_id("id".into());
        let body = frame(constants::FRAME_BODY, b"hello");
        let long = [content_header(&encoded(&properties)), body.clone()].concat();
        let frames = limited(&long, 1000, 5);
        let [AMQPFrame::Header(7, header), AMQPFrame::Body(7, body)] = &frames[..] else {
            panic!("{frames:?}")
        };
        assert_eq!((header.body_size, &body[..]), (5, &b"hello"[..]));
        assert_eq!(header.properties.message_id().as_ref().unwrap().as_str(), "id");
        let headers = header.properties.headers().clone().unwrap();
        assert_eq!(
            headers.inner().keys().map(|name| name.as_str()).collect::<Vec<_>>(),
            ["short", "x-headers-left-out"]
        );
    }

    #[test]
    fn of_a_body_that_is_too_long_the_start_passes_and_the_next_message_is_whole() {
        let part = |channel: u8, text: &[u8]| {
            let mut part = frame(constants::FRAME_BODY, text);
            part[2] = channel;
            part
        };
        let stream = [
            content_header(&[0, 0]),
            part(7, b"he"),
            part(8, b"another channel"),
            part(7, b"ll"),
            part(7, b"o"),
            content_header(&[0, 0]),
            part(7, b"hello"),
        ]
        .concat();
        for piece in [1, 8, 1000] {
            let bodies = |longest| {
                let of_seven = |frame| match frame {
                    AMQPFrame::Header(7, header) => Some(format!("{}:", header.body_size)),
                    AMQPFrame::Body(7, text) => Some(String::from_utf8(text).unwrap()),
                    _ => None,
                };
                limited(&stream, piece, longest).into_iter().filter_map(of_seven).collect::<Vec<_>>()
            };
            assert_eq!(bodies(3), ["3:", "he", "l", "3:", "hel"]);
            assert_eq!(bodies(2), ["2:", "he", "2:", "he"]);
            assert_eq!(bodies(5), ["5:", "he", "ll", "o", "5:", "hello"]);
        }
        let AMQPFrame::Header(7, header) = &limited(&stream, 100, 3)[0] else { panic!("no header") };
        assert_eq!(header.properties.headers().clone().unwrap().inner()[BODY_CUT], AMQPValue::LongLongInt(5));
    }

    proptest! {
        #[test]
        fn whatever_comes_lapin_reads_what_passes(properties in vec(any::<u8>(), 0..60), piece in 1usize..20) {
            let out = checked(&content_header(&properties), piece);
            prop_assert!(parse_frame(&out[..]).is_ok(), "{:?}", out);
        }

        #[test]
        fn any_bytes_in_any_pieces_pass_without_panic(bytes in vec(any::<u8>(), 0..200), piece in 1usize..20) {
            let _ = checked(&bytes, piece);
        }

        #[test]
        fn what_lapin_writes_passes_as_it_came(id in ".{0,60}", name in ".{0,60}", value in ".{0,60}") {
            let mut headers = FieldTable::default();
            headers.insert(name.as_str().into(), AMQPValue::LongString(value.into()));
            let properties = BasicProperties::default().with_headers(headers).with_message_id(id.as_str().into());
            let header = AMQPFrame::Header(7, amq_protocol::frame::AMQPContentHeader {
                class_id: 60, body_size: 5, properties,
            });
            let bytes = gen_frame(&header)(WriteContext::from(Vec::new())).unwrap().write;
            prop_assert_eq!(checked(&bytes, 5), bytes);
        }
    }
}
