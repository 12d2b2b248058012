//! OTLP over gRPC. The services are written by hand, because generated services would decode a message before
//! its decoded size can be checked, and would respond INTERNAL to a malformed message.

use super::{Export, MAX_BYTES, Sink, decode, response};
use bytes::Buf;
use opentelemetry_proto::tonic::collector::{
    logs::v1::ExportLogsServiceRequest,
    metrics::v1::ExportMetricsServiceRequest,
    trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
};
use std::{
    convert::Infallible,
    future::{Ready, ready},
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::net::TcpListener;
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codec::{Codec, CompressionEncoding, DecodeBuf, Decoder},
    server::{Grpc, NamedService, UnaryService},
    transport::server::TcpIncoming,
};
use tonic_prost::{ProstCodec, ProstEncoder};

/// Serves OTLP/gRPC until the runtime stops.
pub async fn serve(listener: TcpListener, sink: impl Sink) {
    let server = tonic::transport::Server::builder()
        .add_service(Service(sink.clone(), PhantomData::<ExportTraceServiceRequest>))
        .add_service(Service(sink.clone(), PhantomData::<ExportMetricsServiceRequest>))
        .add_service(Service(sink, PhantomData::<ExportLogsServiceRequest>))
        // Without this setting, the end of a response would wait up to 40 ms, until the client has
        // acknowledged the beginning of the response.
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    // The server ends only with its runtime. Then nobody is left who could handle an error.
    drop(server.await);
}

/// The gRPC service of one signal.
#[derive(Clone)]
struct Service<S, E>(S, PhantomData<E>);

impl<S, E: Export> NamedService for Service<S, E> {
    const NAME: &'static str = E::SERVICE;
}

impl<S: Sink, E: Export> UnaryService<E> for Service<S, E> {
    type Response = ExportTraceServiceResponse;
    type Future = Ready<Result<Response<ExportTraceServiceResponse>, Status>>;

    fn call(&mut self, request: Request<E>) -> Self::Future {
        let (metadata, _, request) = request.into_parts();
        let rejected = request.give(&self.0, metadata.into_headers());
        ready(rejected.map(|rejected| Response::new(response(&rejected))))
    }
}

impl<S: Sink, E: Export + Clone> tower::Service<http::Request<Body>> for Service<S, E> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path().rsplit('/').next() != Some("Export") {
            return Box::pin(ready(Ok(Status::unimplemented("the only method is Export").into_http())));
        }
        let service = self.clone();
        Box::pin(async move {
            let mut grpc = Grpc::new(BoundedCodec(PhantomData))
                .accept_compressed(CompressionEncoding::Gzip)
                .accept_compressed(CompressionEncoding::Zstd)
                .max_decoding_message_size(MAX_BYTES);
            Ok(undecodable_is_invalid(grpc.unary(service, request).await))
        })
    }
}

/// Turns INTERNAL into INVALID_ARGUMENT. tonic responds INTERNAL to a message that is cut off or can't be
/// decompressed, but OTLP calls such a message the client's mistake. Nothing else here responds INTERNAL.
fn undecodable_is_invalid(mut response: http::Response<Body>) -> http::Response<Body> {
    if let Some(status) = response.headers_mut().get_mut(Status::GRPC_STATUS)
        && Code::from_bytes(status.as_bytes()) == Code::Internal
    {
        *status = i32::from(Code::InvalidArgument).into();
    }
    response
}

/// A protobuf codec that limits the memory of a decoded message.
struct BoundedCodec<E>(PhantomData<E>);

impl<E: Export> Codec for BoundedCodec<E> {
    type Encode = ExportTraceServiceResponse;
    type Decode = E;
    type Encoder = ProstEncoder<ExportTraceServiceResponse>;
    type Decoder = Self;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<ExportTraceServiceResponse, E>::default().encoder()
    }

    fn decoder(&mut self) -> Self {
        Self(PhantomData)
    }
}

impl<E: Export> Decoder for BoundedCodec<E> {
    type Item = E;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<E>, Status> {
        let message = message.copy_to_bytes(message.remaining());
        decode::protobuf(&message).map(Some)
    }
}
