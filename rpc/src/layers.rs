//! Every layer of the gRPC service.

use http::Response;
use proto::usercenter::v1::FILE_DESCRIPTOR_SET;
use resilience::{CatchPanicLayer, DeadlineLayer, Rejection, ShedLayer};
use std::time::Duration;
use telemetry::grpc::GrpcServerLayer;
use tonic::{Status, body::Body, transport::Server};
use tower::layer::util::{Identity, Stack};

/// What the layers hold to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many calls may be in flight.
    pub max_in_flight: u32,
    /// How long one may take.
    pub deadline: Duration,
}

/// A server in the layers of [`in_layers`], the innermost first.
pub type Layered = Server<
    Stack<
        DeadlineLayer<Answer>,
        Stack<ShedLayer<Answer>, Stack<CatchPanicLayer<Answer>, Stack<GrpcServerLayer, Identity>>>,
    >,
>;

/// Makes the answer to a call that a layer refuses.
pub type Answer = fn(Rejection) -> Response<Body>;

/// Puts the layers around the services that are added after it: a call passes them from the first to the last,
/// its answer from the last to the first. Health and reflection are in them, too, but neither traced nor refused.
pub fn in_layers(server: Server, limits: Limits) -> Layered {
    let answer: Answer = rejected;
    server
        .layer(GrpcServerLayer::new(FILE_DESCRIPTOR_SET)) // the server span: all that follows is in it
        .layer(CatchPanicLayer::new(answer)) // a panic is answered like any failure
        .layer(ShedLayer::new(limits.max_in_flight, answer)) // no more at a time than it can do
        .layer(DeadlineLayer::grpc(limits.deadline, answer)) // an answer in time, or none
}

fn rejected(rejection: Rejection) -> Response<Body> {
    let status = match rejection {
        // Another instance may have time, or this one in a moment: UNAVAILABLE is what clients retry.
        Rejection::Overloaded => Status::unavailable("too many calls at the moment"),
        Rejection::DeadlineExceeded => Status::deadline_exceeded("the deadline has passed"),
        Rejection::Panic => Status::internal("something went wrong here"),
    };
    status.into_http()
}
