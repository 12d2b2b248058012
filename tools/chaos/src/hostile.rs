//! A hostile caller. It sends valid requests with contexts as large as HTTP allows, for an unknown user.
//! Between these requests, it sends requests that it does not finish, and it resets connections. The hostile
//! caller must not harm any login, and api must answer it with refusals only.

use anyhow::{Context, Result};
use harness::client::read_status;
use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

/// How long a caller waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The number of connections with an unfinished request that a caller keeps open.
const MOST_HELD: usize = 10;

const HEAD: &str = "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
const UNKNOWN: &str = "content-length: 24\r\n\r\n{\"mobile\":\"13900139000\"}";

/// Hostile callers, which send requests until they are stopped.
pub struct Hostile {
    is_over: Arc<AtomicBool>,
    callers: JoinSet<Sent>,
}

/// The requests of a hostile caller, and the wrong answers to them.
#[derive(Default)]
pub struct Sent {
    /// The number of requests, complete or not.
    pub requests: usize,
    /// The answers that should not have been given.
    pub wrong: BTreeSet<String>,
}

/// The attacks of a hostile caller, which repeats them in this order.
#[derive(Clone, Copy)]
enum Attack {
    /// A large but valid context, on a connection that stays open.
    LargeContext,
    /// The first half of a request's headers.
    HalfHead,
    /// A request whose sender resets the connection before the answer.
    Reset,
    /// A request whose body is shorter than its `content-length`.
    HalfBody,
}

impl Hostile {
    /// Starts this many callers, which together send `rate` requests per second.
    pub fn start(api: SocketAddr, callers: u32, rate: u32) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let beat = Duration::from_secs(1) * callers / rate.max(1);
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for i in 0..callers {
            tasks.spawn(call(api, Arc::clone(&is_over), i as usize, beat, start + beat * i / callers));
        }
        Self { is_over, callers: tasks }
    }

    /// Stops the callers.
    pub async fn stop(mut self) -> Sent {
        self.is_over.store(true, SeqCst);
        let mut all = Sent::default();
        while let Some(Ok(sent)) = self.callers.join_next().await {
            all.requests += sent.requests;
            all.wrong.extend(sent.wrong);
        }
        all
    }
}

async fn call(
    api: SocketAddr,
    is_over: Arc<AtomicBool>,
    number: usize,
    beat: Duration,
    mut due: Instant,
) -> Sent {
    let (mut sent, mut kept, mut held) = (Sent::default(), None, VecDeque::new());
    let attacks = [Attack::LargeContext, Attack::HalfHead, Attack::Reset, Attack::HalfBody];
    // The callers begin with different attacks, so that attacks of every kind occur at the same time.
    for attack in attacks.iter().cycle().skip(number % attacks.len()) {
        sleep_until(due).await;
        due = Instant::now().max(due + beat);
        if is_over.load(SeqCst) {
            break;
        }
        sent.requests += 1;
        match timeout(PATIENCE, attack.make(api, &mut kept, &mut held)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => drop(sent.wrong.insert(format!("a hostile caller: {error:#}"))),
            Err(_) => drop(sent.wrong.insert("a hostile caller was not answered in time".to_owned())),
        }
    }
    sent
}

impl Attack {
    async fn make(
        self,
        api: SocketAddr,
        kept: &mut Option<TcpStream>,
        held: &mut VecDeque<TcpStream>,
    ) -> Result<()> {
        match self {
            Self::LargeContext => {
                let mut connection = match kept.take() {
                    Some(connection) => connection,
                    None => connect(api).await?,
                };
                let request = format!("{HEAD}{}{UNKNOWN}", large_context());
                connection.write_all(request.as_bytes()).await.context("sending a large context")?;
                let status = read_status(&mut connection, &mut Vec::new()).await;
                let status = status.context("reading the answer to a large context")?;
                anyhow::ensure!(status == 401, "a login of an unknown user was answered {status}");
                *kept = Some(connection);
            }
            Self::HalfHead | Self::HalfBody => {
                let end = if matches!(self, Self::HalfBody) { &UNKNOWN[..UNKNOWN.len() - 9] } else { "x-sl" };
                let mut connection = connect(api).await?;
                connection
                    .write_all(format!("{HEAD}{end}").as_bytes())
                    .await
                    .context("sending half a request")?;
                held.push_back(connection);
                if held.len() > MOST_HELD {
                    held.pop_front();
                }
            }
            Self::Reset => {
                let mut connection = connect(api).await?;
                connection.write_all(format!("{HEAD}{UNKNOWN}").as_bytes()).await.context("sending")?;
                connection.set_zero_linger().context("resetting")?;
            }
        }
        Ok(())
    }
}

async fn connect(api: SocketAddr) -> Result<TcpStream> {
    let connection = TcpStream::connect(api).await.context("connecting")?;
    connection.set_nodelay(true)?;
    Ok(connection)
}

/// Returns headers with 8.3 KB of `tracestate`, which is expensive to escape, and 7.7 KB of `baggage`.
fn large_context() -> String {
    let members: Vec<String> = (0..32).map(|i| format!("k{i:02}={}", "\"".repeat(256))).collect();
    let traceparent = format!("00-{:032x}-{:016x}-01", uuid::Uuid::new_v4().as_u128(), 1);
    let (tracestate, baggage) = (members.join(","), format!("k={}", "v".repeat(7700)));
    format!("traceparent: {traceparent}\r\ntracestate: {tracestate}\r\nbaggage: {baggage}\r\n")
}
