//! The gRPC client of usercenter, with every layer around it.

use proto::usercenter::v1::usercenter_client::UsercenterClient;
use resilience::{
    CallDeadline, CallDeadlineLayer, Circuit, CircuitBreaker, CircuitBreakerLayer, Retry, RetryLayer, Unary,
    UnaryLayer,
};
use std::time::Duration;
use telemetry::grpc::{GrpcClient, GrpcClientLayer};
use tonic::transport::{Channel, Uri};
use tonic_health::pb::health_client::HealthClient;
use tower::ServiceBuilder;

/// The client.
pub type Usercenter = UsercenterClient<Layered<Channel>>;

/// A channel `C` in the layers of [`in_layers`], the outermost first.
pub type Layered<C> = GrpcClient<CallDeadline<Retry<CircuitBreaker<Unary<C>>>>>;

/// What the layers hold to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long a call may take, with its retries.
    pub timeout: Duration,
    /// How often it is tried at most.
    pub attempts: u32,
    /// How long an open circuit stays open.
    pub circuit_pause: Duration,
}

/// Methods whose call may be repeated.
const IDEMPOTENT: &[&str] = &["/usercenter.v1.Usercenter/GetUserByMobile"];

/// Asks usercenter for its health, on the same connection: not traced, not counted by the circuit.
pub type Health = HealthClient<Retry<Unary<Channel>>>;

/// Its client.
pub fn health(channel: Channel) -> Health {
    let once = RetryLayer::new(&[], 1);
    HealthClient::new(ServiceBuilder::new().layer(once).layer(UnaryLayer).service(channel))
}

/// Puts the layers around a channel to `endpoint`: a call passes them from the first to the last, its outcome
/// from the last to the first.
pub fn in_layers<C>(endpoint: &Uri, limits: Limits, channel: C) -> Layered<C> {
    let circuit = Circuit::new("usercenter", limits.circuit_pause, limits.timeout);
    ServiceBuilder::new()
        .layer(GrpcClientLayer::new(endpoint)) // the client span: one, around all attempts and refusals
        .layer(CallDeadlineLayer::new(limits.timeout)) // the whole call in time, its retries too
        .layer(RetryLayer::new(IDEMPOTENT, limits.attempts)) // what is safe to repeat, again
        .layer(CircuitBreakerLayer::new(circuit)) // each attempt counts; none while too many fail
        .layer(UnaryLayer) // one message there, one outcome back
        .service(channel)
}
