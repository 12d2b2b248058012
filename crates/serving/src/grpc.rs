//! tonic's server, with limits on connections. tonic itself accepts any number of connections, and waits for
//! ever for the first bytes of each connection.
//!
//! h2, on which tonic is built, sets another limit by default: at most 20 streams that were reset before the
//! server accepted them ("rapid reset", CVE-2023-44487).

use crate::{listener::Listener, seldom::Seldom, waiting::Waiting};
use futures_util::stream::{self, Stream};
use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_util::either::Either;
use tonic::transport::{
    Server,
    server::{Connected, TcpConnectInfo},
};

/// The first bytes that an HTTP/2 client sends (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

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
/// connection. If all connections speak HTTP/2, new connections wait in the system's queue. When the stream is
/// dropped, connections that it has not yielded are closed.
pub fn incoming(
    listener: TcpListener,
    max: usize,
    max_connection_age: Duration,
    tls: Option<Arc<ServerConfig>>,
) -> impl Stream<Item = Result<Connection, Infallible>> {
    // One connection more than `max` is accepted, and then an older connection is closed to make room for it.
    let permits = Arc::new(Semaphore::new(max + 1));
    let (waiting, warnings) = (Waiting::default(), Seldom::default());
    let tls = tls.map(TlsAcceptor::from);
    let state = (Listener::new(listener), JoinSet::new());
    stream::unfold(state, move |(mut listener, mut beginning)| {
        let (permits, waiting, warnings, tls) =
            (permits.clone(), waiting.clone(), warnings.clone(), tls.clone());
        async move {
            loop {
                let accepted = async {
                    let permit = permits.clone().acquire_owned().await.ok()?;
                    Some((permit, listener.accept().await))
                };
                let (permit, (stream, peer)) = select! {
                    Some(accepted) = accepted => accepted,
                    Some(begun) = beginning.join_next() => match begun {
                        Ok(Some(connection)) => return Some((Ok(connection), (listener, beginning))),
                        _ => continue,
                    },
                };
                if permits.available_permits() == 0 {
                    waiting.let_go();
                }
                let (place, tls, warnings) = (waiting.enter(), tls.clone(), warnings.clone());
                beginning.spawn(async move {
                    select! {
                        // This is checked first, because no other connection makes room in its place.
                        biased;
                        () = place.must_go() => None,
                        begun = timeout(PREFACE_TIMEOUT, begin(stream, peer, tls, &warnings)) => {
                            let (stream, peer) = begun.ok()??;
                            let until = Box::pin(sleep(max_connection_age + AGE_GRACE));
                            Some(Connection { stream, peer, preface: PREFACE, until, _permit: permit })
                        }
                    }
                });
            }
        }
    })
}

/// Waits for the TLS handshake and for the preface. Returns `None` if either of them fails.
async fn begin(
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    warnings: &Seldom,
) -> Option<(Either<TcpStream, Box<TlsStream<TcpStream>>>, TcpConnectInfo)> {
    let info = stream.connect_info();
    let mut stream = match tls {
        Some(tls) => Either::Right(Box::new(Box::pin(handshake(stream, peer, tls, warnings)).await?)),
        None => Either::Left(stream),
    };
    let (mut expected, mut bytes) = (&PREFACE[..], [0; PREFACE.len()]);
    while !expected.is_empty() {
        let count = stream.read(&mut bytes[..expected.len()]).await.ok().filter(|count| *count > 0)?;
        expected = expected.strip_prefix(&bytes[..count])?;
    }
    Some((stream, info))
}

async fn handshake(
    stream: TcpStream,
    peer: SocketAddr,
    tls: TlsAcceptor,
    warnings: &Seldom,
) -> Option<TlsStream<TcpStream>> {
    let (error, mut stream) = match tls.accept(stream).into_fallible().await {
        Ok(stream) => return Some(stream),
        Err(failed) => failed,
    };
    // This may be a client without a certificate. A client that only opens and closes a connection is not worth
    // a warning.
    if error.kind() == io::ErrorKind::InvalidData && warnings.is_due() {
        tracing::warn!(%peer, %error, "refused a connection: the TLS handshake failed");
    } else {
        tracing::debug!(%peer, %error, "the TLS handshake failed");
    }
    // Wait until the client has closed its side. If a socket is closed while it holds unread bytes, the system
    // resets the connection, and the client may never see the alert that says what is wrong.
    let _ = stream.shutdown().await;
    while let Ok(1..) = stream.read(&mut [0; 64]).await {}
    None
}

/// A connection that has begun to speak HTTP/2.
pub struct Connection {
    stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    peer: TcpConnectInfo,
    /// The part of the preface that tonic has not read yet. The whole preface has arrived.
    preface: &'static [u8],
    /// When the connection is cut off. (tonic 0.14.9 has `max_connection_age_grace` for this, but never asks
    /// the client to close the connection if that is set.)
    until: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if self.preface.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let (now, later) = self.preface.split_at(self.preface.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.preface = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.peer.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;
    use std::pin::pin;

    #[tokio::test]
    async fn at_the_bound_the_oldest_connection_without_a_preface_makes_room() {
        const PATIENCE: Duration = Duration::from_secs(10);

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut incoming = pin!(incoming(listener, 2, Duration::from_secs(300), None));
        let connect = async || TcpStream::connect(address).await.unwrap();
        let (mut oldest, mut silent, mut third) = (connect().await, connect().await, connect().await);
        third.write_all(PREFACE).await.unwrap();
        let Ok(mut begun) = timeout(PATIENCE, incoming.next()).await.unwrap().unwrap();
        assert_eq!(timeout(PATIENCE, oldest.read(&mut [0])).await.unwrap().unwrap(), 0);
        // The other silent connection has stayed open, and begins in time.
        silent.write_all(PREFACE).await.unwrap();
        assert!(timeout(PATIENCE, incoming.next()).await.unwrap().is_some());
        // tonic reads the preface again, in pieces as small as it likes.
        third.write_all(b"frames").await.unwrap();
        let mut read: Vec<u8> = Vec::new();
        while read.len() < PREFACE.len() + 6 {
            let mut piece = [0; 5];
            let count = timeout(PATIENCE, begun.read(&mut piece)).await.unwrap().unwrap();
            read.extend(&piece[..count]);
        }
        assert_eq!(read, [&PREFACE[..], b"frames"].concat());
    }
}
