//! Publishes logins, each in the hand-written span `send_msg_mq`.
//!
//! A login counts as published when the broker has confirmed it, or when it is in the spool on disk. Logins
//! in the spool go to the broker later, in order, each in its own trace ([`crate::outbox`]).

use crate::{
    outbox::{
        CLIENT_ID, Message, Outbox, PublishError, PublishOptions, Published, Publishing, Readiness, Spool,
    },
    tracer::TRACER,
};
use amqp::{Server, Topology};
use futures_util::future::BoxFuture;
use opentelemetry::{
    Context, KeyValue,
    trace::{SpanKind, Status, TraceContextExt, Tracer},
};
use proto::login::MobileNumber;
use std::{
    sync::Arc,
    task::{self, Poll},
};
use telemetry::{OrCancelled, amqp::Broker, semconv};
use tower::Service;
use uuid::Uuid;

/// A login that happened.
#[derive(Debug)]
pub struct LoginEvent {
    /// Who logged in.
    pub mobile: MobileNumber,
}

/// Publishes logins. All clones share one connection.
///
/// It is a [`Service`], so layers can be put around it.
#[derive(Clone)]
pub struct Publisher {
    outbox: Outbox,
    destination: Arc<(Broker, String)>,
}

impl Publisher {
    /// Starts publishing. Connects in the background, and connects again whenever the connection breaks.
    pub fn start(
        server: Server,
        topology: Topology,
        options: PublishOptions,
        spool: Spool,
    ) -> (Self, Publishing) {
        let broker = Broker::of_hosts(&server.hosts, server.current.clone(), CLIENT_ID);
        let destination = Arc::new((broker, topology.queue.clone()));
        let (outbox, publishing) = Outbox::start(server, topology, options, spool);
        (Self { outbox, destination }, publishing)
    }

    /// Whether logins can be published now.
    pub fn readiness(&self) -> Readiness {
        self.outbox.readiness()
    }

    /// Publishes a login in its span. If the future is dropped, the login may be published nevertheless.
    async fn publish(self, login: LoginEvent) -> Result<Published, PublishError> {
        let message_id = Uuid::new_v4().to_string();
        let (broker, queue) = &*self.destination;

        let span = TRACER
            .span_builder("send_msg_mq")
            .with_kind(SpanKind::Producer)
            .with_attributes(broker.producer_attributes("", queue, &message_id))
            .start(&*TRACER);
        let cx = Context::current_with_span(span);
        // If this future is dropped, at the request's deadline or because the caller disconnected, the span
        // ends as cancelled.
        let _or_cancelled = OrCancelled(cx.clone());

        // The message carries the context of this span, even if the delivery of the message takes hours.
        let message = Message::new(&cx, message_id, login.mobile);
        let result = self.outbox.publish(message).await;

        let span = cx.span();
        match result {
            Ok(Published::Confirmed) => {
                span.set_attributes(broker.peer_attributes());
                span.set_attribute(KeyValue::new(semconv::PUBLISH_OUTCOME, "confirmed"));
            }
            // This is not an error, because the broker will get the login later.
            Ok(Published::Spooled(why)) => {
                span.set_attribute(KeyValue::new(semconv::PUBLISH_OUTCOME, "spooled"));
                span.add_event("spooled", vec![KeyValue::new(semconv::SPOOL_REASON, why)]);
            }
            Err(error) => {
                span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, error.error_type()));
                span.set_status(Status::error(error.to_string()));
            }
        }
        span.end();
        result
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
