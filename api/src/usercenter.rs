//! The gRPC client of usercenter, with every layer around it.

use proto::usercenter::v1::usercenter_client::UsercenterClient;
use resilience::{
    CallDeadline, CallDeadlineLayer, Circuit, CircuitBreaker, CircuitBreakerLayer, Retry, RetryLayer, Unary,
    UnaryLayer,
};
use serving::seldom::Seldom;
use std::{
    error::Error,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use telemetry::grpc::{GrpcClient, GrpcClientLayer};
use tonic::{
    body::Body,
    codegen::http::{Request, Response},
    transport::{self, Channel, Uri},
};
use tonic_health::pb::health_client::HealthClient;
use tower::{Service, ServiceBuilder};

/// The client of usercenter, in its layers.
pub type Usercenter = UsercenterClient<Layered<Reported>>;

/// A channel `C` in the layers of [`in_layers`], the outermost first.
pub type Layered<C> = GrpcClient<CallDeadline<Retry<CircuitBreaker<Unary<C>>>>>;

/// The limits that the layers enforce.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
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
pub type Health = HealthClient<Retry<Unary<Reported>>>;

/// Makes the client that asks for usercenter's health.
pub fn health(channel: Reported) -> Health {
    let once = RetryLayer::new(&[], 1);
    HealthClient::new(ServiceBuilder::new().layer(once).layer(UnaryLayer).service(channel))
}

/// Puts the layers around a channel to `endpoint`. A call passes them from the first to the last, and its
/// outcome from the last to the first.
pub fn in_layers<C>(endpoint: &Uri, limits: Limits, channel: C) -> Layered<C> {
    let circuit = Circuit::new("usercenter", limits.circuit_pause, limits.timeout);
    ServiceBuilder::new()
        .layer(GrpcClientLayer::new(endpoint)) // one client span, around all attempts and refusals
        .layer(CallDeadlineLayer::new(limits.timeout)) // a deadline for the whole call, retries included
        .layer(RetryLayer::new(IDEMPOTENT, limits.attempts)) // repeats calls that are safe to repeat
        .layer(CircuitBreakerLayer::new(circuit)) // counts attempts, and stops them while too many fail
        .layer(UnaryLayer) // one message out, one outcome back
        .service(channel)
}

/// A channel that logs why there is no connection, at most once a minute, because in an outage every call
/// fails. The layers around it know only the status that the failure stands for, but not its cause.
#[derive(Clone)]
pub struct Reported {
    channel: Channel,
    endpoint: Uri,
    warnings: Seldom,
}

impl Reported {
    /// Wraps a channel to `endpoint`.
    pub fn new(endpoint: &Uri, channel: Channel) -> Self {
        Self { channel, endpoint: endpoint.clone(), warnings: Seldom::default() }
    }

    fn report(&self, error: &transport::Error) {
        if self.warnings.is_due() {
            let causes = chain(error);
            tracing::warn!(endpoint = %self.endpoint, "can't reach usercenter: {causes}");
        }
    }
}

impl Service<Request<Body>> for Reported {
    type Response = Response<Body>;
    type Error = transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, transport::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), transport::Error>> {
        self.channel.poll_ready(cx).map_err(|error| {
            self.report(&error);
            error
        })
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.channel.call(request);
        let this = self.clone();
        Box::pin(async move { answer.await.inspect_err(|error| this.report(error)) })
    }
}

/// Joins an error and its causes to one text. Of a TLS failure, only the last cause tells the reason.
fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
