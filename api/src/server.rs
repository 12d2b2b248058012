//! Connections: accept, serve, drain.
//!
//! axum's own `serve` has no time-out for request headers: a client that sends nothing holds its
//! connection for ever. So this is hyper's loop, with one.

use axum::{Router, extract::ConnectInfo};
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use std::time::Duration;
use tokio::{
    net::TcpListener,
    pin, select,
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};
use tower::Service;

/// How long a client may take for the headers of a request, from the end of the one before.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves `router` until `stop` is ready; it tells by when requests in flight must be finished. Those
/// that are not are cut off, and logged. Returns that deadline.
pub async fn serve(listener: TcpListener, router: Router, stop: impl Future<Output = Instant>) -> Instant {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    let connections = GracefulShutdown::new();
    let mut tasks = JoinSet::new();

    pin!(stop);
    let deadline = loop {
        let (stream, peer) = select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: let some be closed.
                    tracing::warn!(%error, "can't accept a connection");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = tasks.join_next() => continue,
            deadline = &mut stop => break deadline,
        };
        // Answers are small and complete: waiting for more to send only delays them.
        let _ = stream.set_nodelay(true);
        let router = router.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            router.clone().call(request)
        });
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tasks.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection failed");
            }
        });
    };

    drop(listener);
    tracing::info!("stopping: finishing requests in flight");
    if timeout_at(deadline, connections.shutdown()).await.is_err() {
        tracing::warn!("requests in flight are cut off at the deadline");
        // Dropped, they end their spans, which can still be sent.
        tasks.shutdown().await;
    }
    deadline
}
