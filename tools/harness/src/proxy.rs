//! A TCP proxy that a test puts between two programs, and that fails in the ways in which networks fail: it
//! resets connections, refuses them, slows them down, or keeps them open and passes nothing. On a link that
//! speaks AMQP, the proxy can also withhold a certain method, so that a test can kill a service at an exactly
//! known moment.

use anyhow::Result;
use bytes::{Bytes, BytesMut};
use loopback::background::Background;
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    select,
    sync::{oneshot, watch},
    time::sleep,
};

/// A running proxy. When it is dropped, it stops and its connections end.
pub struct Proxy {
    /// The address that the proxy listens on.
    pub address: SocketAddr,
    link: Arc<Link>,
    _runtime: Background,
}

/// One side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The side that connected.
    Client,
    /// The side that accepted the connection.
    Server,
}

/// An AMQP method as a frame names it: the class id and the method id.
pub type MethodId = (u16, u16);

/// `basic.ack`, with which a client settles deliveries and the broker confirms messages.
pub const BASIC_ACK: MethodId = (60, 80);

/// The number of bytes for which the proxy makes room before each read.
const PIECE: usize = 16 * 1024;

struct Link {
    target: Mutex<SocketAddr>,
    mode: watch::Sender<Mode>,
    /// Counts resets. A connection ends when the count changes.
    resets: watch::Sender<u64>,
    trap: Mutex<Option<Trap>>,
    follows_amqp: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    Refusing,
    Frozen,
    Slow(Duration),
}

/// The frame to withhold.
struct Trap {
    from: Side,
    method: MethodId,
    sprung: oneshot::Sender<()>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1, for connections to `target`.
    ///
    /// # Errors
    /// If no port is free.
    pub fn start(target: SocketAddr) -> Result<Self> {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), target)
    }

    /// Listens on this address, for connections to `target`.
    ///
    /// # Errors
    /// If the address is in use.
    pub fn start_at(address: SocketAddr, target: SocketAddr) -> Result<Self> {
        Self::start_link(address, target, false)
    }

    /// Listens as [`Proxy::start`] does, for connections that speak AMQP. This proxy passes only whole
    /// frames, and can [withhold](Proxy::withhold) a frame.
    ///
    /// # Errors
    /// If there is no free port.
    pub fn start_amqp(target: SocketAddr) -> Result<Self> {
        Self::start_link(SocketAddr::from(([127, 0, 0, 1], 0)), target, true)
    }

    fn start_link(address: SocketAddr, target: SocketAddr, follows_amqp: bool) -> Result<Self> {
        let runtime = Background::start(1, 1)?;
        let listener = runtime.listen(address)?;
        let address = listener.local_addr()?;
        let link = Arc::new(Link {
            target: Mutex::new(target),
            mode: watch::Sender::new(Mode::Open),
            resets: watch::Sender::new(0),
            trap: Mutex::new(None),
            follows_amqp,
        });
        runtime.spawn(accept(listener, Arc::clone(&link)));
        Ok(Self { address, link, _runtime: runtime })
    }

    /// Sends new connections to `target` from now on.
    pub fn lead_to(&self, target: SocketAddr) {
        *lock(&self.link.target) = target;
    }

    /// Resets every connection (RST). New connections are accepted.
    pub fn cut(&self) {
        self.link.resets.send_modify(|resets| *resets += 1);
    }

    /// Resets every connection, and each new connection as soon as it is accepted.
    pub fn refuse(&self) {
        self.link.mode.send_replace(Mode::Refusing);
        self.cut();
    }

    /// Goes silent: connections stay open and new connections are accepted, but nothing passes in either
    /// direction.
    pub fn freeze(&self) {
        self.link.mode.send_replace(Mode::Frozen);
    }

    /// Delays all bytes by `latency`, except for bytes that arrive while earlier bytes are already waiting.
    /// These later bytes pass together with the earlier bytes.
    pub fn slow_down(&self, latency: Duration) {
        self.link.mode.send_replace(Mode::Slow(latency));
    }

    /// Passes all bytes again. The bytes that were sent into a frozen connection now arrive, as they do on a
    /// network that works again. A trap that [`Proxy::withhold`] has set is removed.
    pub fn restore(&self) {
        self.link.mode.send_replace(Mode::Open);
        lock(&self.link.trap).take();
    }

    /// Sets a trap for the next frame with this method from one side. The proxy withholds this frame, and
    /// everything after it on that connection in that direction, until the connection is cut. The returned
    /// receiver gets a value when the proxy has withheld the frame. If the proxy is
    /// [restored](Proxy::restore) first, the receiver gets no value.
    pub fn withhold(&self, from: Side, method: MethodId) -> oneshot::Receiver<()> {
        let (sprung, answer) = oneshot::channel();
        *lock(&self.link.trap) = Some(Trap { from, method, sprung });
        answer
    }
}

async fn accept(listener: TcpListener, link: Arc<Link>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Most likely there are too many open files.
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(serve(client, Arc::clone(&link)));
    }
}

async fn serve(mut client: TcpStream, link: Arc<Link>) -> io::Result<()> {
    let mut resets = link.resets.subscribe();
    client.set_nodelay(true)?;
    let carried = select! {
        // Checks for a reset first, because a reset may come together with the end of a freeze, and then
        // nothing may pass.
        biased;
        _ = resets.changed() => Err(io::ErrorKind::ConnectionReset.into()),
        carried = carry(&mut client, &link) => carried,
    };
    if carried.is_err() {
        // With a linger time of zero, closing the connection sends RST.
        client.set_zero_linger()?;
    }
    carried
}

/// Carries bytes both ways until one side closes the connection.
async fn carry(client: &mut TcpStream, link: &Link) -> io::Result<()> {
    link.pass().await?;
    let target = *lock(&link.target);
    let server = if target.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A reset may drop this future at any moment, and then the other side must also get RST.
    server.set_zero_linger()?;
    let mut server = server.connect(target).await?;
    server.set_nodelay(true)?;
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    let carried = select! {
        ended = pump(Side::Client, client_read, server_write, link) => ended,
        ended = pump(Side::Server, server_read, client_write, link) => ended,
    };
    if carried.is_ok() {
        // If one side has ended in an orderly way, the proxy passes this end on to the other side.
        server.shutdown().await?;
    }
    carried
}

/// Carries the bytes from one side until that side has no more to send.
async fn pump(from: Side, mut read: ReadHalf<'_>, mut write: WriteHalf<'_>, link: &Link) -> io::Result<()> {
    let mut frames = Frames { buffer: BytesMut::new(), is_begun: from == Side::Server };
    loop {
        frames.buffer.reserve(PIECE);
        let count = read.read_buf(&mut frames.buffer).await?;
        link.pass().await?;
        // Bytes that arrived during the pause also pass. The next read reports an error or the end.
        let _ = read.try_read_buf(&mut frames.buffer);
        if count == 0 {
            return write.write_all(&frames.buffer).await;
        }
        if link.follows_amqp {
            while let Some((method, frame)) = frames.next() {
                if method.is_some_and(|method| link.springs(from, method)) {
                    return std::future::pending().await;
                }
                write.write_all(&frame).await?;
            }
        } else {
            write.write_all(&frames.buffer.split()).await?;
        }
    }
}

impl Link {
    /// Waits until bytes may pass; returns an error if the connection is to be refused.
    async fn pass(&self) -> io::Result<()> {
        let mode =
            *self.mode.subscribe().wait_for(|mode| *mode != Mode::Frozen).await.map_err(io::Error::other)?;
        match mode {
            Mode::Refusing => Err(io::ErrorKind::ConnectionReset.into()),
            Mode::Slow(latency) => {
                sleep(latency).await;
                Ok(())
            }
            Mode::Open | Mode::Frozen => Ok(()),
        }
    }

    /// Returns whether this is the frame to withhold.
    fn springs(&self, from: Side, method: MethodId) -> bool {
        let mut trap = lock(&self.trap);
        match trap.take_if(|trap| trap.from == from && trap.method == method) {
            // If the receiver was dropped, the frame passes.
            Some(trap) => trap.sprung.send(()).is_ok(),
            None => false,
        }
    }
}

/// Received bytes of AMQP, from which whole frames are taken (specification, section 4.2.3).
struct Frames {
    buffer: BytesMut,
    /// Whether the next bytes are a frame. A client first sends the protocol header.
    is_begun: bool,
}

impl Frames {
    /// Removes and returns the next complete frame (or protocol header), and its method if it has one.
    fn next(&mut self) -> Option<(Option<MethodId>, Bytes)> {
        const PROTOCOL_HEADER: usize = 8;
        const METHOD: u8 = 1;

        if !self.is_begun {
            self.is_begun = self.buffer.len() >= PROTOCOL_HEADER;
            return self.is_begun.then(|| (None, self.buffer.split_to(PROTOCOL_HEADER).freeze()));
        }
        let (&[kind, _, _, a, b, c, d], payload) = self.buffer.split_first_chunk()?;
        let size = u32::from_be_bytes([a, b, c, d]) as usize;
        let method = match payload.first_chunk() {
            Some(&[a, b, c, d]) if kind == METHOD => {
                Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
            }
            _ => None,
        };
        // The length is that of the frame's header, its payload and its end mark.
        let length = 7 + size + 1;
        (self.buffer.len() >= length).then(|| (method, self.buffer.split_to(length).freeze()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
