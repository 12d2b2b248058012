//! The load generator: logins over kept-alive connections, at a fixed rate or as fast as they are answered. The
//! generator writes and reads HTTP by hand, so that its cost is small compared with that of the services.

use anyhow::Result;
use harness::client::read_status;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// The body of every login.
pub const BODY: &str = r#"{"mobile":"13800138000"}"#;

/// The beginning of a load, when connections open and the caches refill after another variant's turn. Logins
/// that start in this time are counted, but their latencies are not recorded.
const LEAD_IN: Duration = Duration::from_millis(500);

/// A load on the service.
pub struct Load {
    /// Logins per second over all connections. With `None`, each connection sends a login as soon as the
    /// previous login is answered.
    pub rate: Option<u32>,
    /// The number of simultaneous connections.
    pub connections: usize,
    /// The duration of the load, in seconds.
    pub seconds: u64,
}

/// The result of a load.
#[derive(Default)]
pub struct Report {
    /// Logins answered with 200.
    pub logins: u64,
    /// Logins answered with another status.
    pub failed: u64,
    /// The time from the start of the load to the last answer.
    elapsed: Duration,
    /// The latency of each login that was due after the lead-in, sorted.
    latencies: Vec<Duration>,
}

impl Load {
    /// Sends the load to the service at `address`.
    ///
    /// # Errors
    /// If a connection breaks.
    pub async fn run(&self, address: SocketAddr) -> Result<Report> {
        let start = Instant::now() + Duration::from_millis(50);
        let mut connections = JoinSet::new();
        for i in 0..self.connections {
            // All connections have the same interval between logins, each with a different offset.
            let beat =
                self.rate.map(|rate| Duration::from_secs_f64(self.connections as f64 / f64::from(rate)));
            let first = start + beat.unwrap_or_default().mul_f64(i as f64 / self.connections as f64);
            connections.spawn(connection(address, beat, first, start, self.seconds));
        }
        let mut report = Report::default();
        while let Some(connection) = connections.join_next().await {
            let one = connection??;
            report.logins += one.logins;
            report.failed += one.failed;
            report.latencies.extend(one.latencies);
        }
        report.elapsed = start.elapsed();
        report.latencies.sort_unstable();
        Ok(report)
    }
}

impl Report {
    /// Returns the throughput in logins per second.
    pub fn throughput(&self) -> f64 {
        self.logins as f64 / self.elapsed.as_secs_f64()
    }

    /// Returns a quantile of the latencies, that is, the time that this share of the logins did not exceed.
    pub fn latency(&self, quantile: f64) -> Duration {
        let at = (self.latencies.len() as f64 * quantile) as usize;
        self.latencies.get(at).copied().unwrap_or_default()
    }
}

async fn connection(
    address: SocketAddr,
    beat: Option<Duration>,
    first: Instant,
    begin: Instant,
    seconds: u64,
) -> Result<Report> {
    let end = begin + Duration::from_secs(seconds);
    let mut connection = TcpStream::connect(address).await?;
    connection.set_nodelay(true)?;
    let request = format!(
        "POST /usercenter/v1/user/login HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let mut report = Report::default();
    let mut buffer = Vec::with_capacity(4096);
    let mut due = first;
    loop {
        // The latency of a delayed login counts from the time when the login was due, because it has waited
        // since then.
        let mut start = Instant::now();
        if due.max(start) >= end {
            return Ok(report);
        }
        if start < due {
            sleep_until(due).await;
            start = Instant::now();
        } else if beat.is_some() {
            start = due;
        }
        connection.write_all(request.as_bytes()).await?;
        if read_status(&mut connection, &mut buffer).await? == 200 {
            report.logins += 1;
        } else {
            report.failed += 1;
        }
        if start >= begin + LEAD_IN {
            report.latencies.push(start.elapsed());
        }
        due = beat.map_or(due, |beat| due + beat);
    }
}
