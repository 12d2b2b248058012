//! A small load balancer, with which tests see how a real balancer would treat a service. It is for development
//! only.
//!
//! The balancer distributes connections, so it treats HTTP/1.1 and gRPC alike. Each new connection goes to the
//! next ready instance in turn. If this instance refuses the connection, the balancer tries the next instance.
//! If no instance is ready, the balancer tries all instances, because an instance that is not quite ready is
//! better than no instance.

use anyhow::Result;
use loopback::{background::Background, client::Client};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::copy_bidirectional,
    net::TcpStream,
    time::{interval, timeout},
};

/// The interval between two health checks of an instance.
pub const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// How long an instance may take to answer a health check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// The health check that tells whether an instance is ready.
#[derive(Debug, Clone, Copy)]
pub enum Check {
    /// `GET /readyz`
    Http,
    /// The standard gRPC health check.
    Grpc,
}

/// A running balancer. When it is dropped, it stops and closes its connections.
pub struct Balancer {
    /// The address that the balancer listens on.
    pub address: SocketAddr,
    instances: Arc<Instances>,
    _runtime: Background,
}

struct Instances {
    all: Vec<Instance>,
    turn: AtomicUsize,
}

struct Instance {
    address: SocketAddr,
    is_ready: AtomicBool,
    connections: AtomicUsize,
}

impl Balancer {
    /// Listens on a free port and balances between these instances.
    ///
    /// # Errors
    /// If no port is free.
    pub fn start(check: Check, addresses: &[SocketAddr]) -> Result<Self> {
        let instance = |address: &SocketAddr| Instance {
            address: *address,
            is_ready: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        };
        let all = addresses.iter().map(instance).collect();
        let instances = Arc::new(Instances { all, turn: AtomicUsize::new(0) });

        let runtime = Background::start(1, 1)?;
        let listener = runtime.listen(([127, 0, 0, 1], 0).into())?;
        let address = listener.local_addr()?;
        for index in 0..addresses.len() {
            runtime.spawn(instances.clone().check(index, check));
        }
        let of_connections = instances.clone();
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(of_connections.clone().connect(client));
            }
        });
        Ok(Self { address, instances, _runtime: runtime })
    }

    /// Returns whether each instance is ready, in the order in which the instances were given.
    pub fn ready(&self) -> Vec<bool> {
        self.instances.all.iter().map(|instance| instance.is_ready.load(Relaxed)).collect()
    }

    /// Returns how many connections each instance has been given.
    pub fn connections(&self) -> Vec<usize> {
        self.instances.all.iter().map(|instance| instance.connections.load(Relaxed)).collect()
    }
}

impl Instances {
    async fn check(self: Arc<Self>, index: usize, check: Check) {
        let instance = &self.all[index];
        let mut interval = interval(CHECK_INTERVAL);
        loop {
            interval.tick().await;
            let is_ready = timeout(CHECK_TIMEOUT, async {
                match check {
                    // Each check opens a new connection, because a check on a kept-alive connection would
                    // succeed even if the instance accepts no new connections.
                    Check::Http => Client::new()
                        .get(&format!("http://{}/readyz", instance.address))
                        .await
                        .is_ok_and(|answer| answer.status == 200),
                    Check::Grpc => serving::health::probe(instance.address).await.is_ok(),
                }
            });
            instance.is_ready.store(is_ready.await.unwrap_or(false), Relaxed);
        }
    }

    async fn connect(self: Arc<Self>, mut client: TcpStream) {
        let turn = self.turn.fetch_add(1, Relaxed);
        let in_turn = (0..self.all.len()).map(|i| &self.all[(turn + i) % self.all.len()]);
        let (ready, others): (Vec<_>, Vec<_>) = in_turn.partition(|i| i.is_ready.load(Relaxed));
        for instance in ready.into_iter().chain(others) {
            if let Ok(mut server) = TcpStream::connect(instance.address).await {
                instance.connections.fetch_add(1, Relaxed);
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let _ = copy_bidirectional(&mut client, &mut server).await;
                return;
            }
        }
    }
}
