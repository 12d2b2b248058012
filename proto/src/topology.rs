//! The names under which login messages travel on the broker.

/// The direct exchange that other producers publish to, and that other consumers bind their queues to. The
/// broker routes the logins of other producers to [`QUEUE`].
pub const EXCHANGE: &str = "usercenter";

/// The routing key of a login that another producer publishes.
pub const ROUTING_KEY: &str = "user.login";

/// The routing key of the copies that `api` publishes for other consumers. It is not [`ROUTING_KEY`], because
/// copies with that key would also go to [`QUEUE`].
pub const COPY_ROUTING_KEY: &str = "user.login.copy";

/// The durable queue that `api` publishes to, through the default exchange, and that `mq` consumes. Dead
/// letters are in another queue, whose name has `.dead` at the end.
pub const QUEUE: &str = "mq.user_login";

/// The default of `MQ_RETRY_DELAYS`: how long a failed message waits before each further attempt. The delays
/// cover a short fault, a restart, and an outage that somebody is working on.
pub const DEFAULT_RETRY_DELAYS: &str = "1s,5s,30s,2m";
