//! For development only; no service depends on it.
//!
//! - [`dev`]: `cargo dev`, the whole system on this machine
//! - [`verify`]: checks a running system against the contract, with [`jaeger`]
//! - [`receiver`]: an OTLP (and Zipkin) receiver on a free port
//! - [`backend`]: a trace backend in memory, with Jaeger's query API
//! - [`trace`]: spans as they were received, drawn as a tree; [`metric`] and [`log`] beside them
//! - [`broker`]: an AMQP 0-9-1 broker, and [`raw`]: its frames by hand
//! - [`rabbitmq`]: a RabbitMQ node of this program's own
//! - [`process`]: the services as real processes
//! - [`proxy`]: a TCP proxy that fails as networks do
//! - [`certificates`]: for tests of TLS, and [`tls_front`]: TLS in front of a broker
//! - [`database`]: mq's database, looked into and spoiled
//! - [`stand_in`]: a usercenter that answers as it is told
//! - [`stack`]: all of them together, as the end-to-end tests use them
//! - [`balancer`]: one address for several instances of a service
//! - [`client`]: a small HTTP client
//! - [`chaos`]: `cargo dev chaos`, is nothing lost?
//! - [`mod@bench`]: what tracing costs, and how fast the broker is

pub mod backend;
mod background;
pub mod balancer;
pub mod bench;
pub mod broker;
pub mod certificates;
pub mod chaos;
pub mod client;
pub mod database;
pub mod dev;
pub mod jaeger;
pub mod log;
pub mod metric;
mod orphans;
pub mod process;
pub mod proxy;
pub mod rabbitmq;
pub mod raw;
pub mod receiver;
pub mod stack;
pub mod stand_in;
pub mod tls_front;
pub mod trace;
pub mod verify;

use anyhow::{Result, bail};
use std::{
    net::{Ipv4Addr, TcpListener},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// The longest that anything which must come may take, on a busy machine with a slow disk.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks until there is an answer, for at most `limit`.
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

/// A free port for a process that will take it in a moment. Below those that connections are given
/// (`ip_local_port_range`), so that none takes it before; and another one in each process that asks.
///
/// # Errors
/// If all are taken.
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
