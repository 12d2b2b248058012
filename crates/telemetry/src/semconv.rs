//! Attribute names of OpenTelemetry's semantic conventions 1.45, and a few of our own.
//!
//! The published Rust constants are at version 1.42, and names have changed since (`rpc.status_code` was
//! `rpc.response.status_code`). Each name is spelled here once, so a move to newer conventions starts here.
#![allow(missing_docs, reason = "the conventions define them")]

/// The schema to which the names in this file belong.
pub const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.45.0";

pub const CLIENT_ADDRESS: &str = "client.address";
pub const CLIENT_PORT: &str = "client.port";
pub const ERROR_TYPE: &str = "error.type";
pub const EXCEPTION_MESSAGE: &str = "exception.message";
pub const NETWORK_PEER_ADDRESS: &str = "network.peer.address";
pub const NETWORK_PEER_PORT: &str = "network.peer.port";
pub const NETWORK_PROTOCOL_VERSION: &str = "network.protocol.version";
pub const SERVER_ADDRESS: &str = "server.address";
pub const SERVER_PORT: &str = "server.port";

pub const HTTP_REQUEST_METHOD: &str = "http.request.method";
pub const HTTP_REQUEST_METHOD_ORIGINAL: &str = "http.request.method_original";
pub const HTTP_RESPONSE_STATUS_CODE: &str = "http.response.status_code";
pub const HTTP_ROUTE: &str = "http.route";
pub const URL_PATH: &str = "url.path";
pub const URL_SCHEME: &str = "url.scheme";
pub const USER_AGENT_ORIGINAL: &str = "user_agent.original";

pub const RPC_METHOD: &str = "rpc.method";
pub const RPC_METHOD_ORIGINAL: &str = "rpc.method_original";
pub const RPC_STATUS_CODE: &str = "rpc.status_code";
pub const RPC_SYSTEM_NAME: &str = "rpc.system.name";

pub const MESSAGING_CLIENT_ID: &str = "messaging.client.id";
pub const MESSAGING_CONVERSATION_ID: &str = "messaging.message.conversation_id";
pub const MESSAGING_DESTINATION_NAME: &str = "messaging.destination.name";
pub const MESSAGING_MESSAGE_ID: &str = "messaging.message.id";
pub const MESSAGING_OPERATION_NAME: &str = "messaging.operation.name";
pub const MESSAGING_OPERATION_TYPE: &str = "messaging.operation.type";
pub const MESSAGING_RABBITMQ_DELIVERY_TAG: &str = "messaging.rabbitmq.message.delivery_tag";
pub const MESSAGING_RABBITMQ_ROUTING_KEY: &str = "messaging.rabbitmq.destination.routing_key";
pub const MESSAGING_SYSTEM: &str = "messaging.system";

/// Our attribute: where a consumer found the trace context, as `headers`, `body` or `none`. With `none`, the
/// consumer's span starts a new trace.
pub const TRACE_CONTEXT_SOURCE: &str = "throughline.trace_context.source";

/// Our attribute: how a message was published, as `confirmed` by the broker, or as `spooled` on disk until
/// the broker confirms it.
pub const PUBLISH_OUTCOME: &str = "throughline.publish.outcome";
/// Our attribute: why a message was spooled, on the event `spooled`.
pub const SPOOL_REASON: &str = "throughline.spool.reason";
/// Our attribute: the number of the call's next attempt, counted from 1, on the event `retry`.
pub const RETRY_ATTEMPT: &str = "throughline.retry.attempt";
/// Our attribute: the pause in milliseconds before the next attempt, on the event `retry`.
pub const RETRY_PAUSE: &str = "throughline.retry.pause_ms";
/// Our attribute: how long calls are still blocked, in milliseconds, on the event `circuit_open`.
pub const CIRCUIT_RETRY_AFTER: &str = "throughline.circuit.retry_after_ms";
/// Our attribute: the number of the attempt to process a message, counted from 1.
pub const MESSAGE_ATTEMPT: &str = "throughline.message.attempt";
/// Our attribute: true if the message's longest headers are missing because they did not fit into a frame.
pub const MESSAGE_HEADERS_LEFT_OUT: &str = "throughline.message.headers_left_out";
/// Our attribute: the time since the message was last published, in milliseconds.
pub const MESSAGE_TIME_IN_QUEUE: &str = "throughline.message.time_in_queue_ms";
/// Our attribute: how long the login was in the spool before its message was first published, in
/// milliseconds.
pub const MESSAGE_TIME_IN_SPOOL: &str = "throughline.message.time_in_spool_ms";
/// Our attribute: how many deliveries, including this one, the consumer took together to share a commit.
pub const CHUNK_SIZE: &str = "throughline.chunk.size";
/// Our attribute: how long deliveries gathered before the consumer took them, in milliseconds. This message
/// waited for at most this long.
pub const CHUNK_PAUSE: &str = "throughline.chunk.pause_ms";
/// Our attribute: what happened to a message, as `applied`, `duplicate`, `retry` or `dead_letter`. If the
/// attribute is missing, the message was left to the broker, which will deliver it again.
pub const MESSAGE_OUTCOME: &str = "throughline.message.outcome";
/// Our attribute: the time until the next attempt in milliseconds, if the outcome is `retry`.
pub const MESSAGE_RETRY_DELAY: &str = "throughline.message.retry_delay_ms";

/// `error.type` of a request whose caller went away, or whose handler was dropped for another reason.
pub const CANCELLED: &str = "cancelled";

/// `error.type` of a handler that panicked.
pub const PANIC: &str = "panic";

/// The value that stands for any HTTP method, RPC method or error type outside a known set.
pub const OTHER: &str = "_OTHER";
