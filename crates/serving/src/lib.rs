//! How every service handles its connections, and how it shuts down.
//!
//! - [`arguments`]: reads flags and environment variables
//! - [`process`]: runs a service between the start and the end of telemetry
//! - [`listener`]: accepts connections, and goes on after errors
//! - [`grpc`]: tonic's server, with limits on connections
//! - [`memory`]: gives freed memory back to the system
//! - [`health`]: asks a gRPC service for its health
//! - [`waiting`]: decides which connection is closed when there are too many
//! - [`seldom`]: limits a log line to one per minute
//! - [`shutdown`]: leads a service from the signal to its exit, within one deadline

pub mod arguments;
pub mod grpc;
pub mod health;
pub mod listener;
pub mod memory;
pub mod process;
pub mod seldom;
pub mod shutdown;
pub mod waiting;
