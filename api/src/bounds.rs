//! Fixed bounds on the size and the time of requests. `docs/bounds.md` lists all bounds. The bounds that can
//! be configured are in [`config`](crate::config).

use std::time::Duration;

/// How long a client may take to send all headers of a request, from the moment when the connection was
/// opened or the previous answer was sent. This is also how long a connection may be idle.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// The largest number of bytes that are buffered for one connection, which is also the limit for headers. A
/// request with longer headers gets the status 431. (With hyper's own limit of 400 KiB, 10,000 connections
/// could take 4 GB. hyper also allows at most 100 headers.)
pub const MAX_BUFFER: usize = 32 * 1024;

/// The largest body of one request, in bytes.
pub const MAX_BODY: usize = 1024 * 1024;

/// How long the service goes on reading and dropping a body that is too large, after it has sent the answer.
pub const LINGER: Duration = Duration::from_secs(2);

/// The largest total size of the bodies of all requests, in bytes. It bounds how much memory thousands of
/// callers can take.
pub const MAX_BODIES: usize = 64 * 1024 * 1024;
