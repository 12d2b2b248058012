//! tonic's server, with bounds on what a connection may take. tonic accepts any number of connections, and
//! waits for ever for one to say its first word.
//!
//! The rest is in the library, and on: at most 200 streams at once, 16 KiB of headers in a request (which
//! ends a flood of CONTINUATION frames, too), 20 streams that were reset before they were looked at
//! ("rapid reset", CVE-2023-44487).

use crate::{
    listener::Listener,
    socket::{Socket, Sockets},
    waiting::Waiting,
};
use futures_util::stream::{self, Stream};
use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep},
};
use tokio_rustls::rustls::ServerConfig;
use tonic::transport::{
    Server,
    server::{Connected, TcpConnectInfo},
};

/// What a client of HTTP/2 says first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long it may take to say it, the handshake of TLS included.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long calls may go on that are in flight when a connection has reached its age.
const AGE_GRACE: Duration = Duration::from_secs(30);

/// Streams that a client may have open at once on one connection. It is the library's default, said aloud.
const MAX_STREAMS: u32 = 200;

/// A server for connections from [`incoming`], which are asked to go when they are so old: a client makes a
/// new one then, which a balancer may lead elsewhere.
pub fn builder(max_connection_age: Duration) -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .max_connection_age(max_connection_age)
        // A client that vanished without a word, or does not speak HTTP/2 after all, is noticed.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

/// Connections for [`builder`], at most `max` at once. Each must begin to speak HTTP/2 within three seconds,
/// and is cut off half a minute after it was asked to go. Beyond the bound one that has not begun to speak
/// makes room for a new one; if there is none, new ones wait in the system's queue. With `tls`, all of that
/// includes the handshake.
pub fn incoming(
    listener: TcpListener,
    max: usize,
    max_connection_age: Duration,
    tls: Option<Arc<ServerConfig>>,
) -> impl Stream<Item = Result<Connection, Infallible>> {
    // One more than there is room for: another goes for it.
    let permits = Arc::new(Semaphore::new(max + 1));
    let state = (Listener::new(listener), permits, Waiting::default());
    let sockets = Arc::new(Sockets::new(tls));
    let lifetime = max_connection_age + AGE_GRACE;
    stream::unfold(state, move |(mut listener, permits, waiting)| {
        let sockets = sockets.clone();
        async move {
            // Nobody closes this semaphore, so there is a permit some time.
            let permit = permits.clone().acquire_owned().await.ok()?;
            let (stream, peer) = listener.accept().await;
            if permits.available_permits() == 0 {
                waiting.let_go();
            }
            let place = waiting.enter();
            let connection = Connection {
                peer: stream.connect_info(),
                socket: sockets.socket(stream, peer),
                preface: PREFACE,
                until: Box::pin(sleep(PREFACE_TIMEOUT)),
                lifetime,
                must_go: Some(Box::pin(async move { place.must_go().await })),
                _permit: permit,
            };
            Some((Ok(connection), (listener, permits, waiting)))
        }
    })
}

/// A connection that is cut off in time.
pub struct Connection {
    peer: TcpConnectInfo,
    socket: Socket,
    /// What is left to be said of the preface.
    preface: &'static [u8],
    /// The end: of patience with the preface, then of the connection.
    until: Pin<Box<Sleep>>,
    lifetime: Duration,
    /// Until the preface is said, the connection may have to make room for another one.
    must_go: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// An error if the preface does not come. With TLS the first write waits for the handshake, and there is no
    /// read before.
    fn check_preface(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.preface.is_empty() { Ok(()) } else { self.check(cx) }
    }

    /// An error if the connection has to end.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.must_go.as_mut().is_some_and(|must_go| must_go.as_mut().poll(cx).is_ready()) {
            self.must_go = None;
            self.until.as_mut().reset(Instant::now());
        }
        match self.until.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        if !self.preface.is_empty() {
            let read = &buffer.filled()[before..];
            let expected = read.len().min(self.preface.len());
            if read[..expected] != self.preface[..expected] {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            self.preface = &self.preface[expected..];
            if self.preface.is_empty() {
                let end = Instant::now() + self.lifetime;
                self.until.as_mut().reset(end);
                self.must_go = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.check_preface(cx)?;
        Pin::new(&mut self.socket).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_preface(cx)?;
        Pin::new(&mut self.socket).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_preface(cx)?;
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.peer.clone()
    }
}
