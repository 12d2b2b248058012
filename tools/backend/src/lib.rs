//! The embedded trace backend. It receives OTLP, keeps the latest traces and their log records in memory, and
//! answers Jaeger's queries. It counts the data points of metrics, and drops them.
//!
//! - [`ingest`]: OTLP over gRPC and HTTP, for the backend and for the receiver
//! - `store`: the bounded store of `spans`; `size` calculates how much memory spans take
//! - `query`: the router of all modules below
//! - `jaeger`: Jaeger's query API; `tags` translates OTLP's attributes
//! - `logs`: the log records of traces, for the page
//! - `recent`: the latest traces, and events when a trace changes, for the page
//! - `search`, `parameters`, `ids`: the parts of a query
//! - `page`: this project's page; `jaeger_ui`: Jaeger's page, if the feature of that name is on
//!
//! The other modules are for tests:
//!
//! - [`receiver`]: an OTLP receiver that keeps everything it receives
//! - [`trace`], [`metric`], [`log`]: spans, data points and log records as they were received
//! - [`conventions`]: checks what was received against the semantic conventions

pub mod conventions;
mod ids;
pub mod ingest;
mod jaeger;
#[cfg(feature = "jaeger-ui")]
mod jaeger_ui;
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

use anyhow::{Context, Result, ensure};
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

/// A running backend. When it is dropped, it stops and its connections end.
pub struct Backend {
    addresses: Addresses,
    store: Arc<Store>,
    _runtime: Background,
}

/// The addresses at which a backend listens.
#[derive(Debug, Clone, Copy, Args)]
pub struct Addresses {
    /// The address at which to receive OTLP/gRPC.
    #[arg(long, default_value = "127.0.0.1:4317")]
    pub otlp_grpc: SocketAddr,
    /// The address at which to receive OTLP/HTTP.
    #[arg(long, default_value = "127.0.0.1:4318")]
    pub otlp_http: SocketAddr,
    /// The address at which to answer queries and serve the page.
    #[arg(long, default_value = "127.0.0.1:16686")]
    pub query: SocketAddr,
}

impl Addresses {
    /// A free port of 127.0.0.1 for each purpose, chosen when the backend starts.
    pub const FREE: Self = {
        let free = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
        Self { otlp_grpc: free, otlp_http: free, query: free }
    };
}

impl Backend {
    /// Listens on free ports of 127.0.0.1.
    ///
    /// # Errors
    /// If no port is free.
    pub async fn start() -> Result<Self> {
        Self::start_at(Addresses::FREE).await
    }

    /// Listens at these addresses.
    ///
    /// # Errors
    /// If an address is in use. The error names the address.
    pub async fn start_at(addresses: Addresses) -> Result<Self> {
        Self::start_with(addresses, Limits::default()).await
    }

    /// Listens at these addresses, and stores as much as these limits allow.
    ///
    /// # Errors
    /// If an address is in use. The error names the address.
    pub async fn start_with(addresses: Addresses, limits: Limits) -> Result<Self> {
        Self::serve(addresses, limits, page::page())
    }

    /// Listens at these addresses, with a page that has controls. The page asks `GET /controls` for its
    /// buttons, and sends `POST /controls/NAME` when a button is pressed. The router `controls` has these two
    /// routes.
    ///
    /// # Errors
    /// If an address is in use, or if other machines could reach the page. The error names the address.
    pub async fn start_with_controls(addresses: Addresses, controls: Router) -> Result<Self> {
        let query = addresses.query;
        ensure!(
            query.ip().is_loopback(),
            "other machines can reach {query}, so its page must not have controls"
        );
        Self::serve(addresses, Limits::default(), page::page_with_controls(controls))
    }

    fn serve(addresses: Addresses, limits: Limits, page: Router) -> Result<Self> {
        let store = Arc::new(Store::new(limits));
        #[cfg(feature = "jaeger-ui")]
        let page = page.merge(jaeger_ui::routes(Arc::clone(&store)));
        // Queries run on blocking threads. If more than two queries ran at a time, each query would take
        // longer, and all queries together would use more memory.
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

    /// Returns the addresses that the backend listens on.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Returns the spans of a trace, ordered by their start. If the id is invalid or unknown, there are no
    /// spans.
    pub fn trace(&self, trace_id: &str) -> Vec<Span> {
        let trace = trace_id.parse().ok().and_then(|id| self.store.trace(id));
        let Some(trace) = trace else {
            return Vec::new();
        };
        let spans = trace.decoded().into_iter();
        let spans = spans.map(|decoded| {
            let (resource, scope) = (&decoded.stored.resource, &decoded.stored.scope);
            Span::new(&decoded.span, &resource.resource, scope)
        });
        spans.collect()
    }

    /// Returns a channel that yields the ids of the traces that get spans from now on. A slow receiver misses
    /// some ids.
    pub fn changes(&self) -> broadcast::Receiver<String> {
        self.store.changes()
    }

    /// Returns how much is stored, and what happened to everything else that was received.
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
