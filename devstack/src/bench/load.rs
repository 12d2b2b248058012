//! The load generator: logins over kept-alive connections, at a fixed rate or as fast as they are
//! answered. It writes and reads HTTP by hand, so that it costs little beside what it measures.

use anyhow::{Result, ensure};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until},
};

const BODY: &str = r#"{"mobile":"13800138000"}"#;
const WARM_UP: u64 = 2;

/// A load on the service.
pub struct Load {
    /// Logins a second over all connections; `None` for as many as are answered.
    pub rate: Option<u32>,
    /// Connections at the same time.
    pub connections: usize,
    /// How long to measure.
    pub seconds: u64,
}

/// What was answered.
pub struct Report {
    /// Logins answered with 200.
    pub logins: u64,
    /// Logins answered otherwise.
    pub failed: u64,
    /// How long it took.
    pub seconds: f64,
    /// How long each took, by the second in which it was due.
    pub latencies: Vec<Vec<Duration>>,
}

impl Load {
    /// The same load, unmeasured, for two seconds.
    ///
    /// # Errors
    /// If a connection breaks.
    pub async fn warm_up(&self, address: SocketAddr) -> Result<Report> {
        self.drive(address, WARM_UP).await
    }

    /// The load, measured.
    ///
    /// # Errors
    /// If a connection breaks.
    pub async fn run(&self, address: SocketAddr) -> Result<Report> {
        self.drive(address, self.seconds).await
    }

    async fn drive(&self, address: SocketAddr, seconds: u64) -> Result<Report> {
        let start = Instant::now() + Duration::from_millis(50);
        let mut connections = JoinSet::new();
        for i in 0..self.connections {
            // Each connection has its own beat, shifted against the others.
            let beat =
                self.rate.map(|rate| Duration::from_secs_f64(self.connections as f64 / f64::from(rate)));
            let first = start + beat.unwrap_or_default().mul_f64(i as f64 / self.connections as f64);
            connections.spawn(connection(address, beat, first, start, seconds));
        }
        let mut report = Report::new(seconds);
        while let Some(connection) = connections.join_next().await {
            let one = connection??;
            report.logins += one.logins;
            report.failed += one.failed;
            for (all, one) in report.latencies.iter_mut().zip(&one.latencies) {
                all.extend(one);
            }
        }
        report.seconds = start.elapsed().as_secs_f64();
        Ok(report)
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
    let mut report = Report::new(seconds);
    let mut buffer = Vec::with_capacity(4096);
    let mut due = first;
    loop {
        // A login that is late because the one before it took long has been waiting since it was due.
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
        let second = usize::try_from(start.saturating_duration_since(begin).as_secs())?;
        let last = report.latencies.len() - 1;
        report.latencies[second.min(last)].push(start.elapsed());
        due = beat.map_or(due, |beat| due + beat);
    }
}

/// Reads an answer with a `content-length`; its status.
pub(crate) async fn read_status(connection: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<u16> {
    buffer.clear();
    loop {
        ensure!(connection.read_buf(buffer).await? > 0, "the connection was closed");
        let Some(head) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
            continue;
        };
        let text = std::str::from_utf8(&buffer[..head])?;
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.unwrap_or("0").parse()?;
        let status = text.split(' ').nth(1).unwrap_or_default().parse()?;
        while buffer.len() < head + 4 + length {
            ensure!(connection.read_buf(buffer).await? > 0, "the connection was closed");
        }
        return Ok(status);
    }
}

impl Report {
    fn new(seconds: u64) -> Self {
        Self { logins: 0, failed: 0, seconds: 0.0, latencies: (0..seconds).map(|_| Vec::new()).collect() }
    }
}
