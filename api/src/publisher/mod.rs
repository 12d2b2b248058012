//! Publishes logins to the broker, each in the hand-written span `send_msg_mq`.
//!
//! A published login was either confirmed by the broker, or written to the spool on disk. From there it will
//! be published in order, and in its own trace.
//!
//! - `message`: the message, encoded once
//! - `dispatch`: the one task that sends all messages, to the broker, or to the spool and then to the broker
//! - `spool`: the file of messages that the broker has not confirmed

mod dispatch;
mod message;
mod spool;

use crate::TRACER;
use amqp::{Server, Topology};
use dispatch::{Dispatcher, Request};
use futures_util::future::BoxFuture;
use message::Message;
use opentelemetry::{
    Context, KeyValue,
    trace::{Span, SpanKind, Status, TraceContextExt, Tracer},
};
use std::{
    sync::Arc,
    task::{self, Poll},
    time::Duration,
};
use telemetry::{OrCancelled, amqp::Broker, semconv};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tower::Service;
use uuid::Uuid;

pub use spool::{Limits, OpenError, Spool};

/// The name of this service's connection on the broker.
const CLIENT_ID: &str = "api";

/// The most logins that wait to be handed over. Further logins wait for room.
const MAX_WAITING: usize = 1024;

/// A login that happened.
// It has no `Debug`, because a mobile number is personal.
pub struct LoginEvent {
    /// Who logged in.
    pub mobile: String,
}

/// How a login was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The broker has it.
    Confirmed,
    /// The login is on disk, because the broker did not confirm it, and will be published later.
    Spooled(Unconfirmed),
}

/// Why the broker has not confirmed a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unconfirmed {
    /// There is no connection to the broker now.
    #[error("not connected to the broker")]
    NotConnected,
    /// The broker has not confirmed it.
    #[error(transparent)]
    Published(#[from] amqp::Unconfirmed),
    /// Earlier logins are in the spool, and have to be published first.
    #[error("earlier logins go first")]
    BehindSpool,
}

/// Why a login was not published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The broker has not confirmed it, and the spool has no room.
    #[error("the spool is full")]
    SpoolFull,
    /// The broker has not confirmed it, and it could not be written to disk.
    #[error("the spool failed")]
    SpoolFailed,
}

impl Unconfirmed {
    /// A short name, for spans and metrics.
    fn reason(self) -> &'static str {
        match self {
            Self::NotConnected => "not_connected",
            Self::Published(why) => why.reason(),
            Self::BehindSpool => "behind_spool",
        }
    }
}

impl PublishError {
    fn error_type(self) -> &'static str {
        match self {
            Self::SpoolFull => "spool_full",
            Self::SpoolFailed => "spool_failed",
        }
    }
}

/// Publishes logins. All clones share one connection.
///
/// It is a [`Service`], so layers can be put around it.
#[derive(Clone)]
pub struct Publisher {
    requests: mpsc::Sender<Request>,
    shared: Arc<Shared>,
}

struct Shared {
    topology: Topology,
    broker: Broker,
    /// The longest time that publishing may take, the spool included.
    limit: Duration,
    is_connected: watch::Receiver<bool>,
    spool: spool::State,
}

/// Whether logins can be published now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// The broker takes messages.
    pub broker: bool,
    /// The spool has room, and its disk works.
    pub spool: bool,
    /// Logins in the spool.
    pub spooled: u64,
}

impl Readiness {
    /// Whether a login would be published, either directly or through the spool.
    pub fn is_ready(&self) -> bool {
        self.spool || (self.broker && self.spooled == 0)
    }
}

impl Publisher {
    /// Connects in the background, and again whenever the connection breaks. If the broker does not confirm a
    /// message within `timeout`, the message goes to the spool.
    pub fn start(server: Server, topology: Topology, timeout: Duration, spool: Spool) -> (Self, Publishing) {
        let broker = Broker::new(&server.uri, CLIENT_ID);
        let (requests, incoming) = mpsc::channel(MAX_WAITING);
        let (stop, stopped) = oneshot::channel();
        let (connected, is_connected) = watch::channel(false);
        let shared = Shared {
            topology: topology.clone(),
            broker,
            // A message waits for the messages before it, then for its own confirmation, then for the disk.
            limit: timeout.mul_f64(2.5),
            is_connected,
            spool: spool.state(),
        };
        let spool_state = spool.state();
        observe(spool.state());
        let dispatcher = Dispatcher::new(server, topology, timeout, spool, incoming, stopped, connected);
        let task = tokio::spawn(dispatcher.run());
        (Self { requests, shared: Arc::new(shared) }, Publishing { stop, task, spool: spool_state })
    }

    /// Whether logins can be published now.
    pub fn readiness(&self) -> Readiness {
        let Shared { is_connected, spool, .. } = &*self.shared;
        Readiness { broker: *is_connected.borrow(), spool: spool.takes(), spooled: spool.entries() }
    }

    /// Publishes a login in its span. If the future is dropped, the login may be published nevertheless.
    async fn publish(self, login: LoginEvent) -> Result<Published, PublishError> {
        let message_id = Uuid::new_v4().to_string();
        let Topology { exchange, routing_key, .. } = &self.shared.topology;

        let mut span = TRACER.span_builder("send_msg_mq").with_kind(SpanKind::Producer).start(&*TRACER);
        if span.is_recording() {
            span.set_attributes(self.shared.broker.producer_attributes(exchange, routing_key, &message_id));
        }
        let cx = Context::current_with_span(span);
        // If this future is dropped, at the request's deadline or because the caller hung up, the span ends
        // as cancelled.
        let _or_cancelled = OrCancelled(cx.clone());

        // The message carries the context of this span, however long it is under way.
        let message = Message::new(&cx, message_id, login.mobile);
        let result = self.hand_over(message).await;

        let span = cx.span();
        match result {
            Ok(Published::Confirmed) => {
                span.set_attribute(KeyValue::new(semconv::PUBLISH_OUTCOME, "confirmed"));
            }
            // This is not an error, because the login will be published.
            Ok(Published::Spooled(why)) => {
                span.set_attribute(KeyValue::new(semconv::PUBLISH_OUTCOME, "spooled"));
                span.add_event("spooled", vec![KeyValue::new("reason", why.reason())]);
            }
            Err(error) => {
                span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, error.error_type()));
                span.set_status(Status::error(error.to_string()));
            }
        }
        span.end();
        result
    }

    async fn hand_over(&self, message: Message) -> Result<Published, PublishError> {
        let (done, outcome) = oneshot::channel();
        let handed_over = async {
            self.requests.send(Request { message, done }).await.ok()?;
            outcome.await.ok()
        };
        // Without an outcome, nobody knows whether the login was published, because the disk hangs or the
        // service is ending.
        timeout(self.shared.limit, handed_over).await.ok().flatten().unwrap_or(Err(PublishError::SpoolFailed))
    }
}

impl Service<LoginEvent> for Publisher {
    type Response = Published;
    type Error = PublishError;
    type Future = BoxFuture<'static, Result<Published, PublishError>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), PublishError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, login: LoginEvent) -> Self::Future {
        Box::pin(self.clone().publish(login))
    }
}

/// Registers the metrics of what is in the spool.
fn observe(spool: spool::State) {
    let meter = opentelemetry::global::meter("api");
    let gauge = |name, unit, description, value: fn(&spool::State) -> u64| {
        let spool = spool.clone();
        meter
            .u64_observable_gauge(name)
            .with_unit(unit)
            .with_description(description)
            .with_callback(move |observer| observer.observe(value(&spool), &[]))
            .build();
    };
    gauge("throughline.spool.entries", "{login}", "Logins in the spool.", spool::State::entries);
    gauge("throughline.spool.size", "By", "Bytes of the logins in the spool.", spool::State::bytes);
    gauge("throughline.spool.age", "s", "Time since the oldest login in the spool was taken.", |spool| {
        spool.oldest().map_or(0, |taken| taken.elapsed().unwrap_or_default().as_secs())
    });
}

/// The task that runs behind a [`Publisher`].
pub struct Publishing {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    spool: spool::State,
}

impl Publishing {
    /// Publishes the logins in the spool until `deadline`, if there is a connection. The rest stays in the
    /// spool for the next start. Call it when no more logins will be published.
    pub async fn close(mut self, deadline: Instant) {
        // Sending fails only if the task has ended by itself, which it has no reason to do.
        let _ = self.stop.send(());
        if timeout_at(deadline, &mut self.task).await.is_err() {
            self.task.abort();
        }
        let spooled = self.spool.entries();
        if spooled > 0 {
            tracing::warn!(spooled, "logins stay in the spool until the next start");
        }
    }
}
