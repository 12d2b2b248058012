//! AMQP headers of the login message, besides those of the trace context.

/// When the message was given to the broker, this time: milliseconds since 1970 (long-long-int). Set by
/// every publisher of it, so that the consumer can tell how long it was in the queue; AMQP's own property
/// `timestamp` counts whole seconds.
pub const PUBLISHED_AT: &str = "x-published-at-ms";

/// Which attempt at processing this delivery is: 1 if it is not there (long-int). We count ourselves,
/// because what the broker counts in `x-death` differs between its versions.
pub const ATTEMPT: &str = "x-attempt";

/// Why a dead letter is one: a short name, as in `error.type` of its last span.
pub const DEAD_LETTER_REASON: &str = "x-dead-letter-reason";

/// How many attempts a dead letter has had (long-int).
pub const DEAD_LETTER_ATTEMPTS: &str = "x-dead-letter-attempts";

/// Says (boolean) that the headers which a message had are missing, because with ours they would not have
/// fitted into a frame.
pub const HEADERS_LEFT_OUT: &str = "x-headers-left-out";
