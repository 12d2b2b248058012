//! An AMQP 0-9-1 broker inside this process, for machines without RabbitMQ, and for tests that need a
//! separate broker. It is for development only, because no message survives the process.
//!
//! For the services here and for ordinary clients, the broker behaves like RabbitMQ. The same conformance
//! checks run on both brokers (`tests/broker_conformance/`). The broker refuses these features with 540
//! NOT_IMPLEMENTED: transactions, headers exchanges, bindings between exchanges, the headers CC and BCC,
//! priorities of messages and of consumers, single active consumers, a prefetch count for a whole channel,
//! `basic.recover`, `channel.flow`, `access.request`, the flag `immediate`, direct reply-to, a maximum length
//! of a queue in bytes, the overflow `reject-publish-dlx`, and streams. There is one virtual host, `/`, and
//! one user.
//!
//! A quorum queue behaves towards clients as RabbitMQ's does. It can keep dead letters until another queue
//! has accepted them, it counts how often each message is requeued, and it is always durable. It does not add
//! the header `x-delivery-count`, and it is not replicated, because the broker is only one process.
//!
//! The broker's memory is bounded. A client that does not read gets no further deliveries. While the broker
//! holds more than 256 MiB, it reads nothing from connections that publish, not even acknowledgements, and
//! informs their clients with `connection.blocked`, as RabbitMQ does.
//!
//! - `connection`: the socket; `handshake`: how a connection begins; `output`: the frames to write
//! - `frames`: bytes to frames and back; `exception`: the errors that close a channel or a connection
//! - `virtual_host`: the state, behind one lock; `channel`: the state of a channel
//! - `methods`: the methods of clients; `content`: messages, until they are complete
//! - `definitions`, `exchange`, `queue`, `arguments`: declarations
//! - `publishing`, `delivery`, `message`: messages on their way; `memory`: the memory that the state takes
//! - `outage`: faults of the broker, for tests of its clients
//! - [`raw`]: a client that sends frames by hand

mod arguments;
mod channel;
mod connection;
mod content;
mod definitions;
mod delivery;
mod exception;
mod exchange;
mod frames;
mod handshake;
mod memory;
mod message;
mod methods;
mod outage;
mod output;
mod publishing;
mod queue;
pub mod raw;
mod virtual_host;

use anyhow::{Context, Result};
use connection::{Shared, serve};
use memory::Memory;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    runtime::{self, Runtime},
    select,
    sync::{Semaphore, watch},
    time::{Instant, sleep, sleep_until},
};

const USER: &str = "guest";
const PASSWORD: &str = "guest";

/// The bytes that the broker may hold before publishers have to wait.
const MEMORY: usize = 256 * 1024 * 1024;

/// The highest number of simultaneous connections. Further connections are closed at once.
const MAX_CONNECTIONS: usize = 1000;

/// A broker. When it is dropped, it stops and its connections end.
pub struct Broker {
    address: SocketAddr,
    shared: Shared,
    /// Whether the broker serves connections; `outage` changes this.
    is_up: watch::Sender<bool>,
    /// The broker's own runtime, because the runtime of a test may be busy or about to end.
    runtime: Option<Runtime>,
}

impl Broker {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn start() -> Result<Self> {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Listens at `address`.
    ///
    /// # Errors
    /// If the address is in use.
    pub async fn start_at(address: SocketAddr) -> Result<Self> {
        Self::start_with(address, MEMORY)
    }

    fn start_with(address: SocketAddr, memory: usize) -> Result<Self> {
        let listener =
            std::net::TcpListener::bind(address).with_context(|| format!("listening at {address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("broker")
            .enable_all()
            .build()?;
        let shared = Shared::new(Memory::new(memory));
        runtime.spawn(run_clock(shared.clone()));
        let is_up = watch::Sender::new(true);
        let inside = runtime.enter();
        runtime.spawn(accept(TcpListener::from_std(listener)?, shared.clone(), is_up.subscribe()));
        drop(inside);
        Ok(Self { address, shared, is_up, runtime: Some(runtime) })
    }

    /// Returns the address at which the broker listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the URL of the broker, with user and password, in the form of `AMQP_URL`.
    pub fn url(&self) -> String {
        format!("amqp://{USER}:{PASSWORD}@{}/%2f", self.address)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, shared: Shared, is_up: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // The most likely cause is that too many files are open.
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        // A stopped broker still listens, so that no other process can take its address.
        if *is_up.borrow()
            && let Ok(place) = Arc::clone(&room).try_acquire_owned()
        {
            let (shared, mut is_up) = (shared.clone(), is_up.clone());
            tokio::spawn(async move {
                select! {
                    // An error needs no report here, because the client already knows of it, or is gone.
                    _ = serve(stream, shared) => {}
                    _ = is_up.wait_for(|is_up| !is_up) => {}
                }
                drop(place);
            });
        }
    }
}

/// Expires messages and queues when they are due.
async fn run_clock(shared: Shared) {
    let earlier = shared.lock().clock();
    loop {
        let due = shared.lock().tick(Instant::now());
        match due {
            Some(due) if due <= Instant::now() => tokio::task::yield_now().await,
            Some(due) => tokio::select! {
                () = sleep_until(due) => {}
                () = earlier.notified() => {}
            },
            None => earlier.notified().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::{
        BasicProperties, Channel, Connection, ConnectionProperties,
        options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
        types::FieldTable,
    };
    use tokio::time::timeout;

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    async fn connect(broker: &Broker) -> (Connection, Channel) {
        let connection = Connection::connect(&broker.url(), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        (connection, channel)
    }

    async fn publish(channel: &Channel, body: &[u8]) -> lapin::Result<lapin::PublisherConfirm> {
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
        channel.basic_publish("".into(), "q".into(), options, body, properties).await
    }

    #[tokio::test]
    async fn who_publishes_waits_while_queues_hold_too_much() {
        const MESSAGES: usize = 100;

        let broker = Broker::start_with(ANY, 1024 * 1024).unwrap();
        let ((_one, publisher), (_other, consumer)) = (connect(&broker).await, connect(&broker).await);
        let options = QueueDeclareOptions::durable();
        consumer.queue_declare("q".into(), options, FieldTable::default()).await.unwrap();
        let body = vec![0; 100 * 1024];
        let publishing = tokio::spawn({
            let body = body.clone();
            async move {
                for _ in 0..MESSAGES {
                    publish(&publisher, &body).await?.await?;
                }
                lapin::Result::Ok(())
            }
        });
        let count = async || {
            let passive = QueueDeclareOptions { passive: true, ..Default::default() };
            consumer.queue_declare("q".into(), passive, FieldTable::default()).await.unwrap().message_count()
        };
        // The memory has room for ten messages, and the broker may take one more message before it stops
        // reading.
        let full = loopback::poll(Duration::from_secs(10), async || (count().await >= 10).then_some(()));
        full.await.expect("ten messages");
        for _ in 0..20 {
            assert!(count().await <= 11);
            sleep(Duration::from_millis(10)).await;
        }
        // The broker still serves a connection that does not publish.
        for _ in 0..MESSAGES {
            let got = loopback::poll(Duration::from_secs(10), async || {
                consumer.basic_get("q".into(), BasicGetOptions { no_ack: true }).await.unwrap()
            });
            assert_eq!(got.await.expect("a message").data.len(), body.len());
        }
        timeout(loopback::PATIENCE, publishing).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_address_in_use_is_an_error() {
        let broker = Broker::start().await.unwrap();
        let error = Broker::start_at(broker.address()).await.err().expect("an error");
        assert!(format!("{error:#}").contains(&broker.address().to_string()), "{error:#}");
    }

    #[tokio::test]
    async fn with_the_broker_its_connections_end_and_its_address_is_free() {
        let broker = Broker::start().await.unwrap();
        let (connection, _channel) = connect(&broker).await;
        let address = broker.address();
        drop(broker);
        let ended =
            loopback::poll(loopback::PATIENCE, async || (!connection.status().connected()).then_some(()));
        assert!(ended.await.is_some());
        let again = loopback::poll(loopback::PATIENCE, async || Broker::start_at(address).await.ok());
        connect(&again.await.expect("the address is free")).await;
    }
}
