//! What runs and disturbs the three services: for the end-to-end tests, for chaos and for the benchmarks.
//!
//! - [`stack`]: the services with a broker and a receiver, as the end-to-end tests use them
//! - [`process`]: a service as a real process; `orphans` ends it if its parent is killed
//! - [`receiver`]: an OTLP (and Zipkin) receiver on a free port
//! - [`trace`]: spans as they were received, drawn as a tree; [`metric`] and [`log`] beside it
//! - [`client`]: a small HTTP client
//! - [`proxy`]: a TCP proxy that fails as networks do
//! - [`balancer`]: one address for several instances of a service
//! - [`stand_in`]: a usercenter that answers as it is told
//! - [`rabbitmq`]: a RabbitMQ node of this program's own
//! - [`database`]: mq's database, looked into and spoiled
//! - [`certificates`]: for tests of TLS, and [`tls_front`]: TLS in front of a broker

pub mod balancer;
pub mod certificates;
pub mod database;
mod orphans;
pub mod process;
pub mod proxy;
pub mod rabbitmq;
pub mod stack;
pub mod stand_in;
pub mod tls_front;

// So that a test finds all it needs in one place.
pub use backend::{log, metric, receiver, trace};
pub use loopback::{PATIENCE, client, free_port, poll};
