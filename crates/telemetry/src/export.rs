//! Wraps the SDK's batch processor and any exporter, to count exactly what happens to each span.
//!
//! The SDK drops spans silently, and its exporters report one result for a whole batch. So two wrappers do
//! the counting. When a sampled span ends, [`AccountedProcessor`] counts it. If there is room, it hands the
//! span to the SDK's [`BatchSpanProcessor`], whose thread collects batches and gives each one to
//! [`AccountedExporter`]. That wrapper sends the batch through the published exporter, again and again until
//! the receiver accepts or refuses it, or until `OTEL_BSP_EXPORT_TIMEOUT` has passed. Spans in the queue and
//! in flight are waiting, so at every moment ended = exported + dropped + waiting.
//!
//! ```text
//! span ends ──▶ in the queue ──▶ in flight ──▶ exported
//!      │                             ├───────▶ dropped: rejected (the receiver refused it permanently)
//!      │                             └───────▶ dropped: not_sent (no success in time)
//!      └──▶ dropped: queue_full
//! ```
//!
//! Metrics and log records are not counted, but [`Guarded`] logs the same warnings for their exporters.

use crate::{clock::Clock, config::BatchConfig, outage::Outage};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value, trace::Span as _};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    logs::{LogBatch, LogExporter},
    metrics::{Temporality, data::ResourceMetrics, exporter::PushMetricExporter},
    trace::{BatchConfigBuilder, BatchSpanProcessor, Span, SpanData, SpanExporter, SpanProcessor},
};
use std::{
    future::pending,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};
use tokio::{
    runtime::{Builder, Handle},
    sync::watch,
    time::{Instant, timeout},
};

/// The maximum size of all waiting spans together, in bytes (an estimate).
const MAX_WAITING_BYTES: usize = 16 * 1024 * 1024;

/// The most bytes in one request. A larger batch is sent in parts, because collectors commonly refuse
/// messages above 4 MiB.
const MAX_REQUEST_BYTES: usize = 1024 * 1024;

/// The pause before a batch is sent again. It doubles after each attempt, up to [`MAX_PAUSE`]. During
/// shutdown it does not grow. (An attempt includes the exporter's own retries, which take about a second.)
const PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// How many spans have ended, and what happened to them. Each span was exported, was dropped, or is waiting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpanCounts {
    /// Sampled spans that ended.
    pub ended: u64,
    /// Spans that the receiver accepted.
    pub exported: u64,
    /// Spans in a request that has no answer yet. They count as waiting.
    pub in_flight: u64,
    /// Spans that were dropped, by reason.
    pub dropped: DroppedSpans,
}

/// How many spans were dropped for each reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DroppedSpans {
    /// Spans for which the queue had no room.
    pub queue_full: u64,
    /// Spans that could not be sent in time, or before the process ended.
    pub not_sent: u64,
    /// Spans that the receiver refused permanently.
    pub rejected: u64,
}

impl SpanCounts {
    /// Returns the number of spans that are queued or being sent.
    pub fn waiting(&self) -> u64 {
        self.ended - self.exported - self.dropped.total()
    }
}

impl DroppedSpans {
    /// Returns the number of spans that were dropped for any reason.
    pub fn total(&self) -> u64 {
        self.queue_full + self.not_sent + self.rejected
    }
}

/// The counts of one exporter's spans.
#[derive(Debug)]
pub(crate) struct Account {
    pub max_queue_size: usize,
    /// The counts are under one lock, so that they agree at any moment.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: SpanCounts,
    waiting_bytes: usize,
}

impl Account {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn counts(&self) -> SpanCounts {
        self.lock().counts
    }

    /// Counts a span that ended. Returns false if there is no room for it.
    fn admit(&self, bytes: usize) -> bool {
        let mut state = self.lock();
        let is_full = state.counts.waiting() >= self.max_queue_size as u64
            || state.waiting_bytes + bytes > MAX_WAITING_BYTES;
        state.counts.ended += 1;
        if is_full {
            state.counts.dropped.queue_full += 1;
        } else {
            state.waiting_bytes += bytes;
        }
        !is_full
    }

    fn begin(&self, spans: usize) {
        self.lock().counts.in_flight += spans as u64;
    }

    fn settle(&self, spans: usize, bytes: usize, outcome: Outcome) {
        let mut state = self.lock();
        state.waiting_bytes = state.waiting_bytes.saturating_sub(bytes);
        let (spans, counts) = (spans as u64, &mut state.counts);
        counts.in_flight -= spans;
        match outcome {
            Outcome::Exported { rejected } => {
                let rejected = rejected.min(spans);
                counts.exported += spans - rejected;
                counts.dropped.rejected += rejected;
            }
            Outcome::Rejected => counts.dropped.rejected += spans,
            Outcome::NotSent => counts.dropped.not_sent += spans,
        }
    }
}

enum Outcome {
    Exported { rejected: u64 },
    Rejected,
    NotSent,
}

/// Starts a runtime of one thread for the exporters' connections. The runtime lives as long as the process.
/// On the service's own runtime, encoding and sending a batch would delay the requests that run there.
///
/// # Errors
/// If the system can't provide a thread or an event queue.
pub(crate) fn connections() -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let connections = move || {
        let_requests_pass();
        runtime.block_on(pending::<()>());
    };
    thread::Builder::new().name("OpenTelemetry.Connections".into()).spawn(connections)?;
    Ok(handle)
}

/// Lowers the priority of this thread, once. If all cores are busy, batches then wait instead of requests.
fn let_requests_pass() {
    thread_local!(static LOWERED: () = {
        // On Linux, `nice` affects only this thread. Elsewhere, it would affect the whole process.
        #[cfg(target_os = "linux")]
        let _ = rustix::process::nice(10);
    });
    LOWERED.with(|()| ());
}

/// Makes a processor that sends spans through `exporter`, and the handle that shuts it down. Call this
/// function on the runtime that drives the exporter's connections.
pub(crate) fn start<E: SpanExporter + 'static>(
    mut exporter: E,
    outage: Outage,
    resource: &Resource,
    config: BatchConfig,
    value_length_limit: Option<usize>,
) -> (AccountedProcessor, Export) {
    exporter.set_resource(resource);
    let account = Arc::new(Account { max_queue_size: config.max_queue_size, state: Mutex::default() });
    let (closing, closed) = watch::channel(None);
    let exporter = AccountedExporter {
        exporter,
        account: account.clone(),
        outage,
        limit: config.export_timeout,
        closing: closed,
        runtime: Handle::current(),
    };
    let config = BatchConfigBuilder::default()
        .with_scheduled_delay(config.schedule_delay)
        .with_max_queue_size(config.max_queue_size)
        .with_max_export_batch_size(config.max_export_batch_size)
        .build();
    let batches = Arc::new(BatchSpanProcessor::builder(exporter).with_batch_config(config).build());
    let processor = AccountedProcessor {
        account: account.clone(),
        batches: batches.clone(),
        value_length_limit,
        clock: Clock::default(),
    };
    (processor, Export { account, batches, closing })
}

/// Shuts an exporter down. The tracer provider could also do this, but it shuts exporters down one after the
/// other, so an exporter that gets no answer would use up the others' time.
pub(crate) struct Export {
    pub account: Arc<Account>,
    batches: Arc<BatchSpanProcessor>,
    closing: watch::Sender<Option<Instant>>,
}

impl Export {
    /// Sends the waiting spans, and blocks for at most `limit`. A receiver that is unavailable may come back
    /// within that time.
    pub fn shut_down(&self, limit: Duration) {
        self.closing.send_replace(Some(Instant::now() + limit));
        // Spans that could not be sent still count as waiting in the account.
        let _ = self.batches.shutdown_with_timeout(limit);
    }
}

/// Receives the spans from the SDK when they end.
#[derive(Debug)]
pub(crate) struct AccountedProcessor {
    account: Arc<Account>,
    batches: Arc<BatchSpanProcessor>,
    value_length_limit: Option<usize>,
    clock: Clock,
}

impl SpanProcessor for AccountedProcessor {
    fn on_start(&self, span: &mut Span, _cx: &Context) {
        self.clock.started(span.span_context().span_id());
    }

    fn on_end(&self, mut span: SpanData) {
        self.clock.ended(&mut span);
        if !span.span_context.is_sampled() {
            return;
        }
        if let Some(max_chars) = self.value_length_limit {
            attributes(&mut span).for_each(|attribute| shorten(&mut attribute.value, max_chars));
        }
        if self.account.admit(size(&span)) {
            self.batches.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    /// Does nothing, because [`Export::shut_down`] has already done the work when the SDK calls this
    /// function.
    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Cuts a string value to `max_chars` characters, because the SDK has no limit on the length of values
/// (specification, "Attribute Limits").
fn shorten(value: &mut Value, max_chars: usize) {
    fn shorten(text: &mut StringValue, max_chars: usize) {
        if let Some((end, _)) = text.as_str().char_indices().nth(max_chars) {
            *text = text.as_str()[..end].to_owned().into();
        }
    }
    match value {
        Value::String(text) => shorten(text, max_chars),
        Value::Array(Array::String(texts)) => texts.iter_mut().for_each(|text| shorten(text, max_chars)),
        _ => {}
    }
}

fn attributes(span: &mut SpanData) -> impl Iterator<Item = &mut KeyValue> {
    let events = span.events.events.iter_mut().flat_map(|event| event.attributes.iter_mut());
    let links = span.links.links.iter_mut().flat_map(|link| link.attributes.iter_mut());
    span.attributes.iter_mut().chain(events).chain(links)
}

/// Estimates how many bytes a span takes, in memory and on the wire.
fn size(span: &SpanData) -> usize {
    const SPAN: usize = 400;
    const ATTRIBUTE: usize = 64;

    let attribute = |attribute: &KeyValue| {
        ATTRIBUTE
            + match &attribute.value {
                Value::String(text) => text.as_str().len(),
                Value::Array(array) => array.to_string().len(),
                _ => 0,
            }
    };
    let events = span.events.events.iter().flat_map(|event| &event.attributes);
    let links = span.links.links.iter().flat_map(|link| &link.attributes);
    let parts = span.events.events.len() + span.links.links.len();
    SPAN + parts * SPAN / 2 + span.attributes.iter().chain(events).chain(links).map(attribute).sum::<usize>()
}

/// Sends batches on the thread of the SDK's batch processor.
#[derive(Debug)]
struct AccountedExporter<E> {
    exporter: E,
    account: Arc<Account>,
    outage: Outage,
    /// The longest time for one batch, with all its attempts.
    limit: Duration,
    /// The time when sending must stop, which is known once the shutdown has begun.
    closing: watch::Receiver<Option<Instant>>,
    runtime: Handle,
}

impl<E: SpanExporter> SpanExporter for AccountedExporter<E> {
    /// Counts and logs the outcome, and always returns `Ok`, so that the SDK logs nothing more.
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        while !batch.is_empty() {
            let (mut count, mut bytes) = (0, 0);
            for size in batch.iter().map(size) {
                if count > 0 && bytes + size > MAX_REQUEST_BYTES {
                    break;
                }
                (count, bytes) = (count + 1, bytes + size);
            }
            let rest = batch.split_off(count);
            self.account.begin(count);
            let outcome = self.send(batch);
            self.account.settle(count, bytes, outcome);
            batch = rest;
        }
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }
}

impl<E: SpanExporter> AccountedExporter<E> {
    fn send(&self, batch: Vec<SpanData>) -> Outcome {
        let start = Instant::now();
        let mut pause = PAUSE;
        loop {
            let left = self.time_left(start);
            if left.is_zero() {
                return Outcome::NotSent;
            }
            let result = on_runtime(&self.runtime, left, self.exporter.export(batch.clone()));
            let dropped = self.account.counts().dropped.total();
            match result {
                Ok(()) => return Outcome::Exported { rejected: self.outage.over(dropped) },
                Err(error) if self.outage.failed(&error, dropped) => return Outcome::Rejected,
                Err(_) => {}
            }
            let mut closing = self.closing.clone();
            let is_closing = closing.borrow().is_some();
            pause = if is_closing { PAUSE } else { pause };
            if pause >= self.time_left(start) {
                return Outcome::NotSent;
            }
            // The actual pause is between half and all of `pause`, so that services don't retry at the same
            // moment. It ends early when the shutdown begins.
            let pausing = pause.mul_f64(0.5 + 0.5 * fastrand::f64());
            let _ = on_runtime(&self.runtime, pausing, async {
                let _ = closing.wait_for(|closing| closing.is_some() && !is_closing).await;
                Ok(())
            });
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Returns how long a batch that was first sent at `start` may still take.
    fn time_left(&self, start: Instant) -> Duration {
        let left = self.limit.saturating_sub(start.elapsed());
        let closing = *self.closing.borrow();
        closing.map_or(left, |end| left.min(end.saturating_duration_since(Instant::now())))
    }
}

/// Runs `future` on this thread for at most `limit`, with the timers and sockets of the runtime. A panic in
/// `future` becomes an error, because a panic would end the thread, and therefore all exports. (tonic 0.14.9
/// panics when the details of a status are not base64, and `println!` when standard output is closed.)
fn on_runtime(
    runtime: &Handle,
    limit: Duration,
    future: impl Future<Output = OTelSdkResult>,
) -> OTelSdkResult {
    let_requests_pass();
    let result = catch_unwind(AssertUnwindSafe(|| runtime.block_on(async { timeout(limit, future).await })));
    result
        .map_err(|_| OTelSdkError::InternalFailure("the exporter panicked".into()))?
        .map_err(|_| OTelSdkError::Timeout(limit))?
}

/// An exporter of metrics or log records whose failures are logged at most once a minute.
#[derive(Debug)]
pub(crate) struct Guarded<E> {
    exporter: E,
    outage: Outage,
    /// The longest time for one export, with the exporter's own retries.
    limit: Duration,
    runtime: Handle,
}

impl<E> Guarded<E> {
    /// Wraps an exporter. Call this function on the runtime that drives the exporter's connections.
    pub fn new(exporter: E, outage: Outage, limit: Duration) -> Self {
        Self { exporter, outage, limit, runtime: Handle::current() }
    }

    fn guard(&self, export: impl Future<Output = OTelSdkResult>) -> OTelSdkResult {
        match on_runtime(&self.runtime, self.limit, export) {
            Ok(()) => _ = self.outage.over(0),
            Err(error) => _ = self.outage.failed(&error, 0),
        }
        Ok(())
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Guarded<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.guard(self.exporter.export(metrics))
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

impl<E: LogExporter> LogExporter for Guarded<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        self.guard(self.exporter.export(batch))
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
