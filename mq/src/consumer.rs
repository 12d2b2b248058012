//! The delivery loop, and the hand-written span `mq_consumer_msg`.

use crate::processing::LoginHistory;
use anyhow::{bail, ensure};
use futures_util::{FutureExt as _, StreamExt};
use lapin::{
    Channel, Confirmation,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use opentelemetry::{
    Context, KeyValue,
    context::FutureExt as _,
    global::{self, BoxedTracer},
    trace::{Span, Status, TraceContextExt, Tracer},
};
use proto::{
    broker::{self, Backoff},
    login::{LoginMessage, LoginMessageError},
    topology::Topology,
};
use std::sync::LazyLock;
use telemetry::{
    amqp::{self, Broker, Relation},
    semconv,
};
use tokio::select;
use tonic_health::{ServingStatus, server::HealthReporter};

/// Makes the hand-written span of this service.
static TRACER: LazyLock<BoxedTracer> = LazyLock::new(|| global::tracer("mq"));

/// The name of this service's connection on the broker.
const CLIENT_ID: &str = "mq";

/// Deliveries acknowledged together, at most.
const MAX_CHUNK: usize = 16;

/// The header of a dead letter that says why it is one.
pub const REASON_HEADER: &str = "x-dead-letter-reason";

/// Consumes login messages.
pub struct Consumer {
    uri: AMQPUri,
    topology: Topology,
    prefetch: u16,
    relation: Relation,
    history: LoginHistory,
    health: HealthReporter,
    broker: Broker,
}

impl Consumer {
    /// A consumer that tells `health` whether it is consuming.
    pub fn new(
        uri: AMQPUri,
        topology: Topology,
        prefetch: u16,
        relation: Relation,
        history: LoginHistory,
        health: HealthReporter,
    ) -> Self {
        let broker = Broker::new(&uri, CLIENT_ID);
        Self { uri, topology, prefetch, relation, history, health, broker }
    }

    /// Consumes until `stop` is ready and the deliveries that have come by then are finished. Connects
    /// again, as often as needed.
    pub async fn run(&self, stop: impl Future<Output = ()>) {
        let stop = stop.shared();
        let broker = &self.broker;
        let mut backoff = Backoff::new();
        let mut is_away = false;
        loop {
            let (connected, ended) = self.session(stop.clone()).await;
            match ended {
                Ok(()) => return,
                Err(error) if connected => {
                    tracing::warn!(%broker, "lost the connection to the broker: {error:#}");
                    (is_away, backoff) = (false, Backoff::new());
                }
                // Once, not for every attempt.
                Err(error) if !is_away => {
                    tracing::warn!(%broker, "can't connect to the broker; trying on: {error:#}");
                    is_away = true;
                }
                Err(_) => {}
            }
            select! {
                () = backoff.pause() => {}
                () = stop.clone() => return,
            }
        }
    }

    /// One connection, from its opening to its end: whether it came to consuming, and why it ended; `Ok`
    /// if by `stop`.
    async fn session(&self, stop: impl Future<Output = ()> + Clone) -> (bool, anyhow::Result<()>) {
        let (connection, channel, deliveries) = select! {
            opened = self.open() => match opened {
                Ok(opened) => opened,
                Err(error) => return (false, Err(error.into())),
            },
            () = stop.clone() => return (false, Ok(())),
        };
        tracing::info!(broker = %self.broker, queue = self.topology.queue, "consuming");
        self.health.set_service_status("", ServingStatus::Serving).await;
        let ended = self.consume(&channel, deliveries, stop).await;
        self.health.set_service_status("", ServingStatus::NotServing).await;
        if ended.is_ok() {
            // What is not acknowledged goes back to the queue.
            let closed = connection.close(200, "shutting down".into()).await;
            tracing::debug!(?closed, "closed the connection to the broker");
        }
        (true, ended)
    }

    async fn open(&self) -> lapin::Result<(lapin::Connection, Channel, lapin::Consumer)> {
        let connection = broker::connect(&self.uri, CLIENT_ID).await?;
        let channel = connection.create_channel().await?;
        // Confirms are for the messages that this side publishes: dead letters.
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        channel.basic_qos(self.prefetch, BasicQosOptions::default()).await?;
        self.topology.declare(&channel).await?;
        let deliveries = channel
            .basic_consume(
                self.topology.queue.as_str().into(),
                CLIENT_ID.into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        Ok((connection, channel, deliveries))
    }

    async fn consume(
        &self,
        channel: &Channel,
        deliveries: lapin::Consumer,
        stop: impl Future<Output = ()> + Clone,
    ) -> anyhow::Result<()> {
        let tag = deliveries.tag();
        // What has come in the meantime is taken together.
        let mut deliveries = deliveries.ready_chunks(MAX_CHUNK);
        loop {
            select! {
                chunk = deliveries.next() => match chunk {
                    Some(chunk) => self.deliver_all(channel, chunk).await?,
                    None => bail!("the broker cancelled the consumer"),
                },
                () = stop.clone() => break,
            }
        }
        tracing::info!("stopping: finishing deliveries in hand");
        channel.basic_cancel(tag, BasicCancelOptions::default()).await?;
        while let Some(chunk) = deliveries.next().await {
            self.deliver_all(channel, chunk).await?;
        }
        Ok(())
    }

    /// Processes deliveries one after the other, then acknowledges them all at once, which costs both
    /// sides less. Cut short, it leaves them in the queue: they will be delivered again.
    async fn deliver_all(
        &self,
        channel: &Channel,
        chunk: Vec<lapin::Result<Delivery>>,
    ) -> anyhow::Result<()> {
        let mut last = None;
        for delivery in chunk {
            let delivery = delivery?;
            self.deliver(channel, &delivery).await?;
            last = Some(delivery);
        }
        if let Some(last) = last {
            last.ack(BasicAckOptions { multiple: true }).await?;
        }
        Ok(())
    }

    /// Processes one delivery in its span.
    async fn deliver(&self, channel: &Channel, delivery: &Delivery) -> anyhow::Result<()> {
        let (carrier, message) = LoginMessage::from_json(&delivery.data);
        let (producer, source) = amqp::extract(delivery.properties.headers().as_ref(), &carrier);

        let (builder, parent) = self.relation.consumer_span("mq_consumer_msg", producer);
        let mut span = TRACER.build_with_context(builder, &parent);
        if span.is_recording() {
            span.set_attributes(self.broker.consumer_attributes(delivery, &self.topology.queue, source));
        }
        let cx = parent.with_span(span);

        let processed = async {
            match message {
                Ok(message) => self.history.record(&message.msg),
                Err(error) => self.dead_letter(channel, delivery, error).await?,
            }
            Ok(())
        };
        let processed = processed.with_context(cx.clone()).await;
        cx.span().end();
        processed
    }

    /// Publishes a message that can't be read to the dead-letter queue: unchanged, with the reason in a
    /// header. Only once the broker has confirmed it may the original be acknowledged.
    async fn dead_letter(
        &self,
        channel: &Channel,
        delivery: &Delivery,
        error: LoginMessageError,
    ) -> anyhow::Result<()> {
        Context::map_current(|cx| {
            let span = cx.span();
            span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, error.reason()));
            span.set_status(Status::error(error.to_string()));
        });
        tracing::warn!(%error, queue = self.topology.dead_letter_queue, "dead letter");

        let mut headers = delivery.properties.headers().clone().unwrap_or_default();
        headers.insert(REASON_HEADER.into(), AMQPValue::LongString(error.reason().into()));
        let queue = self.topology.dead_letter_queue.as_str();
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let properties = delivery.properties.clone().with_headers(headers);
        let confirmation = channel
            .basic_publish("".into(), queue.into(), options, &delivery.data, properties)
            .await?
            .await?;
        ensure!(confirmation == Confirmation::Ack(None), "the broker did not take a dead letter");
        Ok(())
    }
}
