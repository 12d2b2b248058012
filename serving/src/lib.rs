//! What every service does about its connections, and about its own end.
//!
//! - [`arguments`]: flags and environment
//! - [`listener`]: accepts connections, whatever happens
//! - [`grpc`]: tonic's server, with bounds on what a connection may take
//! - [`waiting`]: which connection goes when there are too many
//! - [`shutdown`]: from the signal to exit, by one deadline

pub mod arguments;
pub mod grpc;
pub mod listener;
pub mod shutdown;
pub mod waiting;
