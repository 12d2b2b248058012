//! Servers and clients on localhost, for all tools.
//!
//! - [`poll`]: calls a function until it returns a value; [`PATIENCE`]: how long a test may wait for that
//! - [`free_port`]: a port for a process that is about to start
//! - [`background`]: servers on a runtime of their own
//! - [`client`]: a small HTTP client

pub mod background;
pub mod client;

use anyhow::{Result, bail};
use std::{
    net::{Ipv4Addr, TcpListener},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How long a test waits for an event that must happen. This is enough on a busy machine with a slow disk.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Calls `ask` again and again until it returns an answer, for at most `limit`.
pub async fn poll<T>(limit: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return Some(answer);
        }
        if Instant::now() > deadline {
            return None;
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Finds a free port for a process that will soon bind it. The port is below the range that the system uses for
/// outgoing connections (`ip_local_port_range`), so that no connection gets the port first. Each process starts
/// its search at a different port.
///
/// # Errors
/// If no free port is found.
pub fn free_port() -> Result<u16> {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    for _ in 0..1000 {
        let number = std::process::id().wrapping_mul(16).wrapping_add(ASKED.fetch_add(1, Relaxed));
        let port = 20_000 + (number % 12_000) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port between 20000 and 32000")
}
