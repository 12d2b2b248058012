//! Accepts connections, serves them, and drains them at shutdown.
//!
//! axum's own `serve` has no time-out for request headers and no bound on connections, so clients that send
//! nothing could hold any number of connections for ever. This is hyper's loop, with a time-out and a bound.

use axum::{Router, extract::ConnectInfo};
use hyper::{
    Request,
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use serving::{
    listener::Listener,
    shutdown::{Schedule, Shutdown},
    waiting::Waiting,
};
use std::{convert::Infallible, time::Duration};
use tokio::{net::TcpListener, pin, select, task::JoinSet, time::timeout_at};
use tower::Service;

/// How long a client may take to send all headers of a request, from the moment when the connection was
/// opened or the previous answer was sent. So it is also how long a connection may be idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// The most bytes of one connection that are buffered, and so also the longest headers. A request with longer
/// headers gets the status 431. (hyper's own limit is 400 KiB, which would be multiplied by 10,000
/// connections. hyper also allows at most 100 headers.)
pub const MAX_BUFFER: usize = 32 * 1024;

/// Serves `router` until `shutdown`, on at most `max_connections` connections at once. Requests that are not
/// finished in time after that are cut off, which is logged. Returns the times by which the rest of the
/// service must have ended.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    max_connections: usize,
    shutdown: Shutdown,
) -> Schedule {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_BUFFER);
    let mut listener = Listener::new(listener);
    let connections = GracefulShutdown::new();
    let waiting = Waiting::default();
    let mut tasks = JoinSet::new();

    let stopped = shutdown.stopped();
    pin!(stopped);
    let schedule = loop {
        let (stream, peer) = select! {
            // One connection more than the maximum is accepted, and another one goes in its place.
            accepted = listener.accept(), if tasks.len() <= max_connections => accepted,
            Some(_) = tasks.join_next() => continue,
            schedule = &mut stopped => break schedule,
        };
        if tasks.len() >= max_connections {
            waiting.let_go();
        }
        let place = waiting.enter();
        let (router, shutdown, place_of_requests) = (router.clone(), shutdown.clone(), place.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let has_request = place_of_requests.has_request();
            request.extensions_mut().insert(ConnectInfo(peer));
            let answer = router.clone().call(request);
            let is_last = shutdown.has_begun();
            async move {
                let mut answer = answer.await?;
                if is_last {
                    // A client that keeps connections then makes its next one to another instance.
                    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                drop(has_request);
                Ok::<_, Infallible>(answer)
            }
        });
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tasks.spawn(async move {
            select! {
                // This is checked first, so that the connection does not begin a request and then drop it.
                biased;
                () = place.must_go() => tracing::debug!("a connection made room for another one"),
                served = connection => if let Err(error) = served {
                    tracing::debug!(%error, "connection failed");
                },
            }
        });
    };

    drop(listener);
    tracing::info!("stopping: finishing requests in flight");
    if timeout_at(schedule.finish_by, connections.shutdown()).await.is_err() {
        tracing::warn!("requests in flight are cut off at the deadline");
        // When requests are dropped, their spans end, and can still be sent.
        tasks.shutdown().await;
    }
    schedule
}
