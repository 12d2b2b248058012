//! What every service does about its connections, and about its own end.
//!
//! - [`arguments`]: flags and environment
//! - [`process`]: telemetry around a service, and the exit code
//! - [`listener`]: accepts connections, whatever happens
//! - [`grpc`]: tonic's server, with bounds on what a connection may take
//! - [`health`]: the gRPC health check, asked
//! - `socket`: a connection with TLS or without; [`tls`]: PEM files, read; `own`: a probe of a server with TLS
//! - [`waiting`]: which connection goes when there are too many
//! - [`seldom`]: one line a minute
//! - [`shutdown`]: from the signal to exit, by one deadline

pub mod arguments;
pub mod grpc;
pub mod health;
pub mod listener;
mod own;
pub mod process;
pub mod seldom;
pub mod shutdown;
mod socket;
pub mod tls;
pub mod waiting;
