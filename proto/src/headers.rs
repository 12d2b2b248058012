//! AMQP headers of the login message, besides those of the trace context.

/// When the message was last published, in milliseconds since 1970 (long-long-int). Every publisher of the
/// message sets this header, so that the consumer can tell how long the message was in the queue. AMQP's own
/// property `timestamp` counts whole seconds.
pub const PUBLISHED_AT: &str = "x-published-at-ms";

/// How long the login was in api's spool before it was published, in milliseconds (long-long-int). The header
/// is missing if the login was not in the spool.
pub const TIME_IN_SPOOL: &str = "x-time-in-spool-ms";

/// The number of this attempt to process the message (long-int). It is 1 if the header is missing. mq counts
/// the attempts itself, because the broker's own count in `x-death` differs between versions of RabbitMQ.
pub const ATTEMPT: &str = "x-attempt";

/// Why a message became a dead letter: a short name, as in `error.type` of its last span.
pub const DEAD_LETTER_REASON: &str = "x-dead-letter-reason";

/// How many attempts a dead letter has had (long-int).
pub const DEAD_LETTER_ATTEMPTS: &str = "x-dead-letter-attempts";
