//! Accepts connections, serves them, and drains them at shutdown.
//!
//! axum's own `serve` has no time-out for request headers and no bound on connections, so clients that send
//! nothing could keep any number of connections open for ever. This module has its own loop around hyper,
//! with a time-out and bounds.

use crate::{
    bounds::{HEADER_TIMEOUT, MAX_BUFFER},
    head,
    stream::Stream,
};
use axum::{Router, extract::ConnectInfo};
use hyper::{
    Request,
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serving::{
    listener::Listener,
    memory,
    seldom::Seldom,
    shutdown::{Schedule, Shutdown},
    waiting::{ByAddress, Place, Waiting},
};
use std::{convert::Infallible, io::Cursor, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, join},
    net::{TcpListener, TcpStream},
    pin, select,
    task::JoinSet,
    time::{interval, timeout, timeout_at},
};
use tower::Service;

/// How often freed memory is given back to the system, if the number of connections has fallen by at least
/// `MANY`.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);
const MANY: usize = 500;

/// How many connections there may be at once.
#[derive(Debug, Clone, Copy)]
pub struct MaxConnections {
    /// The most connections from all addresses together.
    pub in_all: usize,
    /// The most connections from one address.
    pub by_address: usize,
}

/// Serves `router` until `shutdown`. Requests that do not finish in time after that are cut off, and a
/// warning is logged. Returns the times by which the rest of the service must have ended.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    max: MaxConnections,
    shutdown: Shutdown,
) -> Schedule {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_BUFFER)
        .half_close(true);
    let connections = Connections { http, router, shutdown: shutdown.clone() };
    let mut listener = Listener::new(listener);
    let (waiting, mut by_address) = (Waiting::default(), ByAddress::new(max.by_address));
    let refusals = Seldom::default();
    let mut tasks = JoinSet::new();
    // The most connections since `give_back` last ticked.
    let mut peak = 0;
    let mut give_back = interval(GIVE_BACK_EVERY);

    let stopped = shutdown.stopped();
    pin!(stopped);
    let schedule = loop {
        let (stream, peer) = select! {
            // One connection more than the maximum is accepted, and then another connection is closed to make
            // room for it.
            accepted = listener.accept(), if tasks.len() <= max.in_all => accepted,
            Some(_) = tasks.join_next() => continue,
            _ = give_back.tick() => {
                if tasks.len() + MANY <= peak {
                    memory::give_back();
                }
                peak = tasks.len();
                continue;
            }
            schedule = &mut stopped => break schedule,
        };
        let Some((among_its_own, has_made_room)) = by_address.enter(peer.ip()) else {
            if refusals.is_due() {
                tracing::warn!(
                    most = max.by_address,
                    "refused a connection: all connections of its address are busy"
                );
            }
            continue;
        };
        if tasks.len() >= max.in_all && !has_made_room {
            waiting.let_go();
        }
        let places = [waiting.enter(), among_its_own];
        let connections = connections.clone();
        peak = peak.max(tasks.len() + 1);
        tasks.spawn(async move {
            let [in_all, by_address] = &places;
            select! {
                // `must_go` is checked first, so that the connection does not begin a request and then drop
                // it.
                biased;
                () = in_all.must_go() => tracing::debug!("a connection made room for another one"),
                () = by_address.must_go() => tracing::debug!("a connection made room for one of its own address"),
                () = connections.serve(stream, peer, &places) => {}
            }
        });
    };

    drop(listener);
    tracing::info!("stopping: finishing requests in flight");
    let finished = async { while tasks.join_next().await.is_some() {} };
    if timeout_at(schedule.finish_by, finished).await.is_err() {
        tracing::warn!("requests in flight are cut off at the deadline");
        // Dropping the requests ends their spans, so these spans can still be sent.
        tasks.shutdown().await;
    }
    schedule
}

/// Serves single connections.
#[derive(Clone)]
struct Connections {
    http: http1::Builder,
    router: Router,
    shutdown: Shutdown,
}

impl Connections {
    /// Serves a connection until it is closed. Until the headers of the first request are complete, only the
    /// bytes of these headers are held in memory. hyper's buffers and state are allocated after that, because
    /// they take several times as much memory as most requests.
    async fn serve(self, mut stream: TcpStream, peer: SocketAddr, places: &[Arc<Place>; 2]) {
        let head = timeout(HEADER_TIMEOUT, head::read(&mut stream, MAX_BUFFER, self.shutdown.stopped()));
        if let Ok(Some(head)) = head.await {
            Box::pin(self.serve_begun(head, stream, peer, places)).await;
        }
    }

    /// Serves a connection from which `head` has been read.
    async fn serve_begun(self, head: Vec<u8>, stream: TcpStream, peer: SocketAddr, places: &[Arc<Place>; 2]) {
        let service = service_fn(|mut request: Request<Incoming>| {
            let has_request = places.each_ref().map(Place::has_request);
            request.extensions_mut().insert(ConnectInfo(peer));
            let answer = self.router.clone().call(request);
            let is_last = self.shutdown.has_begun();
            async move {
                let mut answer = answer.await?;
                if is_last {
                    // A client that reuses connections then opens a new connection, to another instance.
                    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                drop(has_request);
                Ok::<_, Infallible>(answer)
            }
        });
        let stream = Stream::new(stream);
        let joined = join(Cursor::new(head).chain(stream.clone()), stream.clone());
        let connection = self.http.serve_connection(TokioIo::new(joined), service);
        pin!(connection);
        let served = async {
            select! {
                // The connection is polled first, so that hyper reads `head` before it is told to shut down.
                biased;
                served = &mut connection => served,
                _ = self.shutdown.stopped() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        };
        select! {
            biased;
            served = served => if let Err(error) = served {
                tracing::debug!(%error, "connection failed");
            },
            () = stream.failed() => tracing::debug!("the caller reset the connection"),
        }
    }
}
