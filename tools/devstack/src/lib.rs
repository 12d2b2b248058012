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

pub mod bench;
pub mod chaos;
pub mod dev;
pub mod jaeger;
pub mod verify;

pub use backend;
pub use broker;
pub use harness::{client, free_port, poll, process, proxy, rabbitmq, stack, trace};
pub use loopback::background;
