//! A collector that counts spans, metrics and log records, and discards them. It decodes as little of a
//! request as possible, because it shares the machine with the services.

use anyhow::Result;
use bytes::Bytes;
use opentelemetry_proto::tonic::collector::{
    logs::v1::logs_service_server, metrics::v1::metrics_service_server, trace::v1::trace_service_server,
};
use prost::Message;
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{
    Request, Response, Status,
    body::Body,
    server::{Grpc, NamedService, UnaryService},
    transport::server::TcpIncoming,
};
use tonic_prost::ProstCodec;

/// The services of OTLP/gRPC, one for each signal.
const SERVICES: [&str; 3] = [
    trace_service_server::SERVICE_NAME,
    metrics_service_server::SERVICE_NAME,
    logs_service_server::SERVICE_NAME,
];

/// The collector, which stops when it is dropped.
pub struct Sink {
    /// The address of the OTLP/gRPC listener.
    pub address: SocketAddr,
    counts: [Arc<AtomicU64>; SERVICES.len()],
    task: JoinHandle<()>,
}

impl Sink {
    /// Listens on a free port.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let counts = <[Arc<AtomicU64>; SERVICES.len()]>::default();
        let [spans, metrics, records] = counts.clone();
        let server = tonic::transport::Server::builder()
            .add_service(Counter::<0>(spans))
            .add_service(Counter::<1>(metrics))
            .add_service(Counter::<2>(records));
        let task =
            tokio::spawn(async { drop(server.serve_with_incoming(TcpIncoming::from(listener)).await) });
        Ok(Self { address, counts, task })
    }

    /// Returns the numbers of spans, metrics and log records received so far. In each request, a metric counts
    /// once, however many data points it has.
    pub fn received(&self) -> [u64; SERVICES.len()] {
        self.counts.each_ref().map(|count| count.load(Relaxed))
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A request of any signal. Its spans, metrics or log records are left undecoded. The messages that contain
/// these items have the same tags in all three signals.
#[derive(Clone, PartialEq, Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<Resource>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<Scope>,
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(bytes = "bytes", repeated, tag = "2")]
    items: Vec<Bytes>,
}

/// The OTLP/gRPC service of one signal, whose index in [`SERVICES`] is `SIGNAL`.
#[derive(Clone)]
struct Counter<const SIGNAL: usize>(Arc<AtomicU64>);

impl<const SIGNAL: usize> NamedService for Counter<SIGNAL> {
    const NAME: &'static str = SERVICES[SIGNAL];
}

impl<const SIGNAL: usize> UnaryService<Export> for Counter<SIGNAL> {
    type Response = ();
    type Future = std::future::Ready<Result<Response<()>, Status>>;

    fn call(&mut self, request: Request<Export>) -> Self::Future {
        let scopes = request.get_ref().resources.iter().flat_map(|resource| &resource.scopes);
        self.0.fetch_add(scopes.map(|scope| scope.items.len() as u64).sum(), Relaxed);
        std::future::ready(Ok(Response::new(())))
    }
}

impl<const SIGNAL: usize> tower::Service<http::Request<Body>> for Counter<SIGNAL> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let counter = self.clone();
        Box::pin(async move {
            let mut grpc = Grpc::new(ProstCodec::default()).max_decoding_message_size(64 * 1024 * 1024);
            Ok(grpc.unary(counter, request).await)
        })
    }
}
