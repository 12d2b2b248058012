//! The names under which login messages travel on the broker.

/// The direct exchange that `api` publishes to.
pub const EXCHANGE: &str = "usercenter";

/// The routing key of a login.
pub const ROUTING_KEY: &str = "user.login";

/// The durable queue that `mq` consumes. Dead letters are in another queue, whose name has `.dead` at the end.
pub const QUEUE: &str = "mq.user_login";

/// The default of `MQ_RETRY_DELAYS`: how long a failed message waits before each further attempt. The delays
/// fit a hitch, a restart, and an outage that somebody is working on.
pub const DEFAULT_RETRY_DELAYS: &str = "1s,5s,30s,2m";
