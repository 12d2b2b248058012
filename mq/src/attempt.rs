//! Handles one delivery: opens the hand-written span `mq_consumer_msg`, processes the login, and decides what
//! happens to the message.

use crate::{
    bounds::{LONGEST_BODY, MAX_REDELIVERIES},
    failure::Failure,
    forwarder::Forwarder,
    history::{Change, History, Login, Processed, Refused},
    properties,
};
use ::amqp::{
    Topology,
    properties::{BODY_CUT, HEADERS_LEFT_OUT, UNREADABLE, header},
};
use futures_util::FutureExt as _;
use lapin::{BasicProperties, message::Delivery, types::AMQPValue};
use opentelemetry::{
    Context, KeyValue,
    context::FutureExt as _,
    global::BoxedTracer,
    metrics::{Counter, Histogram},
    trace::{Span, Status, TraceContextExt, Tracer},
};
use proto::{
    headers::{ATTEMPT, DEAD_LETTER_ATTEMPTS, DEAD_LETTER_REASON},
    login::LoginMessage,
};
use std::{
    panic::AssertUnwindSafe,
    sync::LazyLock,
    time::{Duration, Instant},
};
use telemetry::{
    amqp::{self, Broker, Relation},
    semconv,
};
use tower::{BoxError, Service, ServiceExt};
use uuid::Uuid;

/// Makes the hand-written span of this service.
static TRACER: LazyLock<BoxedTracer> = LazyLock::new(|| telemetry::tracer("mq", env!("CARGO_PKG_VERSION")));

/// The metrics that an operator wants in addition to those that all consumers have.
struct Metrics {
    time_in_queue: Histogram<f64>,
    retries: Counter<u64>,
    dead_letters: Counter<u64>,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| {
    let meter = telemetry::meter("mq", env!("CARGO_PKG_VERSION"));
    let messages = |name| meter.u64_counter(name).with_unit("{message}").build();
    Metrics {
        // The histogram's bounds, in seconds, range from the usual time to the time after an outage.
        time_in_queue: meter
            .f64_histogram("throughline.message.time_in_queue")
            .with_unit("s")
            .with_boundaries(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0])
            .build(),
        retries: messages("throughline.message.retries"),
        dead_letters: messages("throughline.message.dead_letters"),
    }
});

/// What every attempt needs.
pub struct Attempts<S> {
    /// The service that processes a login.
    pub processing: S,
    /// The login history, which also counts redeliveries.
    pub history: History,
    /// Publishes failed messages to their next queue.
    pub forwarder: Forwarder,
    /// The names of the queues.
    pub topology: Topology,
    /// How consumer spans relate to producer spans.
    pub relation: Relation,
    /// The pause after each attempt except the last.
    pub retry_delays: Vec<Duration>,
    /// The broker, as it is named in spans.
    pub broker: Broker,
}

/// The deliveries that were taken together, as one chunk.
#[derive(Debug, Clone, Copy)]
pub struct Chunk {
    /// The number of these deliveries.
    pub size: usize,
    /// How long these deliveries gathered before they were taken.
    pub pause: Duration,
}

/// How often a message was delivered without a result before this delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Redelivered {
    /// This is the first delivery.
    No,
    /// The message was delivered once without a result. This redelivery is now marked on disk.
    Once,
    /// The message was delivered several times without a result, so it may have killed the process.
    Suspect {
        /// The number of redeliveries that are counted on disk, not including this redelivery.
        counted: i64,
    },
}

/// What must be done with a delivery when its attempt is over.
pub enum Outcome {
    /// The delivery only has to be acknowledged.
    Settled,
    /// The message must first go to another queue. [`Attempts::hand_on`] sends it there and ends its span.
    Failed(Failed),
}

/// A message that failed, and what happens to it.
pub struct Failed {
    cx: Context,
    started: Instant,
    reason: &'static str,
    message_id: String,
    attempt: u32,
    fate: Fate,
}

#[derive(Clone, Copy)]
enum Fate {
    /// The message gets another attempt after this time.
    Retry(Duration),
    /// The message gets no further attempt. It is kept with the reason, so that an operator can look at it.
    DeadLetter(&'static str),
}

impl<S> Attempts<S>
where
    S: Service<Login, Response = Processed, Error: Into<BoxError>> + Clone,
{
    /// Finds out how often the message was delivered without a result. The first redelivery is marked on disk
    /// before this function returns, so that the message is a suspect if this delivery has no result either.
    pub async fn redelivered(&self, delivery: &Delivery) -> Redelivered {
        if !delivery.redelivered {
            return Redelivered::No;
        }
        let (_, key) = self.identity(delivery).await;
        match self.history.commit(Change::MarkRedelivery(key)).await {
            Ok(0) => Redelivered::Once,
            Ok(counted) => Redelivered::Suspect { counted },
            // The database will also refuse to count this redelivery, and then the message fails.
            Err(Refused { .. }) => Redelivered::Suspect { counted: 0 },
        }
    }

    /// Processes a delivery in its span. If the future is dropped, the message stays in the queue, and will
    /// be delivered again.
    pub async fn process(&self, delivery: &Delivery, redelivered: Redelivered, chunk: Chunk) -> Outcome {
        let started = Instant::now();
        let (carrier, mobile) = LoginMessage::from_json(&delivery.data);
        let (producer, source) = amqp::extract(delivery.properties.headers().as_ref(), &carrier);
        let producer_span = producer.span().span_context().clone();
        let (message_id, key) = self.identity(delivery).await;
        let attempt = properties::attempt(&delivery.properties);

        let queue = &self.topology.queue;
        let mut attributes = self.broker.consumer_attributes(delivery, queue, source, &message_id);
        attributes.extend([
            KeyValue::new(semconv::MESSAGE_ATTEMPT, i64::from(attempt)),
            KeyValue::new(semconv::CHUNK_SIZE, chunk.size as i64),
            milliseconds(semconv::CHUNK_PAUSE, chunk.pause),
        ]);
        let time_in_spool = properties::time_in_spool(&delivery.properties);
        attributes.extend(time_in_spool.map(|time| KeyValue::new(semconv::MESSAGE_TIME_IN_SPOOL, time)));
        if header(&delivery.properties, HEADERS_LEFT_OUT).is_some() {
            attributes.push(KeyValue::new(semconv::MESSAGE_HEADERS_LEFT_OUT, true));
        }
        let (builder, parent) = self.relation.consumer_span("mq_consumer_msg", producer);
        let mut span = TRACER.build_with_context(builder.with_attributes(attributes), &parent);
        if let Some(published_at) = properties::published_at(&delivery.properties) {
            // By this machine's clock, the time of publishing may be in the future.
            let time = published_at.elapsed().unwrap_or_default();
            span.set_attribute(milliseconds(semconv::MESSAGE_TIME_IN_QUEUE, time));
            METRICS.time_in_queue.record(time.as_secs_f64(), &[]);
        }
        let cx = parent.with_span(span);

        let login = match mobile {
            // Not even the id of the message is known then.
            _ if header(&delivery.properties, UNREADABLE).is_some() => {
                Err(Failure::last("unreadable_properties", "the properties of the message can't be read"))
            }
            _ if header(&delivery.properties, BODY_CUT).is_some() => {
                let text = format!("the body has more than {LONGEST_BODY} bytes");
                Err(Failure::last("body_too_long", text))
            }
            Ok(mobile) => Ok(Login {
                message_id: message_id.clone(),
                trace_id: producer_span.is_valid().then(|| producer_span.trace_id().to_string()),
                mobile,
                attempt,
            }),
            Err(error) => Err(error.into()),
        };
        let processed = async {
            match login {
                Ok(login) => self.call(login, redelivered, key).await,
                Err(failure) => {
                    self.forget(redelivered, key).await?;
                    Err(failure)
                }
            }
        };
        match processed.with_context(cx.clone()).await {
            Ok(processed) => {
                let outcome = match processed {
                    Processed::Applied => "applied",
                    Processed::Duplicate => "duplicate",
                };
                cx.span().set_attribute(KeyValue::new(semconv::MESSAGE_OUTCOME, outcome));
                self.broker.processed(&self.topology.queue, started, None);
                cx.span().end();
                Outcome::Settled
            }
            Err(failure) => Outcome::Failed(self.fail(cx, started, message_id, attempt, &failure)),
        }
    }

    /// Calls the service. The redelivery of a suspect is first counted on disk.
    async fn call(&self, login: Login, redelivered: Redelivered, key: String) -> Result<Processed, Failure> {
        let is_suspect = matches!(redelivered, Redelivered::Suspect { .. });
        if is_suspect && self.history.commit(Change::CountRedelivery(key.clone())).await? > MAX_REDELIVERIES {
            self.forget(redelivered, key).await?;
            return Err(Failure::last("redelivered_too_often", "delivered too often without a result"));
        }
        let called = AssertUnwindSafe(self.processing.clone().oneshot(login)).catch_unwind().await;
        self.forget(redelivered, key).await?;
        match called {
            Ok(processed) => processed.map_err(|error| Failure::of_processing(&*error.into())),
            Err(_) => Err(Failure::passing(semconv::PANIC, "the processing panicked")),
        }
    }

    /// Deletes the count of redeliveries, because this delivery has a result.
    async fn forget(&self, redelivered: Redelivered, key: String) -> Result<(), Refused> {
        match redelivered {
            Redelivered::No => Ok(()),
            Redelivered::Once | Redelivered::Suspect { .. } => {
                self.history.commit(Change::ForgetRedeliveries(key)).await.map(drop)
            }
        }
    }

    /// Returns the message's id, and the key under which its redeliveries are counted. Both are the id that
    /// the producer gave the message. Without such an id, both are derived from the message's content and the
    /// producer's span, which are the same for each delivery. If there is no producer's span either, a second
    /// delivery can't be distinguished from another login, so the id is random, and only the key is derived.
    async fn identity(&self, delivery: &Delivery) -> (String, String) {
        if let Some(id) = own_id(&delivery.properties) {
            return (id.clone(), id);
        }
        let (carrier, _) = LoginMessage::from_json(&delivery.data);
        let (producer, _) = amqp::extract(delivery.properties.headers().as_ref(), &carrier);
        let producer = producer.span().span_context().clone();
        let span = format!("{}-{}", producer.trace_id(), producer.span_id());
        let key = self.history.secret().await.id_of(&[span.as_bytes(), &delivery.data]);
        (if producer.is_valid() { key.clone() } else { Uuid::new_v4().to_string() }, key)
    }

    /// Decides what happens to a message whose attempt failed.
    fn fail(
        &self,
        cx: Context,
        started: Instant,
        message_id: String,
        attempt: u32,
        failure: &Failure,
    ) -> Failed {
        let Failure { reason, text, is_final } = failure;
        let span = cx.span();
        span.set_attribute(KeyValue::new(semconv::ERROR_TYPE, *reason));
        span.set_status(Status::error(text.clone()));

        let _attached = cx.clone().attach();
        // The first attempt is followed by the first delay.
        let delay = usize::try_from(attempt - 1).ok().and_then(|i| self.retry_delays.get(i));
        let fate = match delay.filter(|_| !is_final) {
            Some(delay) => {
                tracing::info!(attempt, reason, ?delay, "an attempt failed, and another will follow: {text}");
                Fate::Retry(*delay)
            }
            None => {
                tracing::warn!(attempt, reason, "dead letter: {text}");
                Fate::DeadLetter(reason)
            }
        };
        Failed { cx: cx.clone(), started, reason, message_id, attempt, fate }
    }

    /// Publishes a failed message to its next queue. After that, the delivery may be acknowledged.
    pub async fn hand_on(&self, delivery: &Delivery, failed: Failed) {
        let Failed { cx, started, reason: error_type, message_id, attempt, fate } = failed;
        let number = |attempt| AMQPValue::LongInt(i32::try_from(attempt).unwrap_or(i32::MAX));
        let (queue, headers) = match fate {
            Fate::Retry(delay) => (self.topology.retry_queue(delay), vec![(ATTEMPT, number(attempt + 1))]),
            Fate::DeadLetter(reason) => {
                let reason = AMQPValue::LongString(reason.into());
                let headers = vec![(DEAD_LETTER_REASON, reason), (DEAD_LETTER_ATTEMPTS, number(attempt))];
                (self.topology.dead_letter_queue.clone(), headers)
            }
        };
        let frame_max = self.forwarder.frame_max();
        let properties = properties::again(&delivery.properties, &message_id, headers, frame_max);
        let published = self.forwarder.publish_until_confirmed(&queue, &properties, &delivery.data);
        published.with_context(cx.clone()).await;

        let span = cx.span();
        self.broker.processed(&self.topology.queue, started, Some(error_type));
        let reason = [KeyValue::new(semconv::ERROR_TYPE, error_type)];
        match fate {
            Fate::Retry(delay) => {
                METRICS.retries.add(1, &reason);
                span.set_attribute(KeyValue::new(semconv::MESSAGE_OUTCOME, "retry"));
                span.set_attribute(milliseconds(semconv::MESSAGE_RETRY_DELAY, delay));
            }
            Fate::DeadLetter(_) => {
                METRICS.dead_letters.add(1, &reason);
                span.set_attribute(KeyValue::new(semconv::MESSAGE_OUTCOME, "dead_letter"));
            }
        }
        span.end();
    }
}

/// Returns the id that the message's producer gave it.
pub fn own_id(properties: &BasicProperties) -> Option<String> {
    properties.message_id().as_ref().map(ToString::to_string).filter(|id| !id.is_empty())
}

fn milliseconds(key: &'static str, duration: Duration) -> KeyValue {
    KeyValue::new(key, i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
