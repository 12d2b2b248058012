//! The end-to-end tests: real processes, real sockets, and the shape of the trace. They are one program, so that
//! they link once, and so that a slow test does not delay those in other files. `connections.rs` is another
//! program, because ten thousand connections take the whole machine, and `dead_parts.rs`, because it has a log of
//! its own.

mod accounting;
mod configuration;
mod consumer_outages;
mod conventions;
mod dead_letters;
mod dev;
mod errors;
mod export;
mod go_zero;
mod history;
mod hostile;
mod http2;
mod keep_alive;
mod layers;
mod login_flow;
mod logs;
mod messages;
mod metrics;
mod operation;
mod otlp;
mod outages;
mod queues;
mod resilience;
mod retries;
mod rolling_restart;
mod shutdown;
mod smuggling;
mod spans;
mod spool;
mod tls;
mod trace_context;
