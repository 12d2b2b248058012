//! tonic's server, with limits on connections. tonic itself accepts any number of connections, and waits for
//! ever for the first bytes of each connection.
//!
//! h2, on which tonic is built, sets another limit by default: at most 20 streams that were reset before the
//! server accepted them ("rapid reset", CVE-2023-44487).

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

/// The first bytes that an HTTP/2 client sends (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a client may take to send the preface, including the TLS handshake.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long calls in flight may continue after their connection has reached its maximum age.
const AGE_GRACE: Duration = Duration::from_secs(30);

/// How many streams a client may have open at once on a connection. This is hyper's default, made explicit.
const MAX_STREAMS: u32 = 200;

/// The most bytes of headers in a request. This limit also stops a flood of CONTINUATION frames. Each header
/// counts as its name, its value and 32 bytes (RFC 9113, section 6.5.2). This is the library's default, made
/// explicit, because the headers that api passes on must fit (docs/bounds.md).
pub const MAX_HEADERS: u32 = 16 * 1024;

/// Makes a server for connections from [`incoming`]. When a connection reaches `max_connection_age`, its
/// client is asked to close it. The client then opens a new connection, which a load balancer may send to
/// another instance.
pub fn builder(max_connection_age: Duration) -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .max_connection_age(max_connection_age)
        // These pings detect a client that vanished silently, or that does not speak HTTP/2 after all.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

/// Accepts connections for [`builder`], at most `max` at once. A connection must begin to speak HTTP/2 within
/// three seconds (with `tls`, including the handshake), and is cut off half a minute after its maximum age.
/// When `max` is reached, a connection that has not begun to speak HTTP/2 is closed to make room for a new
/// connection. If all connections speak HTTP/2, new connections wait in the system's queue.
pub fn incoming(
    listener: TcpListener,
    max: usize,
    max_connection_age: Duration,
    tls: Option<Arc<ServerConfig>>,
) -> impl Stream<Item = Result<Connection, Infallible>> {
    // One connection more than `max` is accepted, and then an older connection is closed to make room for it.
    let permits = Arc::new(Semaphore::new(max + 1));
    let state = (Listener::new(listener), permits, Waiting::default());
    let sockets = Arc::new(Sockets::new(tls));
    let lifetime = max_connection_age + AGE_GRACE;
    stream::unfold(state, move |(mut listener, permits, waiting)| {
        let sockets = sockets.clone();
        async move {
            // Nobody closes this semaphore, so acquiring a permit never fails.
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

/// A connection that is cut off when its time is over.
pub struct Connection {
    peer: TcpConnectInfo,
    socket: Socket,
    /// The part of the preface that has not been received yet.
    preface: &'static [u8],
    /// The time when the connection is cut off: at first for lack of the preface, later because of its age.
    until: Pin<Box<Sleep>>,
    lifetime: Duration,
    /// A future that is ready when the connection has to make room for another connection. `None` once the
    /// preface has been received.
    must_go: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// Returns an error if the preface has not arrived in time. Writes also check that, because with TLS the
    /// first write waits for the handshake before anything is read.
    fn check_preface(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.preface.is_empty() { Ok(()) } else { self.check(cx) }
    }

    /// Returns an error if the connection has to end.
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
