//! Checks what a broker sends before lapin reads it.
//!
//! RabbitMQ passes a message's properties on as bytes, whatever its producer wrote. lapin ends the connection
//! if a short string among them is not UTF-8. Its parser also calls itself for each table in a table, so a
//! few thousand of them overflow the stack and end the process. Either way the broker would deliver the
//! message again, for ever. So content headers pass through [`Checked`] first. A content header that lapin
//! can't read is replaced by one with the header [`UNREADABLE`], and the consumer makes a dead
//! letter of the message.

use crate::{
    content_header::{CONTENT_HEAD, check_content_header},
    properties::UNREADABLE,
};
use amq_protocol::{
    frame::{WriteContext, parsing::parse_content_header},
    protocol::{BasicProperties, basic::gen_properties, constants},
    types::{AMQPValue, FieldTable},
};
use async_compat::{Compat, CompatExt};
use async_rs::{Tokio, traits::Reactor, util::RuntimeParts};
use bytes::{Buf, BytesMut};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use std::{
    io::{self, IoSlice, Read, Write},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

/// The longest unreadable properties, in bytes, that are kept.
const LONGEST_KEPT: usize = 64 * 1024;

/// The longest content header that is checked, in bytes. A content header is no longer than a frame, and
/// brokers rarely allow frames above 128 KiB. A longer one is left to lapin, which refuses it.
const LONGEST_FRAME: usize = 1024 * 1024;

/// The length in bytes of a frame's head, which is its type, channel and size. The payload and one more byte
/// follow (AMQP 0-9-1, section 4.2.3).
const FRAME_HEAD: usize = 7;

/// A connection to a broker, with or without TLS. lapin takes it for a plain one either way, because its own
/// TLS would bring 75 crates.
pub type Socket = Compat<Either<TcpStream, TlsStream<TcpStream>>>;

/// lapin's runtime, except that its connections are [`Checked`].
pub type CheckedRuntime = async_rs::Runtime<RuntimeParts<Tokio, CheckedReactor>>;

/// Makes the runtime for a connection, on the current tokio runtime.
pub fn runtime() -> CheckedRuntime {
    CheckedRuntime::new(RuntimeParts::new(Tokio::current(), CheckedReactor(Tokio::current())))
}

/// Makes [`Checked`] connections.
#[derive(Debug, Clone)]
pub struct CheckedReactor(Tokio);

impl Reactor for CheckedReactor {
    type TcpStream = Checked<Socket>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// Registers a socket that was connected elsewhere, which lapin never does.
    fn register<H: Read + Write + Send + 'static>(
        &self,
        _socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = TcpStream::connect(address);
        async { Ok(Checked::new(Either::Left(connecting.await?).compat())) }
    }
}

/// A connection to a broker. Content headers that lapin can't read are replaced before lapin sees them.
#[derive(Debug)]
pub struct Checked<S> {
    inner: S,
    read: Box<[u8]>,
    frames: Frames,
}

impl<S> Checked<S> {
    /// Checks the bytes that come from `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, read: vec![0; 16 * 1024].into(), frames: Frames::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Checked<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { inner, read, frames } = self.get_mut();
        while frames.checked.is_empty() {
            match ready!(Pin::new(&mut *inner).poll_read(cx, read))? {
                0 => return Poll::Ready(Ok(0)),
                count => frames.take(&read[..count]),
            }
        }
        let count = frames.checked.len().min(buf.len());
        frames.checked.copy_to_slice(&mut buf[..count]);
        Poll::Ready(Ok(count))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Checked<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_close(cx)
    }
}

/// Divides the bytes of a connection into frames.
#[derive(Debug, Default)]
struct Frames {
    /// The bytes that may be read.
    checked: BytesMut,
    /// The start of a frame: its head, or all bytes so far if it is a content header.
    held: BytesMut,
    /// How many more bytes belong to a frame that needs no check.
    passing: usize,
}

impl Frames {
    fn take(&mut self, mut bytes: &[u8]) {
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
                self.release();
            }
        }
    }

    /// Returns how much of a frame must be held: all of a content header, but only the head of any other
    /// frame.
    fn wanted(&self) -> usize {
        match self.held.first_chunk().map(kind_and_size) {
            Some((kind, size)) if is_looked_at(kind, size) => FRAME_HEAD + size + 1,
            _ => FRAME_HEAD,
        }
    }

    /// Passes the held bytes on.
    fn release(&mut self) {
        let Some((kind, size)) = self.held.first_chunk().map(kind_and_size) else {
            return;
        };
        if !is_looked_at(kind, size) {
            self.checked.extend_from_slice(&self.held);
            // "AMQP" begins the answer of a broker that does not understand the client. Nothing follows that
            // answer.
            self.passing = if kind == b'A' { usize::MAX } else { size + 1 };
        } else if is_readable(&self.held[FRAME_HEAD..FRAME_HEAD + size]) {
            self.checked.extend_from_slice(&self.held);
        } else {
            let channel = [self.held[1], self.held[2]];
            put_unreadable(&mut self.checked, channel, &self.held[FRAME_HEAD..FRAME_HEAD + size]);
        }
        self.held.clear();
    }
}

/// Whether the frame is a content header that is not too long to be checked.
fn is_looked_at(kind: u8, size: usize) -> bool {
    kind == constants::FRAME_HEADER && size <= LONGEST_FRAME
}

fn kind_and_size(&[kind, _, _, a, b, c, d]: &[u8; FRAME_HEAD]) -> (u8, usize) {
    (kind, u32::from_be_bytes([a, b, c, d]) as usize)
}

/// Whether lapin can read the payload of a content header.
fn is_readable(payload: &[u8]) -> bool {
    check_content_header(payload).is_ok() && matches!(parse_content_header(payload), Ok(([], _)))
}

/// Appends a content header for the same body. It says that the properties can't be read, and holds them as
/// bytes.
fn put_unreadable(out: &mut BytesMut, channel: [u8; 2], payload: &[u8]) {
    let (head, properties) = payload.split_at(payload.len().min(CONTENT_HEAD));
    let kept = if properties.len() <= LONGEST_KEPT { properties } else { &[] };
    let mut headers = FieldTable::default();
    headers.insert(UNREADABLE.into(), AMQPValue::LongString(kept.into()));
    let properties = BasicProperties::default().with_headers(headers);
    let written = gen_properties(&properties)(WriteContext::from(Vec::new()));
    let properties = written.map(|written| written.write).unwrap_or_default();

    out.extend_from_slice(&[constants::FRAME_HEADER, channel[0], channel[1]]);
    out.extend_from_slice(&((head.len() + properties.len()) as u32).to_be_bytes());
    out.extend_from_slice(head);
    out.extend_from_slice(&properties);
    out.extend_from_slice(&[constants::FRAME_END]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content_header::MAX_DEPTH;
    use amq_protocol::frame::{AMQPFrame, gen_frame, parse_frame};
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

    fn written(properties: &BasicProperties) -> Vec<u8> {
        gen_properties(properties)(WriteContext::from(Vec::new())).unwrap().write
    }

    /// Returns properties with one header, whose value is arrays in arrays.
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

    /// Returns the bytes that can be read if `bytes` come in pieces of this size.
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
            content_header(&written(&properties)),
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
            // These would overflow the stack.
            (&nested(20_000), b""),
            // First a table that is longer than the frame, then an unknown type.
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
