//! The names under which login messages travel on the broker.

/// The direct exchange that other producers publish to, and that other consumers bind their queues to. The
/// broker routes the logins of other producers to [`QUEUE`].
pub const EXCHANGE: &str = "usercenter";

/// The routing key of a login that another producer publishes.
pub const ROUTING_KEY: &str = "user.login";

/// The routing key of the copies that `api` publishes for other consumers. It is not [`ROUTING_KEY`], because
/// copies with that key would also go to [`QUEUE`].
pub const COPY_ROUTING_KEY: &str = "user.login.copy";

/// The durable queue that `api` publishes to, through the default exchange, and that `mq` consumes. Dead letters
/// are in another queue, whose name has `.dead` at the end.
pub const QUEUE: &str = "mq.user_login";

/// The default of `MQ_RETRY_DELAYS`: how long a failed message waits before each further attempt. The delays
/// cover a short fault, a restart, and an outage that somebody is working on.
pub const DEFAULT_RETRY_DELAYS: &str = "1s,5s,30s,2m";

/// The longest prefix of these names, in bytes. A name in AMQP has at most 255 bytes (0-9-1, "short
/// strings"), and the longest name is that of a retry queue, which ends with `.retry.` and a delay of up to 40
/// bytes.
pub const MAX_PREFIX: usize = 255 - QUEUE.len() - ".retry.".len() - 40;

/// Reads a prefix of these names (`AMQP_PREFIX`).
///
/// # Errors
/// If the prefix is too long.
pub fn prefix(prefix: &str) -> Result<String, String> {
    match prefix.len() {
        0..=MAX_PREFIX => Ok(prefix.to_owned()),
        length => Err(format!("expected at most {MAX_PREFIX} bytes, found {length}")),
    }
}
