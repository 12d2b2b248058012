//! Checks what a broker sends before lapin reads it.
//!
//! RabbitMQ passes on the bytes of a message's properties, whatever the producer wrote. lapin ends the
//! connection if a short string in the properties is not UTF-8. lapin's parser also calls itself for each
//! table inside a table, so a few thousand nested tables overflow the stack and end the process. In both
//! cases, the broker would deliver the message again, for ever. Therefore [`Checked`] checks each content
//! header first. It replaces a content header that lapin can't read with one that has the header
//! [`UNREADABLE`](crate::properties::UNREADABLE), and the consumer makes a dead letter of the message.
//!
//! lapin also ends the connection if a content header is longer than a frame. Brokers send such a content
//! header to a client that negotiated smaller frames than the producer. In that case, [`Checked`] leaves out
//! the longest headers of the message ([`fit`](crate::properties::fit)). Finally, the producer decides how
//! long a body is. If a body is longer than `Limits::longest_body`, [`Checked`] passes on only its start.

use crate::frames::{Frames, Limits};
use async_compat::{Compat, CompatExt};
use async_rs::{Tokio, traits::Reactor, util::RuntimeParts};
use bytes::Buf;
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

/// A connection to a broker, with or without TLS. lapin treats both kinds as a connection without TLS,
/// because lapin's own TLS would add 75 dependencies.
pub type Socket = Compat<Either<TcpStream, TlsStream<TcpStream>>>;

/// lapin's runtime, except that its connections are [`Checked`].
pub type CheckedRuntime = async_rs::Runtime<RuntimeParts<Tokio, CheckedReactor>>;

/// Makes a runtime for lapin that uses the current tokio runtime.
pub fn runtime() -> CheckedRuntime {
    CheckedRuntime::new(RuntimeParts::new(Tokio::current(), CheckedReactor(Tokio::current())))
}

/// Makes [`Checked`] connections.
#[derive(Debug, Clone)]
pub struct CheckedReactor(Tokio);

impl Reactor for CheckedReactor {
    type TcpStream = Checked<Socket>;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// Refuses a socket that was connected elsewhere. lapin never calls this function.
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
        async { Ok(Checked::new(Either::Left(connecting.await?).compat(), Limits::default())) }
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
    pub fn new(inner: S, limits: Limits) -> Self {
        Self { inner, read: vec![0; 16 * 1024].into(), frames: Frames::new(limits) }
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
