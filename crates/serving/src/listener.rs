//! Accepts connections, and goes on after errors. A peer that leaves before it is accepted, or a machine that
//! is out of file descriptors, must neither end the service nor make it spin.

use crate::seldom::Seldom;
use anyhow::Context;
use socket2::SockRef;
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::sleep,
};

/// How long the bytes that were sent to a peer may stay unread. Without this limit, a peer could send
/// requests, never read the answers, and so hold memory for ever. No time-out of HTTP prevents that.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// How many file descriptors are reserved for uses other than connections from outside.
const RESERVED_FILES: usize = 64;

/// How many connections may wait to be accepted, unless the system allows fewer. tokio's default of 128 is
/// reached within milliseconds, and a client that finds no room tries again only a second later.
const BACKLOG: u32 = 4096;

/// Listens on `address`.
///
/// # Errors
/// If the address is in use, or does not belong to this machine.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Old connections of an instance that has just ended must not keep the next instance from listening.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().with_context(|| format!("listening on {address}"))
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    inner: TcpListener,
    /// Limits the warnings, because accepting may fail many times a second.
    warnings: Seldom,
}

impl Listener {
    /// Makes a listener that accepts from this socket.
    pub fn new(inner: TcpListener) -> Self {
        Self { inner, warnings: Seldom::default() }
    }

    /// Waits for the next connection, and returns it with its peer's address. If the future is dropped, no
    /// connection is lost.
    pub async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.inner.accept().await {
                Ok((stream, peer)) => {
                    // Answers are small and complete, so waiting for more bytes would only delay them.
                    let _ = stream.set_nodelay(true);
                    let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(UNREAD_TIMEOUT));
                    return (stream, peer);
                }
                // Only this peer has closed its connection, so the next connection may be fine.
                Err(error) if is_of_the_peer(&error) => {}
                Err(error) => {
                    // Most likely the process is out of file descriptors. Connections that time out will free
                    // some descriptors.
                    if self.warnings.is_due() {
                        tracing::warn!(%error, "can't accept connections; still trying");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

fn is_of_the_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

/// Raises the limit on open files as far as the system allows. Returns how many connections are possible, at
/// most `wanted`. Logs a warning if fewer are possible.
pub fn reserve_files(wanted: usize) -> usize {
    // If the limit can't be read, this assumes that there is no limit.
    let limit = rlimit::increase_nofile_limit(rlimit::INFINITY).unwrap_or(rlimit::INFINITY);
    let possible = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(RESERVED_FILES).max(1);
    if possible < wanted {
        tracing::warn!(
            wanted,
            possible,
            "the limit on open files (ulimit -n) allows fewer connections than configured"
        );
    }
    wanted.min(possible)
}
