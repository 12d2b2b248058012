//! Bounds on what producers and callers of mq can take, whatever they send. `docs/bounds.md` lists all bounds;
//! those that can be configured are in [`config`](crate::config).

use std::time::Duration;

/// The longest body of a message that is taken whole, in bytes. With 8 KiB of baggage and the longest
/// `tracestate`, a login has less than a quarter of that. lapin allocates
/// up to twice a body's length, so bodies take at most twice the prefetch times this.
pub const LONGEST_BODY: usize = 256 * 1024;

/// How often in a row a message may be delivered again for lack of a result, because the connection was cut
/// or the process died. A message that kills the process must not do so for ever.
pub const MAX_REDELIVERIES: i64 = 20;

/// The most connections for health checks.
pub const MAX_CONNECTIONS: usize = 10_000;

/// The age of a connection for health checks at which the client is asked to reconnect.
pub const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);
