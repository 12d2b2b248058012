//! Logins, each in a trace of its own, from many connections at a steady rate. What can't even be sent is
//! no attempt; what was sent is noted, whatever becomes of it.

use super::ledger::{Ledger, Login, Outcome, TraceId};
use anyhow::Result;
use harness::{client::read_status, stack::KNOWN_MOBILE};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use uuid::Uuid;

/// The longest that a caller waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A load that runs until it is stopped.
pub struct Load {
    shared: Arc<Shared>,
    callers: JoinSet<()>,
}

struct Shared {
    /// api's, of the moment.
    address: watch::Receiver<SocketAddr>,
    ledger: Arc<Ledger>,
    is_paused: watch::Sender<bool>,
    is_over: AtomicBool,
    in_flight: AtomicU64,
}

impl Load {
    /// Starts so many callers that make so many logins a second together.
    pub fn start(address: watch::Receiver<SocketAddr>, ledger: Arc<Ledger>, callers: u32, rate: u32) -> Self {
        let shared = Arc::new(Shared {
            address,
            ledger,
            is_paused: watch::Sender::new(false),
            is_over: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
        });
        let beat = Duration::from_secs(1) * callers / rate.max(1);
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for i in 0..callers {
            tasks.spawn(call(Arc::clone(&shared), beat, start + beat * i / callers));
        }
        Self { shared, callers: tasks }
    }

    /// Sends nothing more, and waits until all that was sent is over.
    pub async fn pause(&self) {
        self.shared.is_paused.send_replace(true);
        while self.shared.in_flight.load(SeqCst) > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Goes on.
    pub fn resume(&self) {
        self.shared.is_paused.send_replace(false);
    }

    /// Ends, when all that was sent is over.
    pub async fn stop(mut self) {
        self.shared.is_over.store(true, SeqCst);
        self.resume();
        while self.callers.join_next().await.is_some() {}
    }
}

async fn call(shared: Arc<Shared>, beat: Duration, mut due: Instant) {
    let mut connection = None;
    let mut buffer = Vec::with_capacity(4096);
    let mut paused = shared.is_paused.subscribe();
    while !shared.is_over.load(SeqCst) {
        sleep_until(due).await;
        // What was missed is not made up for: that would be a burst.
        due = Instant::now().max(due + beat);
        // Before the question, so that whoever pauses waits for this login, or this login for them.
        shared.in_flight.fetch_add(1, SeqCst);
        if *paused.borrow() {
            shared.in_flight.fetch_sub(1, SeqCst);
            if paused.wait_for(|is_paused| !is_paused).await.is_err() {
                return;
            }
            continue;
        }
        let address = *shared.address.borrow();
        connection = log_in(connection, address, &mut buffer, &shared.ledger).await;
        shared.in_flight.fetch_sub(1, SeqCst);
    }
}

/// One login, and the connection if it can be used again.
async fn log_in(
    connection: Option<TcpStream>,
    address: SocketAddr,
    buffer: &mut Vec<u8>,
    ledger: &Ledger,
) -> Option<TcpStream> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => {
            // Nothing was sent yet: api is away for the moment.
            let connection = timeout(PATIENCE, TcpStream::connect(address)).await.ok()?.ok()?;
            connection.set_nodelay(true).ok()?;
            connection
        }
    };
    let trace: TraceId = Uuid::new_v4().as_u128();
    let begun = Instant::now();
    let answer = timeout(PATIENCE, send(&mut connection, address, trace, buffer)).await;
    let (outcome, connection) = match answer {
        Ok(Ok(200)) => (Outcome::Answered, Some(connection)),
        Ok(Ok(status)) => (Outcome::Refused(status), Some(connection)),
        Ok(Err(_)) | Err(_) => (Outcome::Unknown, None),
    };
    ledger.note(Login { trace, begun, ended: Instant::now(), outcome });
    connection
}

async fn send(
    connection: &mut TcpStream,
    host: SocketAddr,
    trace: TraceId,
    buffer: &mut Vec<u8>,
) -> Result<u16> {
    // Any but zero; it has no span of its own.
    const CALLER: u64 = 1;

    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
    let request = format!(
        "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n\
         traceparent: 00-{trace:032x}-{CALLER:016x}-01\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(request.as_bytes()).await?;
    read_status(connection, buffer).await
}
