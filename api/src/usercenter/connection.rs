//! The connection to usercenter, below all layers of the client.

use serving::seldom::Seldom;
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tonic::{
    body::Body,
    codegen::http::{Request, Response},
    transport::{self, Channel, Endpoint},
};
use tower::{Service, ServiceExt};

/// A channel that gives up a silent connection. It logs why usercenter can't be reached, because the layers
/// around the channel know only the gRPC status of a failure, not its cause. It logs this at most once per
/// minute, because every call fails during an outage.
#[derive(Clone)]
pub struct Connection(Arc<Shared>);

struct Shared {
    endpoint: Endpoint,
    patience: Duration,
    current: Mutex<Current>,
    warnings: Seldom,
}

/// The connection for new calls.
struct Current {
    channel: Channel,
    /// When usercenter was first called after its last answer, or `None` if it has not been called since
    /// then.
    unanswered_since: Option<Instant>,
}

impl Connection {
    /// Makes a channel to `endpoint`. If no call has been answered for longer than `patience`, new calls get
    /// another connection, because a connection may die without an error. HTTP/2 pings would also detect a
    /// dead connection, but gRPC servers close a connection on which pings come more often than every five
    /// minutes.
    pub fn new(endpoint: Endpoint, patience: Duration) -> Self {
        let current = Current { channel: endpoint.connect_lazy(), unanswered_since: None };
        let current = Mutex::new(current);
        Self(Arc::new(Shared { endpoint, patience, current, warnings: Seldom::default() }))
    }
}

impl Shared {
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the channel for a call that begins now.
    fn channel(&self) -> Channel {
        let mut current = self.current();
        if current.unanswered_since.is_some_and(|since| since.elapsed() > self.patience) {
            self.warn("no call is answered; new calls get another connection");
            // Earlier calls keep the old connection, in case usercenter is only slow.
            *current = Current { channel: self.endpoint.connect_lazy(), unanswered_since: None };
        }
        current.unanswered_since.get_or_insert_with(Instant::now);
        current.channel.clone()
    }

    fn warn(&self, why: &str) {
        if self.warnings.is_due() {
            tracing::warn!(endpoint = %self.endpoint.uri(), "can't reach usercenter: {why}");
        }
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Body>;
    type Error = transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, transport::Error>> + Send>>;

    /// Is always ready, because each call waits for a connection by itself.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), transport::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.0.channel().oneshot(request);
        let shared = self.0.clone();
        Box::pin(async move {
            let answer = answer.await;
            match &answer {
                Ok(_) => shared.current().unanswered_since = None,
                // An error is no sign of life, because it may mean only that the call's time is over.
                Err(error) => shared.warn(&telemetry::causes(error)),
            }
            answer
        })
    }
}
