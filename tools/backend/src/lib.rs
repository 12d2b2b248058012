//! The embedded trace backend: takes OTLP, keeps the latest traces in memory with their logs, answers as
//! Jaeger does. Metrics are taken, counted and forgotten.
//!
//! - [`ingest`]: OTLP over gRPC and HTTP; serves the receiver as well
//! - `store`: the bounded store of `spans`; `size` says what they take
//! - `query`: the router of all below
//! - `jaeger`, `jaeger_v3`: Jaeger's two query APIs; `tags` translates OTLP's attributes
//! - `logs`: the log records of traces, for the page
//! - `recent`: what the page needs beside them: the latest traces, and word when one changes
//! - `search`, `parameters`, `ids`: what a query asks for
//! - `page`: what a browser sees; `jaeger_ui`: what it sees with the feature of that name
//!
//! Beside it stands what tests look at:
//!
//! - [`receiver`]: an OTLP receiver that keeps everything it gets
//! - [`trace`], [`metric`], [`log`]: spans, data points and log records as they were received

mod ids;
pub mod ingest;
mod jaeger;
#[cfg(feature = "jaeger-ui")]
mod jaeger_ui;
mod jaeger_v3;
pub mod log;
mod logs;
pub mod metric;
mod page;
mod parameters;
mod query;
pub mod receiver;
mod recent;
mod search;
mod size;
mod spans;
mod store;
mod tags;
pub mod trace;

pub use logs::LogStatistics;
pub use spans::Rejected;
pub use store::{Limits, Statistics};

use anyhow::{Context, Result};
use axum::Router;
use clap::Args;
use http::HeaderMap;
use ingest::Sink;
use loopback::background::Background;
use opentelemetry_proto::tonic::collector::{
    logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
    trace::v1::ExportTraceServiceRequest,
};
use std::{net::SocketAddr, sync::Arc};
use store::Store;
use tokio::sync::broadcast;
use tonic::Status;
use trace::Span;

/// Stops when dropped, and its connections end.
pub struct Backend {
    addresses: Addresses,
    store: Arc<Store>,
    _runtime: Background,
}

/// Where a backend listens.
#[derive(Debug, Clone, Copy, Args)]
pub struct Addresses {
    /// Where to take OTLP/gRPC.
    #[arg(long, default_value = "127.0.0.1:4317")]
    pub otlp_grpc: SocketAddr,
    /// Where to take OTLP/HTTP.
    #[arg(long, default_value = "127.0.0.1:4318")]
    pub otlp_http: SocketAddr,
    /// Where to answer queries, and show the page.
    #[arg(long, default_value = "127.0.0.1:16686")]
    pub query: SocketAddr,
}

impl Addresses {
    /// Free ports on 127.0.0.1, chosen when the backend starts.
    pub const FREE: Self = {
        let free = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
        Self { otlp_grpc: free, otlp_http: free, query: free }
    };
}

impl Backend {
    /// Listens on free ports of 127.0.0.1.
    ///
    /// # Errors
    /// If there are none.
    pub async fn start() -> Result<Self> {
        Self::start_at(Addresses::FREE).await
    }

    /// Listens at these addresses.
    ///
    /// # Errors
    /// If one of them is in use: then it says which.
    pub async fn start_at(addresses: Addresses) -> Result<Self> {
        Self::start_with(addresses, Limits::default()).await
    }

    /// Listens at these addresses, and keeps as much as these limits allow.
    ///
    /// # Errors
    /// If one of the addresses is in use: then it says which.
    pub async fn start_with(addresses: Addresses, limits: Limits) -> Result<Self> {
        Self::serve(addresses, limits, page::page())
    }

    /// Listens at these addresses, with Jaeger's own page instead of this project's.
    ///
    /// # Errors
    /// If one of the addresses is in use: then it says which.
    #[cfg(feature = "jaeger-ui")]
    pub async fn start_with_jaeger_ui(addresses: Addresses) -> Result<Self> {
        Self::serve(addresses, Limits::default(), jaeger_ui::page())
    }

    fn serve(addresses: Addresses, limits: Limits, page: Router) -> Result<Self> {
        let store = Arc::new(Store::new(limits));
        // Queries block. More than two at a time would take longer each, and more memory.
        let runtime = Background::start(2, 2)?;
        let listen = |purpose: &str, address: SocketAddr| {
            runtime.listen(address).with_context(|| format!("{address}, for {purpose}"))
        };
        let otlp_grpc = listen("OTLP/gRPC", addresses.otlp_grpc)?;
        let otlp_http = listen("OTLP/HTTP", addresses.otlp_http)?;
        let query = listen("queries", addresses.query)?;
        let addresses = Addresses {
            otlp_grpc: otlp_grpc.local_addr()?,
            otlp_http: otlp_http.local_addr()?,
            query: query.local_addr()?,
        };
        runtime.spawn(ingest::serve_grpc(otlp_grpc, Arc::clone(&store)));
        runtime.serve_http(otlp_http, ingest::http_routes(Arc::clone(&store)));
        runtime.serve_http(query, query::router(Arc::clone(&store), page));
        Ok(Self { addresses, store, _runtime: runtime })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The spans of a trace, by their start; none if the id is not one.
    pub fn trace(&self, trace_id: &str) -> Vec<Span> {
        let trace = trace_id.parse().ok().and_then(|id| self.store.trace(id));
        let Some(trace) = trace else {
            return Vec::new();
        };
        let spans = trace.decoded().into_iter();
        let spans = spans.map(|decoded| {
            let (resource, scope) = (&decoded.stored.resource, &decoded.stored.scope);
            Span::new(&decoded.span, &resource.resource, &scope.scope)
        });
        spans.collect()
    }

    /// Ids of traces that get spans from now on. A receiver that does not keep up misses some.
    pub fn changes(&self) -> broadcast::Receiver<String> {
        self.store.changes()
    }

    /// What is stored, and what became of the rest.
    pub fn statistics(&self) -> Statistics {
        self.store.statistics()
    }
}

impl Sink for Arc<Store> {
    fn traces(&self, _: HeaderMap, request: ExportTraceServiceRequest) -> Result<Rejected, Status> {
        Ok(self.insert(request))
    }

    fn metrics(&self, _: HeaderMap, request: ExportMetricsServiceRequest) -> Result<Rejected, Status> {
        self.count_data_points(request.resource_metrics.iter().map(metric::count).sum());
        Ok(Rejected::default())
    }

    fn logs(&self, _: HeaderMap, request: ExportLogsServiceRequest) -> Result<Rejected, Status> {
        Ok(self.insert_logs(request))
    }
}
