//! The message to the broker, and the hand-written span `send_msg_mq`.
//!
//! One connection and one channel for the life of the service; when they break, a task makes new ones.

use crate::TRACER;
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::FieldTable,
    uri::AMQPUri,
};
use opentelemetry::{
    Context, KeyValue,
    context::FutureExt,
    trace::{Span, SpanKind, Status, TraceContextExt, Tracer},
};
use proto::{
    broker::{self, Backoff},
    login::{HeaderCarrier, LoginMessage},
    topology::Topology,
};
use std::{sync::Arc, time::Duration};
use telemetry::{
    amqp::{Broker, HeadersMut},
    semconv,
};
use tokio::{
    select,
    sync::{Notify, watch},
    task::AbortHandle,
    time::{Instant, timeout, timeout_at},
};
use uuid::Uuid;

/// The name of this service's connection on the broker.
const CLIENT_ID: &str = "api";

/// AMQP's delivery mode "persistent": the message survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// Publishes logins.
pub struct Publisher {
    /// `None` while there is no connection.
    session: watch::Receiver<Option<Session>>,
    topology: Topology,
    broker: Broker,
    timeout: Duration,
    /// Makes sessions, until it is aborted.
    keeper: AbortHandle,
}

/// A connection with its channel, set up for publishing.
#[derive(Clone)]
struct Session {
    connection: Arc<Connection>,
    channel: Channel,
    /// A publish failed: the channel may be closed while the connection is not.
    failed: Arc<Notify>,
}

/// Why a login was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// There is no connection to the broker now.
    #[error("not connected to the broker")]
    NotConnected,
    /// The broker is short of memory or disk and takes no messages (`connection.blocked`).
    #[error("the broker takes no messages now")]
    Blocked,
    /// The connection or the channel broke.
    #[error("the connection to the broker broke")]
    Broken(#[source] lapin::Error),
    /// The broker did not confirm in time.
    #[error("the broker did not confirm in time")]
    Timeout,
    /// The broker refused the message.
    #[error("the broker refused the message")]
    Nacked,
    /// The broker has no queue for the message.
    #[error("the message was returned as unroutable")]
    Unroutable,
}

impl PublishError {
    fn error_type(&self) -> &'static str {
        match self {
            Self::NotConnected => "not_connected",
            Self::Blocked => "blocked",
            Self::Broken(_) => "connection_broken",
            Self::Timeout => "timeout",
            Self::Nacked => "nacked",
            Self::Unroutable => "unroutable",
        }
    }
}

impl Publisher {
    /// Connects in the background, and again whenever the connection breaks.
    pub fn start(uri: AMQPUri, topology: Topology, timeout: Duration) -> Self {
        let (sender, session) = watch::channel(None);
        let broker = Broker::new(&uri, CLIENT_ID);
        let keeper = tokio::spawn(keep_connected(uri, topology.clone(), sender)).abort_handle();
        Self { session, topology, broker, timeout, keeper }
    }

    /// Whether the broker can be published to now.
    pub fn is_connected(&self) -> bool {
        self.session.borrow().as_ref().is_some_and(|session| !session.is_blocked())
    }

    /// Publishes that `mobile` has logged in. Once this returns, the broker has the message safely.
    ///
    /// # Errors
    /// If the broker did not confirm. It may have the message nevertheless.
    pub async fn publish(&self, mobile: String) -> Result<(), PublishError> {
        let message_id = Uuid::new_v4().to_string();
        let Topology { exchange, routing_key, .. } = &self.topology;

        let mut span = TRACER.span_builder("send_msg_mq").with_kind(SpanKind::Producer).start(&*TRACER);
        if span.is_recording() {
            span.set_attributes(self.broker.producer_attributes(exchange, routing_key, &message_id));
        }
        let cx = Context::current_with_span(span);

        let sent = timeout(self.timeout, self.send(&cx, mobile, message_id)).with_context(cx.clone()).await;
        let result = sent.unwrap_or(Err(PublishError::Timeout));
        if let Err(error) = &result {
            cx.span().set_attribute(KeyValue::new(semconv::ERROR_TYPE, error.error_type()));
            cx.span().set_status(Status::error(error.to_string()));
        }
        cx.span().end();
        result
    }

    async fn send(&self, cx: &Context, mobile: String, message_id: String) -> Result<(), PublishError> {
        // The context travels twice: in the headers for everybody, in the body for the Go original.
        let mut headers = FieldTable::default();
        telemetry::inject(cx, &mut HeadersMut(&mut headers));
        let mut carrier = HeaderCarrier::default();
        telemetry::inject(cx, &mut carrier);
        let body = LoginMessage { carrier, msg: mobile }.to_json();

        let session = self.session.borrow().clone().ok_or(PublishError::NotConnected)?;
        if session.is_blocked() {
            // lapin would keep the message, and all after it, until the broker takes messages again.
            return Err(PublishError::Blocked);
        }
        let confirmation =
            session.publish(&self.topology, headers, message_id, &body).await.map_err(|error| {
                session.failed.notify_one();
                PublishError::Broken(error)
            })?;
        match confirmation {
            Confirmation::Ack(None) => Ok(()),
            // An unroutable message is returned, and then acked all the same.
            Confirmation::Ack(Some(_)) => Err(PublishError::Unroutable),
            Confirmation::Nack(_) | Confirmation::NotRequested => Err(PublishError::Nacked),
        }
    }

    /// Closes the connection in an orderly way, for at most a second, and until `deadline` at most.
    pub async fn close(&self, deadline: Instant) {
        // First: what is closed now must be neither reported as lost nor replaced.
        self.keeper.abort();
        let session = self.session.borrow().clone();
        if let Some(Session { connection, .. }) = session {
            let deadline = deadline.min(Instant::now() + Duration::from_secs(1));
            let closed = timeout_at(deadline, connection.close(200, "shutting down".into())).await;
            tracing::debug!(?closed, "closed the connection to the broker");
        }
    }
}

impl Session {
    async fn open(uri: &AMQPUri, topology: &Topology) -> lapin::Result<Self> {
        let connection = Arc::new(broker::connect(uri, CLIENT_ID).await?);
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        topology.declare(&channel).await?;
        Ok(Self { connection, channel, failed: Arc::default() })
    }

    fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Waits until this session can't be used any more; tells why.
    async fn broken(&self) -> String {
        let mut events = self.connection.events_listener();
        // What happened before there was a listener.
        if !self.connection.status().connected() {
            return "closed".to_owned();
        }
        loop {
            select! {
                () = self.failed.notified() => return "a publish failed".to_owned(),
                event = events.next() => match event {
                    Some(Event::Error(error)) => return error.to_string(),
                    Some(_) => {}
                    None => return "closed".to_owned(),
                },
            }
        }
    }

    async fn publish(
        &self,
        topology: &Topology,
        headers: FieldTable,
        message_id: String,
        body: &[u8],
    ) -> lapin::Result<Confirmation> {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_message_id(message_id.into())
            .with_headers(headers);
        let (exchange, routing_key) = (topology.exchange.as_str(), topology.routing_key.as_str());
        // Without `mandatory` a message that no queue takes would vanish.
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        self.channel
            .basic_publish(exchange.into(), routing_key.into(), options, body, properties)
            .await?
            .await
    }
}

/// Holds a session open until the publisher is gone, and opens a new one whenever it breaks.
async fn keep_connected(uri: AMQPUri, topology: Topology, sender: watch::Sender<Option<Session>>) {
    let broker = Broker::new(&uri, CLIENT_ID);
    let mut backoff = Backoff::new();
    let mut is_away = false;
    while !sender.is_closed() {
        match Session::open(&uri, &topology).await {
            Ok(session) => {
                tracing::info!(%broker, "connected to the broker");
                (is_away, backoff) = (false, Backoff::new());
                sender.send_replace(Some(session.clone()));
                let reason = session.broken().await;
                sender.send_replace(None);
                tracing::warn!(%broker, reason, "lost the connection to the broker");
            }
            // Once, not for every attempt.
            Err(error) if !is_away => {
                tracing::warn!(%broker, %error, "can't connect to the broker; trying on");
                is_away = true;
            }
            Err(_) => {}
        }
        backoff.pause().await;
    }
}
