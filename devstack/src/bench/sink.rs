//! A collector that counts spans and forgets them: it looks no deeper into a request than it must, so
//! that it takes little of the machine that it shares with what is measured.

use anyhow::Result;
use bytes::Bytes;
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

/// Stops with its owner.
pub struct Sink {
    /// Where it listens for OTLP/gRPC.
    pub address: SocketAddr,
    spans: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Sink {
    /// Listens on a free port.
    ///
    /// # Errors
    /// If there is none.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let spans = Arc::default();
        let server = tonic::transport::Server::builder().add_service(Counter { spans: Arc::clone(&spans) });
        let task =
            tokio::spawn(async { drop(server.serve_with_incoming(TcpIncoming::from(listener)).await) });
        Ok(Self { address, spans, task })
    }

    /// Spans received so far.
    pub fn spans(&self) -> u64 {
        self.spans.load(Relaxed)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `ExportTraceServiceRequest`, down to the spans and no further: they stay bytes.
#[derive(Clone, PartialEq, Message)]
struct Spans {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(bytes = "bytes", repeated, tag = "2")]
    spans: Vec<Bytes>,
}

#[derive(Clone)]
struct Counter {
    spans: Arc<AtomicU64>,
}

impl NamedService for Counter {
    const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
}

impl UnaryService<Spans> for Counter {
    type Response = ();
    type Future = std::future::Ready<Result<Response<()>, Status>>;

    fn call(&mut self, request: Request<Spans>) -> Self::Future {
        let scopes = request.get_ref().resource_spans.iter().flat_map(|resource| &resource.scope_spans);
        self.spans.fetch_add(scopes.map(|scope| scope.spans.len() as u64).sum(), Relaxed);
        std::future::ready(Ok(Response::new(())))
    }
}

impl tower::Service<http::Request<Body>> for Counter {
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
