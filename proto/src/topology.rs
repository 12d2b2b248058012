//! The names under which login messages travel on the broker.

/// Direct exchange that `api` publishes to.
pub const EXCHANGE: &str = "usercenter";

/// Routing key of a login.
pub const ROUTING_KEY: &str = "user.login";

/// Durable queue that `mq` consumes. Dead letters are in another one with `.dead` behind this name.
pub const QUEUE: &str = "mq.user_login";

/// After how long a message that failed is tried again, as `MQ_RETRY_DELAYS` lists it: a hitch, a restart, an
/// outage that somebody is at work on.
pub const DEFAULT_RETRY_DELAYS: &str = "1s,5s,30s,2m";
