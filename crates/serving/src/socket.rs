//! The socket of an accepted connection, with or without TLS. The handshake takes place when the connection
//! is first read or written, so it runs in the task that serves the connection, and within that task's
//! time-outs. A client that never finishes the handshake does not delay other clients.

use crate::seldom::Seldom;
use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{FallibleAccept, TlsAcceptor, rustls::ServerConfig, server::TlsStream};

/// Makes the sockets of accepted connections.
pub(crate) struct Sockets {
    tls: Option<TlsAcceptor>,
    /// Limits the warnings, because a refused client may reconnect many times a second.
    warnings: Seldom,
}

/// The socket of an accepted connection.
pub(crate) enum Socket {
    Plain(TcpStream),
    Handshake {
        accept: Box<FallibleAccept<TcpStream>>,
        peer: SocketAddr,
        warnings: Seldom,
    },
    Tls(Box<TlsStream<TcpStream>>),
    /// The handshake failed, and an alert tells the client so.
    Refused(TcpStream),
}

impl Sockets {
    pub fn new(tls: Option<Arc<ServerConfig>>) -> Self {
        Self { tls: tls.map(TlsAcceptor::from), warnings: Seldom::default() }
    }

    pub fn socket(&self, stream: TcpStream, peer: SocketAddr) -> Socket {
        match &self.tls {
            None => Socket::Plain(stream),
            Some(tls) => Socket::Handshake {
                accept: Box::new(tls.accept(stream).into_fallible()),
                peer,
                warnings: self.warnings.clone(),
            },
        }
    }
}

/// The stream that is read and written after the handshake.
trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

impl Socket {
    /// Returns the stream once the handshake is over.
    fn poll_stream(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut dyn Stream>>> {
        if let Self::Handshake { accept, peer, warnings } = self {
            match ready!(Pin::new(accept).poll(cx)) {
                Ok(stream) => *self = Self::Tls(Box::new(stream)),
                Err((error, stream)) => {
                    // This may be a client without a certificate. A client that only opens and closes a
                    // connection is not worth a warning.
                    if error.kind() == io::ErrorKind::InvalidData && warnings.is_due() {
                        tracing::warn!(%peer, %error, "refused a connection: the TLS handshake failed");
                    } else {
                        tracing::debug!(%peer, %error, "the TLS handshake failed");
                    }
                    *self = Self::Refused(stream);
                }
            }
        }
        Poll::Ready(match self {
            Self::Plain(stream) => Ok(Pin::new(stream)),
            Self::Tls(stream) => Ok(Pin::new(&mut **stream)),
            Self::Refused(stream) => {
                ready!(poll_drain(stream, cx))?;
                Err(io::ErrorKind::InvalidData.into())
            }
            Self::Handshake { .. } => Err(io::ErrorKind::NotConnected.into()),
        })
    }
}

/// Waits until the client has closed its side. If a socket is closed while it holds unread bytes, the system
/// resets the connection, and the client may never see the alert that says what is wrong.
fn poll_drain(stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
    ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
    loop {
        let mut bytes = [0; 1024];
        let mut buffer = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer))?;
        if buffer.filled().is_empty() {
            return Poll::Ready(Ok(()));
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_stream(cx))?.poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_stream(cx))?.poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_stream(cx))?.poll_write_vectored(cx, buffers)
    }

    /// Both kinds of stream support vectored writes.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_stream(cx))?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            // Without a finished handshake there is nothing to end in an orderly way.
            Self::Handshake { .. } | Self::Refused(_) => Poll::Ready(Ok(())),
        }
    }
}
