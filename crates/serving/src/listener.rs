//! Accepts connections, whatever happens: a peer that goes before it is accepted, or a machine that is out
//! of file descriptors, must not end the service, or make it spin.

use crate::seldom::Seldom;
use anyhow::Context;
use socket2::SockRef;
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::sleep,
};

/// How long a peer may leave bytes that were sent to it unread. It bounds what a peer that asks and never
/// reads can hold: no time-out of HTTP does.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause when no connection can be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// File descriptors that are kept for other things than connections from outside.
const RESERVED_FILES: usize = 64;

/// Connections that may wait to be accepted; the system may allow fewer. tokio's 128 fill up within a few
/// milliseconds, and a client whose connection finds no place tries again a second later.
const BACKLOG: u32 = 4096;

/// Listens on `address`.
///
/// # Errors
/// If it is in use, or not of this machine.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Connections of an instance that has just ended don't stand in the way of the next one.
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
    /// Those that no connection can be accepted, which may come and go many times a second.
    warnings: Seldom,
}

impl Listener {
    /// Accepts from this socket.
    pub fn new(inner: TcpListener) -> Self {
        Self { inner, warnings: Seldom::default() }
    }

    /// The next connection, and its peer. Dropped while it waits, it loses no connection.
    pub async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.inner.accept().await {
                Ok((stream, peer)) => {
                    // Answers are small and complete: waiting for more to send only delays them.
                    let _ = stream.set_nodelay(true);
                    let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(UNREAD_TIMEOUT));
                    return (stream, peer);
                }
                // That one is gone; the next may be fine.
                Err(error) if is_of_the_peer(&error) => {}
                Err(error) => {
                    // Out of file descriptors, most likely: time-outs will close some.
                    if self.warnings.is_due() {
                        tracing::warn!(%error, "can't accept connections; trying on");
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

/// Asks the system for as many open files as it allows, and returns how many connections there can be: the
/// number that is wanted, or fewer, which is logged.
pub fn reserve_files(wanted: usize) -> usize {
    // Where there is no such limit, there is none to keep.
    let limit = rlimit::increase_nofile_limit(rlimit::INFINITY).unwrap_or(rlimit::INFINITY);
    let possible = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(RESERVED_FILES).max(1);
    if possible < wanted {
        tracing::warn!(wanted, possible, "the limit of open files (ulimit -n) allows fewer connections");
    }
    wanted.min(possible)
}
