//! The gRPC client of usercenter, with every layer around its [`Connection`].

mod connection;

use proto::usercenter::v1::usercenter_client::UsercenterClient;
use resilience::{
    CallDeadline, CallDeadlineLayer, Circuit, CircuitBreaker, CircuitBreakerLayer, Retry, RetryLayer, Unary,
    UnaryLayer,
};
use std::time::Duration;
use telemetry::grpc::{GrpcClient, GrpcClientLayer};
use tonic::transport::Uri;
use tonic_health::pb::health_client::HealthClient;
use tower::ServiceBuilder;

pub use connection::Connection;

/// The client of usercenter, in its layers.
pub type Usercenter = UsercenterClient<Layered<Connection>>;

/// A channel `C` in the layers of [`in_layers`], the outermost first.
pub type Layered<C> = GrpcClient<CallDeadline<Retry<CircuitBreaker<Unary<C>>>>>;

/// The limits that the layers enforce.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// How long a call may take, including its retries.
    pub timeout: Duration,
    /// How many attempts a call may have.
    pub attempts: u32,
    /// How long an open circuit stays open.
    pub circuit_pause: Duration,
}

/// The methods whose calls may be repeated.
const IDEMPOTENT: &[&str] = &["/usercenter.v1.Usercenter/GetUserByMobile"];

/// The client that asks usercenter for its health, on the same connection. Its calls are not traced, and the
/// circuit does not count them.
pub type Health = HealthClient<Retry<Unary<Connection>>>;

/// Makes the client that asks for usercenter's health.
pub fn health(channel: Connection) -> Health {
    let once = RetryLayer::new(&[], 1);
    HealthClient::new(ServiceBuilder::new().layer(once).layer(UnaryLayer).service(channel))
}

/// Puts the layers around a channel to `endpoint`. A call passes them from the first to the last, and its
/// outcome from the last to the first.
pub fn in_layers<C>(endpoint: &Uri, limits: CallLimits, channel: C) -> Layered<C> {
    let circuit = Circuit::new("usercenter", limits.circuit_pause, limits.timeout);
    ServiceBuilder::new()
        .layer(GrpcClientLayer::new(endpoint)) // one client span, around all attempts and refusals
        .layer(CallDeadlineLayer::new(limits.timeout)) // a deadline for the whole call, retries included
        .layer(RetryLayer::new(IDEMPOTENT, limits.attempts)) // repeats calls that are safe to repeat
        .layer(CircuitBreakerLayer::new(circuit)) // counts attempts, and stops them while too many fail
        .layer(UnaryLayer) // one message out, one outcome back
        .service(channel)
}
