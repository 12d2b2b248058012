//! Fixed bounds on the resources that producers and callers of mq can take. `docs/bounds.md` lists all
//! bounds. The bounds that can be configured are in [`config`](crate::config).

use std::time::Duration;

/// The longest message body that is kept whole, in bytes. Even with 8 KiB of baggage and the longest
/// `tracestate`, a login takes less than a quarter of that. lapin allocates up to twice a body's length, so
/// all bodies together take at most twice the prefetch times this length.
pub const LONGEST_BODY: usize = 256 * 1024;

/// How many times in a row a message may be redelivered because its previous delivery had no result. A
/// delivery has no result if the connection is cut or the process dies. Without this bound, a message that
/// kills the process would do so for ever.
pub const MAX_REDELIVERIES: i64 = 20;

/// The most connections for health checks.
pub const MAX_CONNECTIONS: usize = 10_000;

/// The age of a connection for health checks at which the client is asked to reconnect.
pub const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);
