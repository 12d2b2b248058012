//! What became of the spans, for Prometheus: `OTEL_METRICS_EXPORTER=prometheus`.
//!
//! A listener of its own, so that it can be on another address than the service's, and the same for all
//! services. Text format 0.0.4.

use crate::{
    config::ConfigError,
    export::batch::{Queue, SpanCounts},
};
use http::{Request, Response, StatusCode, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, fmt::Write, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Who asks at the same time as so many others has to wait.
const MAX_CONNECTIONS: usize = 8;

/// A connection is for one answer, and closed after this time whether it was fetched or not.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Listens for Prometheus.
pub(crate) fn listen(address: SocketAddr) -> Result<TcpListener, ConfigError> {
    let listen = || {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    listen().map_err(|error| {
        ConfigError::new("OTEL_EXPORTER_PROMETHEUS_PORT", format!("can't listen on {address}: {error}"))
    })
}

/// Answers `GET /metrics` until the runtime ends.
pub(crate) fn serve(listener: TcpListener, queues: Vec<Arc<Queue>>) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "metrics for Prometheus");
    }
    tokio::spawn(async move {
        let queues: Arc<[_]> = queues.into();
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else {
                return;
            };
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors, most likely: let some be closed.
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let queues = queues.clone();
            tokio::spawn(async move {
                let answer = service_fn(async |request| Ok::<_, Infallible>(answer(&request, &queues)));
                let mut http = http1::Builder::new();
                let connection = http
                    .timer(TokioTimer::new())
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), answer);
                let _ = timeout(CONNECTION_TIMEOUT, connection).await;
                drop(permit);
            });
        }
    });
}

fn answer(request: &Request<Incoming>, queues: &[Arc<Queue>]) -> Response<String> {
    if request.uri().path() != "/metrics" {
        let mut response = Response::new("there is only /metrics\n".to_owned());
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    }
    let counts: Vec<_> = queues.iter().map(|queue| (queue.exporter(), queue.counts())).collect();
    let mut response = Response::new(text(&counts));
    let format = header::HeaderValue::from_static("text/plain; version=0.0.4");
    response.headers_mut().insert(header::CONTENT_TYPE, format);
    response
}

fn text(counts: &[(&str, SpanCounts)]) -> String {
    let mut text = String::new();
    let mut family =
        |name: &str, kind: &str, help: &str, values: &dyn Fn(&SpanCounts) -> Vec<(&str, u64)>| {
            // Writing to a string can't fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (exporter, counts) in counts {
                for (labels, value) in values(counts) {
                    let _ = writeln!(text, "{name}{{exporter=\"{exporter}\"{labels}}} {value}");
                }
            }
        };
    family("throughline_spans_ended_total", "counter", "Sampled spans that ended.", &|counts| {
        vec![("", counts.ended)]
    });
    family("throughline_spans_exported_total", "counter", "Spans that the collector took.", &|counts| {
        vec![("", counts.exported)]
    });
    family("throughline_spans_dropped_total", "counter", "Spans given up, by reason.", &|counts| {
        vec![
            (",reason=\"queue_full\"", counts.dropped.queue_full),
            (",reason=\"not_sent\"", counts.dropped.not_sent),
            (",reason=\"rejected\"", counts.dropped.rejected),
        ]
    });
    family("throughline_spans_waiting", "gauge", "Spans that are queued or being sent.", &|counts| {
        vec![("", counts.waiting())]
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::batch::DroppedSpans;

    #[test]
    fn every_span_that_ended_is_somewhere() {
        let dropped = DroppedSpans { queue_full: 1, not_sent: 2, rejected: 3 };
        let text = text(&[("otlp", SpanCounts { ended: 20, exported: 10, dropped })]);
        assert_eq!(
            text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>(),
            [
                "throughline_spans_ended_total{exporter=\"otlp\"} 20",
                "throughline_spans_exported_total{exporter=\"otlp\"} 10",
                "throughline_spans_dropped_total{exporter=\"otlp\",reason=\"queue_full\"} 1",
                "throughline_spans_dropped_total{exporter=\"otlp\",reason=\"not_sent\"} 2",
                "throughline_spans_dropped_total{exporter=\"otlp\",reason=\"rejected\"} 3",
                "throughline_spans_waiting{exporter=\"otlp\"} 4",
            ]
        );
    }
}
