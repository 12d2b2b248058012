//! Serves metrics to Prometheus, with `OTEL_METRICS_EXPORTER=prometheus`.
//!
//! The metrics have their own listener, so that their address can differ from the service's address, and so
//! that all services serve metrics in the same way.

use crate::config::ConfigError;
use http::{Request, Response, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use opentelemetry_prometheus::PrometheusExporter;
use prometheus::{Registry, TextEncoder};
use std::{collections::VecDeque, net::SocketAddr, time::Duration};
use tokio::{
    net::TcpListener,
    task::AbortHandle,
    time::{sleep, timeout},
};

/// The maximum number of open connections. A further connection closes the oldest one, so that idle
/// connections don't block others.
const MAX_CONNECTIONS: usize = 8;

/// How long a connection may stay open. A connection serves one answer, and is closed after this time even if
/// the client has not read the answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers `GET /metrics` at `address` until the runtime ends. The answer has the metrics of the returned
/// reader.
pub(crate) fn start(address: SocketAddr) -> Result<PrometheusExporter, ConfigError> {
    let listen = || {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    let failed = |problem: String| ConfigError::new("OTEL_EXPORTER_PROMETHEUS_PORT", problem);
    let listener = listen().map_err(|error| failed(format!("can't listen on {address}: {error}")))?;
    let registry = Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build();
    tokio::spawn(serve(listener, registry));
    exporter.map_err(|error| failed(error.to_string()))
}

async fn serve(listener: TcpListener, registry: Registry) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "metrics for Prometheus");
    }
    let mut connections = VecDeque::with_capacity(MAX_CONNECTIONS);
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Most likely the process is out of file descriptors, so wait until some are closed.
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        if connections.len() == MAX_CONNECTIONS {
            // Most likely this task has ended already.
            connections.pop_front().as_ref().map(AbortHandle::abort);
        }
        let registry = registry.clone();
        let task = tokio::spawn(async move {
            let answer = service_fn(async |request| answer(&request, &registry));
            let mut http = http1::Builder::new();
            let connection = http
                .timer(TokioTimer::new())
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer);
            let _ = timeout(CONNECTION_TIMEOUT, connection).await;
        });
        connections.push_back(task.abort_handle());
    }
}

fn answer(request: &Request<Incoming>, registry: &Registry) -> http::Result<Response<String>> {
    let (status, text) = match request.uri().path() {
        "/metrics" => match TextEncoder::new().encode_to_string(&registry.gather()) {
            Ok(text) => (200, text),
            Err(error) => {
                tracing::warn!(%error, "encoding metrics for Prometheus failed");
                (500, String::new())
            }
        },
        _ => (404, "there is only /metrics\n".to_owned()),
    };
    Response::builder().status(status).header(header::CONTENT_TYPE, prometheus::TEXT_FORMAT).body(text)
}
