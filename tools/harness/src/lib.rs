//! Runs the three services and makes parts of the system fail, for the end-to-end tests, the chaos test and the
//! benchmarks.
//!
//! - [`stack`]: the services with a broker and a receiver, as the end-to-end tests use them
//! - [`process`]: a service as a real process, which also ends if the test that started it is killed
//! - [`go_zero`]: the same services in Go, which can replace the services in Rust
//! - [`receiver`]: a receiver of OTLP (and Zipkin) on a free port
//! - [`trace`]: the received spans, drawn as a tree; [`metric`] and [`log`]: the other two signals
//! - [`client`]: a small HTTP client
//! - [`proxy`]: a TCP proxy that fails in the ways in which networks fail
//! - [`balancer`]: one address for several instances of a service
//! - [`stand_in`]: a stand-in for usercenter, with answers that the test chooses
//! - [`rabbitmq`]: a separate RabbitMQ node for one test or tool
//! - [`database`]: mq's database, which a test reads and makes fail
//! - [`certificates`]: certificates for tests of TLS; [`tls_front`]: TLS in front of a broker

pub mod balancer;
pub mod certificates;
pub mod database;
pub mod go_zero;
mod orphans;
pub mod process;
pub mod proxy;
pub mod rabbitmq;
pub mod stack;
pub mod stand_in;
pub mod tls_front;

// These modules are re-exported, so that a test finds everything in one crate.
pub use backend::{conventions, log, metric, receiver, trace};
pub use loopback::{PATIENCE, client, free_port, poll};
