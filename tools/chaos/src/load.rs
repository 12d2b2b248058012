//! The load: logins at a steady rate over many connections. Each login has a separate trace. If a login can't
//! be sent, because api can't be reached, it does not count as attempted. Every login that was sent is
//! recorded, whatever its outcome.

use super::ledger::{Ledger, Login, Outcome, TraceId};
use anyhow::{Result, ensure};
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

/// How long a caller waits for a response.
const PATIENCE: Duration = Duration::from_secs(10);

/// A load, which runs until it is stopped.
pub struct Load {
    shared: Arc<Shared>,
    callers: JoinSet<()>,
}

struct Shared {
    /// api's current address.
    address: watch::Receiver<SocketAddr>,
    ledger: Arc<Ledger>,
    is_paused: watch::Sender<bool>,
    is_over: AtomicBool,
    in_flight: AtomicU64,
}

impl Load {
    /// Starts this many callers, which together send `rate` logins per second.
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

    /// Stops sending logins for now, and waits until all logins that were sent have an outcome.
    pub async fn pause(&self) {
        self.shared.is_paused.send_replace(true);
        while self.shared.in_flight.load(SeqCst) > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Continues to send logins after [`Load::pause`].
    pub fn resume(&self) {
        self.shared.is_paused.send_replace(false);
    }

    /// Stops the load, and waits until all logins that were sent have an outcome.
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
        // A late caller does not catch up on missed logins, because that would cause a burst.
        due = Instant::now().max(due + beat);
        // The count is raised before `paused` is read. So either `Load::pause` waits for this login, or this
        // login waits until the load is resumed.
        shared.in_flight.fetch_add(1, SeqCst);
        if *paused.borrow() {
            shared.in_flight.fetch_sub(1, SeqCst);
            if paused.wait_for(|is_paused| !is_paused).await.is_err() {
                return;
            }
            continue;
        }
        let address = *shared.address.borrow();
        connection = log_in(connection, address, "", &mut buffer, &shared.ledger).await;
        shared.in_flight.fetch_sub(1, SeqCst);
    }
}

/// Sends a login whose context is longer than a frame of api, so that api must leave out the baggage.
pub async fn log_in_with_large_baggage(address: SocketAddr, ledger: &Ledger) {
    let baggage = format!("baggage: k={}\r\n", "v".repeat(8100));
    log_in(None, address, &baggage, &mut Vec::new(), ledger).await;
}

/// Sends a request whose body is longer than api accepts.
///
/// # Errors
/// If the answer is not 413.
pub async fn send_too_large_body(address: SocketAddr) -> Result<()> {
    /// One byte more than api accepts.
    const LENGTH: usize = 1024 * 1024 + 1;
    let sent = async {
        let mut connection = TcpStream::connect(address).await?;
        let head = format!(
            "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: {address}\r\n\
             content-type: application/json\r\ncontent-length: {LENGTH}\r\n\r\n"
        );
        connection.write_all(head.as_bytes()).await?;
        connection.write_all(&vec![b' '; LENGTH]).await?;
        let status = read_status(&mut connection, &mut Vec::new()).await?;
        ensure!(status == 413, "a request with a body that is too large was answered {status}");
        Ok(())
    };
    timeout(PATIENCE, sent).await?
}

/// Sends one login; returns the connection if it can be used again.
async fn log_in(
    connection: Option<TcpStream>,
    address: SocketAddr,
    headers: &str,
    buffer: &mut Vec<u8>,
    ledger: &Ledger,
) -> Option<TcpStream> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => {
            // If api can't be reached, nothing was sent, so this login is not recorded.
            let connection = timeout(PATIENCE, TcpStream::connect(address)).await.ok()?.ok()?;
            connection.set_nodelay(true).ok()?;
            connection
        }
    };
    let trace: TraceId = Uuid::new_v4().as_u128();
    let begun = Instant::now();
    let answer = timeout(PATIENCE, send(&mut connection, address, trace, headers, buffer)).await;
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
    headers: &str,
    buffer: &mut Vec<u8>,
) -> Result<u16> {
    // The caller has no span, so its span id is arbitrary, but must not be zero.
    const CALLER: u64 = 1;

    let body = format!(r#"{{"mobile":"{KNOWN_MOBILE}"}}"#);
    let request = format!(
        "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n\
         traceparent: 00-{trace:032x}-{CALLER:016x}-01\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(request.as_bytes()).await?;
    read_status(connection, buffer).await
}
