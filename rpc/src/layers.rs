//! Every layer of the gRPC service.

use crate::protocol::ProtocolLayer;
use http::Response;
use proto::usercenter::v1::FILE_DESCRIPTOR_SET;
use resilience::{CatchPanicLayer, DeadlineLayer, InFlight, Rejection, ShedLayer};
use std::time::Duration;
use telemetry::grpc::GrpcServerLayer;
use tonic::{Status, body::Body, transport::Server};
use tower::layer::util::{Identity, Stack};

/// The limits that the layers enforce.
#[derive(Debug, Clone)]
pub struct RequestLimits {
    /// The calls in flight, and the limit on their number.
    pub in_flight: InFlight,
    /// How long a call may take.
    pub deadline: Duration,
}

/// A server in the layers of [`in_layers`], the innermost first.
pub type Layered = Server<
    Stack<
        DeadlineLayer<Answer>,
        Stack<
            ShedLayer<Answer>,
            Stack<CatchPanicLayer<Answer>, Stack<ProtocolLayer, Stack<GrpcServerLayer, Identity>>>,
        >,
    >,
>;

/// Makes the answer to a call that a layer refuses.
pub type Answer = fn(Rejection) -> Response<Body>;

/// Puts the layers around the services that are added after this. A call passes them from the first to the
/// last, and its answer from the last to the first. Health and reflection are also inside the layers, but
/// their calls are neither traced nor refused.
pub fn in_layers(server: Server, limits: RequestLimits) -> Layered {
    let answer: Answer = rejected;
    server
        .layer(GrpcServerLayer::new(FILE_DESCRIPTOR_SET)) // the server span, around all that follows
        .layer(ProtocolLayer) // refuses requests that are not gRPC
        .layer(CatchPanicLayer::new(answer)) // a panic is answered like any failure
        .layer(ShedLayer::new(limits.in_flight, answer)) // a bound on calls in flight
        .layer(DeadlineLayer::grpc(limits.deadline, answer)) // an answer in time, or a refusal
}

fn rejected(rejection: Rejection) -> Response<Body> {
    let status = match rejection {
        // UNAVAILABLE makes clients retry. Another instance may have room, or this instance a moment later.
        Rejection::Overloaded => Status::unavailable("too many calls at the moment"),
        Rejection::DeadlineExceeded => Status::deadline_exceeded("the deadline has passed"),
        Rejection::Panic => Status::internal("something went wrong here"),
    };
    status.into_http()
}
