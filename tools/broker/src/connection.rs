//! A connection: reading, writing, heartbeats, and the ways in which it ends. Its frames are handled by
//! `handshake` first, and then by `methods`.

use super::{
    exception::Exception,
    frames::{FRAME_MAX, Frame, PROTOCOL_HEADER, put_method, take_frame},
    handshake::{Agreement, Handshake},
    memory::Memory,
    output::Output,
    virtual_host::{ChannelId, ConnectionId, VirtualHost},
};
use amq_protocol::protocol::{AMQPClass, connection};
use bytes::BytesMut;
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    select,
    sync::Notify,
    task::yield_now,
    time::{sleep, timeout},
};

/// How long a client may take to finish the handshake, to answer `close`, or to hang up after `close-ok`.
const PATIENCE: Duration = Duration::from_secs(10);

/// The number of bytes to reserve for a read, and the largest capacity at which an output buffer is reused.
const CHUNK: usize = 64 * 1024;

/// The state that all connections share. No task awaits anything while it holds the lock.
#[derive(Clone)]
pub struct Shared {
    state: Arc<Mutex<VirtualHost>>,
    /// Counts the memory that the state takes.
    pub memory: Arc<Memory>,
}

impl Shared {
    /// Creates an empty virtual host.
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { state: Arc::new(Mutex::new(VirtualHost::new(Arc::clone(&memory)))), memory }
    }

    /// Locks the state.
    pub fn lock(&self) -> MutexGuard<'_, VirtualHost> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a client until the connection ends.
pub async fn serve(stream: TcpStream, shared: Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.into_split();
    let mut input = Input { half: read, bytes: BytesMut::new() };
    match timeout(PATIENCE, begin(&mut input, &mut write)).await?? {
        Begun::Open(agreement) => Connection::new(input, write, shared, &agreement).run().await,
        Begun::Refused(exception) => close(&mut input, &mut write, Vec::new(), &exception).await,
        Begun::OtherProtocol => write.write_all(PROTOCOL_HEADER).await,
    }
}

/// The outcome of the handshake.
enum Begun {
    Open(Agreement),
    Refused(Exception),
    OtherProtocol,
}

async fn begin(input: &mut Input, write: &mut OwnedWriteHalf) -> io::Result<Begun> {
    while input.bytes.len() < PROTOCOL_HEADER.len() && PROTOCOL_HEADER.starts_with(&input.bytes) {
        input.read().await?;
    }
    if !input.bytes.starts_with(PROTOCOL_HEADER) {
        return Ok(Begun::OtherProtocol);
    }
    drop(input.bytes.split_to(PROTOCOL_HEADER.len()));
    let mut output = Vec::new();
    let mut handshake = Handshake::start(&mut output);
    loop {
        write.write_all(&output).await?;
        output.clear();
        if let Handshake::Open(agreement) = handshake {
            return Ok(Begun::Open(agreement));
        }
        let frame = loop {
            match take_frame(&mut input.bytes, FRAME_MAX) {
                Ok(Some(frame)) => break frame,
                Ok(None) => input.read().await?,
                Err(exception) => return Ok(Begun::Refused(exception)),
            }
        };
        handshake = match handshake.step(&frame, &mut output) {
            Ok(next) => next,
            Err(exception) => return Ok(Begun::Refused(exception)),
        };
    }
}

/// Writes the remaining output and `close`, then reads until `close-ok`, because closing a socket with unread
/// bytes could discard the `close` before the client reads it.
async fn close(
    input: &mut Input,
    write: &mut OwnedWriteHalf,
    mut rest: Vec<u8>,
    exception: &Exception,
) -> io::Result<()> {
    let (class_id, method_id) = exception.method();
    let (reply_code, reply_text) = (exception.code(), exception.text());
    let close = connection::Close { reply_code, reply_text, class_id, method_id };
    put_method(&mut rest, 0, AMQPClass::Connection(connection::AMQPMethod::Close(close)));
    timeout(PATIENCE, async {
        write.write_all(&rest).await?;
        loop {
            match take_frame(&mut input.bytes, FRAME_MAX) {
                Ok(Some(Frame::Method(0, AMQPClass::Connection(connection::AMQPMethod::CloseOk(_))))) => {
                    return Ok(());
                }
                Ok(Some(_)) => {}
                Ok(None) => input.read().await?,
                // Malformed bytes are skipped, because the broker now waits only for `close-ok`.
                Err(_) => {
                    input.bytes.clear();
                    input.read().await?;
                }
            }
        }
    })
    .await?
}

/// The bytes that were received from a client and are not parsed yet.
struct Input {
    half: OwnedReadHalf,
    bytes: BytesMut,
}

impl Input {
    async fn read(&mut self) -> io::Result<()> {
        self.bytes.reserve(CHUNK);
        match self.half.read_buf(&mut self.bytes).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// Waits until the client has hung up, without reading.
    async fn hung_up(&self) -> io::Result<()> {
        while !self.half.ready(Interest::READABLE).await?.is_read_closed() {
            sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }
}

/// An open connection.
struct Connection {
    id: ConnectionId,
    input: Input,
    writer: Writer,
    shared: Shared,
    frame_max: usize,
    heartbeat: Option<Duration>,
    drained: Arc<Notify>,
}

struct Writer {
    half: OwnedWriteHalf,
    frames: Vec<u8>,
    written: usize,
    wake: Arc<Notify>,
}

/// Why the broker pauses reading from a client.
enum Pause {
    /// The next frame is incomplete.
    Input,
    /// The client does not read its output.
    Output,
    /// The client publishes, and the memory is full.
    Memory,
}

/// Why a connection ends.
enum End {
    /// The client has disconnected, or seems to have done so.
    Gone,
    /// The client has sent `close`.
    Closed,
    /// The client has made an error, which the broker reports to the client.
    Exception(Exception),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl From<Exception> for End {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

impl Connection {
    fn new(input: Input, half: OwnedWriteHalf, shared: Shared, agreement: &Agreement) -> Self {
        let &Agreement { capabilities, frame_max, heartbeat } = agreement;
        let wake = Arc::new(Notify::new());
        let output = Output::new(frame_max, Arc::clone(&wake));
        let id = shared.lock().connect(output, capabilities);
        let writer = Writer { half, frames: Vec::new(), written: 0, wake };
        Self { id, input, writer, shared, frame_max, heartbeat, drained: Arc::default() }
    }

    async fn run(mut self) -> io::Result<()> {
        let _forget = Forget { id: self.id, shared: self.shared.clone() };
        let Self { id, input, writer, shared, frame_max, heartbeat, drained } = &mut self;
        // The future that reads is polled first, so that the other future writes the answers at once.
        let end = select! {
            biased;
            end = read(input, shared, *id, *frame_max, *heartbeat, drained) => end,
            _ = writer.write(shared, *id, *heartbeat, drained) => End::Gone,
        };
        let output = shared.lock().disconnect(*id);
        let mut rest = writer.frames.split_off(writer.written);
        rest.extend(output.map(|mut output| output.take(Vec::new())).unwrap_or_default());
        match end {
            End::Gone => Ok(()),
            End::Closed => {
                let close_ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
                put_method(&mut rest, 0, AMQPClass::Connection(close_ok));
                timeout(PATIENCE, async {
                    writer.half.write_all(&rest).await?;
                    // The client must hang up first, because some clients report an error if the broker hangs
                    // up first.
                    while input.read().await.is_ok() {
                        input.bytes.clear();
                    }
                    Ok(())
                })
                .await?
            }
            End::Exception(exception) => close(input, &mut writer.half, rest, &exception).await,
        }
    }
}

/// Removes the connection from the state even if its task is dropped.
struct Forget {
    id: ConnectionId,
    shared: Shared,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.shared.lock().disconnect(self.id);
    }
}

async fn read(
    input: &mut Input,
    shared: &Shared,
    id: ConnectionId,
    frame_max: usize,
    heartbeat: Option<Duration>,
    drained: &Notify,
) -> End {
    loop {
        let paused = match process(&mut input.bytes, shared, id, frame_max) {
            Ok(Pause::Input) => match heartbeat {
                // A client counts as gone after two intervals without a frame (specification, section 4.2.7).
                Some(interval) => {
                    timeout(2 * interval, input.read()).await.unwrap_or_else(|late| Err(late.into()))
                }
                None => input.read().await,
            },
            Ok(Pause::Output) => {
                drained.notified().await;
                Ok(())
            }
            Ok(Pause::Memory) => {
                let blocked = connection::Blocked { reason: "low on memory".into() };
                tell(shared, id, connection::AMQPMethod::Blocked(blocked));
                select! {
                    () = shared.memory.has_room() => {
                        tell(shared, id, connection::AMQPMethod::Unblocked(connection::Unblocked {}));
                        Ok(())
                    }
                    hung_up = input.hung_up() => hung_up.and(Err(io::ErrorKind::UnexpectedEof.into())),
                }
            }
            Err(end) => return end,
        };
        if paused.is_err() {
            return End::Gone;
        }
    }
}

/// Sends `connection.blocked` or `connection.unblocked`, if the client accepts this method.
fn tell(shared: &Shared, id: ConnectionId, method: connection::AMQPMethod) {
    if let Some(peer) = shared.lock().peers.get_mut(&id)
        && peer.capabilities.takes_blocked
    {
        peer.output.method(0, AMQPClass::Connection(method));
    }
}

/// Handles all complete frames, or as many frames as output and memory allow.
fn process(bytes: &mut BytesMut, shared: &Shared, id: ConnectionId, frame_max: usize) -> Result<Pause, End> {
    let mut state = shared.lock();
    let paused = loop {
        match state.peers.get(&id) {
            Some(peer) if peer.output.is_full() => break Ok(Pause::Output),
            Some(peer) if peer.publishes && shared.memory.is_full() => break Ok(Pause::Memory),
            Some(_) => {}
            None => break Err(End::Gone),
        }
        match take_frame(bytes, frame_max) {
            Ok(None) => break Ok(Pause::Input),
            Ok(Some(frame)) => {
                if let Err(end) = take(&mut state, id, frame) {
                    break Err(end);
                }
            }
            Err(exception) => break Err(exception.into()),
        }
    };
    state.flush_confirms(id);
    paused
}

fn take(state: &mut VirtualHost, connection: ConnectionId, frame: Frame) -> Result<(), End> {
    use connection::AMQPMethod as Method;

    let number = match &frame {
        Frame::Heartbeat => return Ok(()),
        Frame::Method(0, AMQPClass::Connection(Method::Close(_))) => return Err(End::Closed),
        Frame::Method(0, _) => {
            return Err(Exception::channel_error("unexpected method on channel 0").into());
        }
        Frame::Header(0, ..) | Frame::Body(0, _) => {
            return Err(Exception::unexpected_frame("content on channel 0").into());
        }
        Frame::Method(number, _) | Frame::Header(number, ..) | Frame::Body(number, _) => *number,
    };
    let at = ChannelId { connection, number };
    Ok(state.channel_frame(at, frame)?)
}

impl Writer {
    /// Writes the output as it arrives, as much as possible in each write. The future can be dropped at any
    /// time, because `written` counts the bytes that are already written.
    async fn write(
        &mut self,
        shared: &Shared,
        id: ConnectionId,
        heartbeat: Option<Duration>,
        drained: &Notify,
    ) -> io::Result<()> {
        loop {
            if self.written == self.frames.len() && !self.refill(shared, id, drained) {
                let woken = self.wake.notified();
                let is_late = match heartbeat {
                    // Heartbeats are sent twice as often as agreed, so that a heartbeat may be late.
                    Some(interval) => timeout(interval / 2, woken).await.is_err(),
                    None => {
                        woken.await;
                        false
                    }
                };
                if is_late && let Some(peer) = shared.lock().peers.get_mut(&id) {
                    peer.output.heartbeat();
                }
                // After this yield, the future that reads runs first, so that one write and one confirm can
                // answer several frames.
                yield_now().await;
                continue;
            }
            let written = self.half.write(&self.frames[self.written..]);
            self.written += match heartbeat {
                // A client that accepts no bytes for two intervals also counts as gone.
                Some(interval) => timeout(2 * interval, written).await??,
                None => written.await?,
            };
        }
    }

    /// Takes the output that was appended since the last call. Returns false if there was none.
    fn refill(&mut self, shared: &Shared, id: ConnectionId, drained: &Notify) -> bool {
        let mut empty = std::mem::take(&mut self.frames);
        if empty.capacity() > CHUNK {
            empty = Vec::new();
        }
        empty.clear();
        self.written = 0;
        let mut state = shared.lock();
        if let Some(peer) = state.peers.get_mut(&id) {
            self.frames = peer.output.take(empty);
            if !peer.output.is_full() && peer.output.has_starved() {
                state.resume(id);
            }
        }
        drained.notify_one();
        !self.frames.is_empty()
    }
}
