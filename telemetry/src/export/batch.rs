//! The queue of ended spans, and the task that sends it in batches.
//!
//! The SDK's `BatchSpanProcessor` queues its own structures to a thread that converts them. Here
//! spans are encoded where they end, and a task of the runtime sends them: shutdown can be awaited,
//! and every span is accounted for.

use super::{
    otlp,
    transport::{Retry, SendError, Transport},
    zipkin,
};
use crate::config::BatchConfig;
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{Span, SpanData, SpanProcessor},
};
use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as blocking},
    time::Duration,
};
use tokio::{
    select,
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

/// A batch is sent before it grows beyond this, whatever the number of its spans: collectors commonly
/// refuse messages above 4 MiB.
const MAX_BATCH_BYTES: usize = 1024 * 1024;

/// The queue holds at most so much, whatever the number of its spans.
const MAX_QUEUE_BYTES: usize = 16 * 1024 * 1024;

/// While the other side is away, one line in this time says so.
const WARN_EVERY: Duration = Duration::from_secs(60);

const BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// How a span is written, and how many make a request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Format {
    Otlp,
    Zipkin,
}

/// What became of the spans that ended: each was exported, or dropped, or is waiting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpanCounts {
    /// Sampled spans that ended.
    pub ended: u64,
    /// Spans that the other side took.
    pub exported: u64,
    /// Spans given up.
    pub dropped: DroppedSpans,
}

/// Why spans were given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DroppedSpans {
    /// There was no room in the queue.
    pub queue_full: u64,
    /// The other side was away for too long, or until the end of the process.
    pub not_sent: u64,
    /// The other side refused them for good.
    pub rejected: u64,
}

impl SpanCounts {
    /// Spans that are queued or being sent.
    pub fn waiting(&self) -> u64 {
        self.ended - self.exported - self.dropped.total()
    }
}

impl DroppedSpans {
    /// For whatever reason.
    pub fn total(&self) -> u64 {
        self.queue_full + self.not_sent + self.rejected
    }
}

/// Takes the spans from the SDK.
#[derive(Debug)]
pub(crate) struct BatchProcessor {
    queue: Arc<Queue>,
    flush: mpsc::UnboundedSender<blocking::Sender<()>>,
}

/// Held by whoever shuts down.
pub(crate) struct BatchExport {
    queue: Arc<Queue>,
    closing: watch::Sender<bool>,
    worker: JoinHandle<()>,
}

/// Starts the export of spans through `transport`; needs a tokio runtime.
pub(crate) fn start(
    format: Format,
    transport: Transport,
    resource: Resource,
    config: BatchConfig,
) -> (BatchProcessor, BatchExport) {
    let queue =
        Arc::new(Queue { format, resource, config, spans: Mutex::default(), batch_is_full: Notify::new() });
    let (flush, flushes) = mpsc::unbounded_channel();
    let (closing, closed) = watch::channel(false);
    let worker = Worker { queue: queue.clone(), transport, closed, outage: None, warned: None };
    let worker = tokio::spawn(worker.run(flushes));
    (BatchProcessor { queue: queue.clone(), flush }, BatchExport { queue, closing, worker })
}

impl SpanProcessor for BatchProcessor {
    fn on_start(&self, _span: &mut Span, _cx: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() {
            self.queue.push(&span);
        }
    }

    /// Blocks, so it is not for async code: there, shut [`crate::Telemetry`] down.
    fn force_flush(&self) -> OTelSdkResult {
        let (done, flushed) = blocking::channel();
        let limit = self.queue.config.export_timeout;
        self.flush.send(done).map_err(|_| OTelSdkError::AlreadyShutdown)?;
        flushed.recv_timeout(limit).map_err(|_| OTelSdkError::Timeout(limit))
    }

    /// [`BatchExport::shut_down`] has done the work before the SDK calls this.
    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl BatchExport {
    /// From now on what is queued is sent, without waiting for retries.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Closes, and waits until everything is sent, or until `deadline`; the rest is dropped.
    pub async fn shut_down(mut self, deadline: Instant) -> SpanCounts {
        self.close();
        if timeout_at(deadline, &mut self.worker).await.is_err() {
            self.worker.abort();
        }
        let mut counts = self.queue.counts();
        counts.dropped.not_sent += counts.waiting();
        counts
    }

    pub fn queue(&self) -> Arc<Queue> {
        self.queue.clone()
    }
}

/// Where encoded spans wait, and where all are counted.
#[derive(Debug)]
pub(crate) struct Queue {
    format: Format,
    resource: Resource,
    config: BatchConfig,
    spans: Mutex<Spans>,
    batch_is_full: Notify,
}

#[derive(Debug, Default)]
struct Spans {
    full: VecDeque<Batch>,
    filling: Batch,
    /// Totals over all batches.
    count: usize,
    bytes: usize,
    /// Under the same lock as the queue, so that they agree at any moment.
    counts: SpanCounts,
}

/// Encoded spans, by the scope that made them.
#[derive(Debug, Default)]
struct Batch {
    groups: Vec<(InstrumentationScope, Vec<u8>)>,
    count: usize,
    bytes: usize,
}

impl Queue {
    fn push(&self, span: &SpanData) {
        thread_local! {
            /// Encoding happens outside of the lock; under it, the bytes are only copied.
            static ENCODED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        ENCODED.with_borrow_mut(|encoded| {
            encoded.clear();
            encoded.shrink_to(MAX_BATCH_BYTES);
            let max_chars = self.config.value_length_limit;
            match self.format {
                Format::Otlp => otlp::encode_span(encoded, span, max_chars),
                Format::Zipkin => zipkin::encode_span(encoded, &self.resource, span, max_chars),
            }
            self.push_encoded(&span.instrumentation_scope, encoded);
        });
    }

    fn push_encoded(&self, scope: &InstrumentationScope, encoded: &[u8]) {
        let mut spans = self.lock();
        spans.counts.ended += 1;
        if spans.count >= self.config.max_queue_size || spans.bytes + encoded.len() > MAX_QUEUE_BYTES {
            spans.counts.dropped.queue_full += 1;
            return;
        }
        spans.count += 1;
        spans.bytes += encoded.len();
        spans.filling.push(scope, encoded);
        let Batch { count, bytes, .. } = spans.filling;
        if count >= self.config.max_export_batch_size || bytes >= MAX_BATCH_BYTES {
            let full = std::mem::take(&mut spans.filling);
            spans.full.push_back(full);
            self.batch_is_full.notify_one();
        }
    }

    /// The next batch; one that is not full yet only if asked for.
    fn pop(&self, also_filling: bool) -> Option<Batch> {
        let mut spans = self.lock();
        let batch = match spans.full.pop_front() {
            None if also_filling && spans.filling.count > 0 => std::mem::take(&mut spans.filling),
            full => full?,
        };
        spans.count -= batch.count;
        spans.bytes -= batch.bytes;
        Some(batch)
    }

    /// What became of the spans so far.
    pub fn counts(&self) -> SpanCounts {
        self.lock().counts
    }

    /// The exporter's name in `OTEL_TRACES_EXPORTER`.
    pub fn exporter(&self) -> &'static str {
        match self.format {
            Format::Otlp => "otlp",
            Format::Zipkin => "zipkin",
        }
    }

    fn lock(&self) -> MutexGuard<'_, Spans> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Batch {
    fn push(&mut self, scope: &InstrumentationScope, encoded: &[u8]) {
        self.count += 1;
        self.bytes += encoded.len();
        match self.groups.iter_mut().find(|(known, _)| known == scope) {
            Some((_, group)) => group.extend_from_slice(encoded),
            None => self.groups.push((scope.clone(), encoded.to_vec())),
        }
    }
}

struct Worker {
    queue: Arc<Queue>,
    transport: Transport,
    closed: watch::Receiver<bool>,
    outage: Option<Outage>,
    /// When there was a warning last, of whatever kind.
    warned: Option<Instant>,
}

/// The other side is away.
#[derive(Default)]
struct Outage {
    is_told: bool,
    dropped: u64,
}

impl Worker {
    async fn run(mut self, mut flushes: mpsc::UnboundedReceiver<blocking::Sender<()>>) {
        let delay = self.queue.config.schedule_delay.max(Duration::from_millis(1));
        let mut due = Instant::now() + delay;
        loop {
            let queue = self.queue.clone();
            let mut closed = self.closed.clone();
            let mut flushed = None;
            let mut is_closed = false;
            let also_filling = select! {
                () = queue.batch_is_full.notified() => false,
                () = sleep_until(due) => true,
                Some(done) = flushes.recv() => { flushed = Some(done); true }
                // Nobody is left to close it: that is the end, too.
                _ = closed.wait_for(|closed| *closed) => { is_closed = true; true }
            };
            while let Some(batch) = self.queue.pop(also_filling) {
                self.export(batch).await;
            }
            if also_filling {
                due = Instant::now() + delay;
            }
            if let Some(done) = flushed {
                // Nobody may be waiting any more.
                let _ = done.send(());
            }
            if is_closed {
                return;
            }
        }
    }

    async fn export(&mut self, batch: Batch) {
        let count = batch.count as u64;
        let body = match self.queue.format {
            Format::Otlp => otlp::encode_request(&self.queue.resource, &batch.groups),
            Format::Zipkin => zipkin::encode_request(batch.groups.iter().map(|(_, spans)| spans.as_slice())),
        };
        drop(batch);
        let limit = self.queue.config.export_timeout;
        match timeout(limit, self.send_with_retries(body.into())).await {
            Ok(Some(rejected)) => {
                let rejected = rejected.min(count);
                let counts = &mut self.queue.lock().counts;
                counts.exported += count - rejected;
                counts.dropped.rejected += rejected;
            }
            given_up => {
                if given_up.is_err() {
                    self.away("no success within OTEL_BSP_EXPORT_TIMEOUT");
                }
                self.queue.lock().counts.dropped.not_sent += count;
                if let Some(outage) = &mut self.outage {
                    outage.dropped += count;
                }
            }
        }
    }

    /// How many spans were rejected, `u64::MAX` for all; `None` if the batch is given up.
    async fn send_with_retries(&mut self, body: bytes::Bytes) -> Option<u64> {
        let mut backoff = BACKOFF;
        loop {
            let SendError { reason, retry } = match self.transport.send(body.clone()).await {
                Ok(answer) => {
                    if let Some(Outage { is_told: true, dropped }) = self.outage.take() {
                        tracing::info!(dropped, "spans are exported again");
                    }
                    if answer.rejected > 0 && self.may_warn() {
                        tracing::warn!(
                            rejected = answer.rejected,
                            reason = answer.message,
                            "spans were rejected; at most one warning a minute"
                        );
                    }
                    return Some(answer.rejected);
                }
                Err(error) => error,
            };
            let delay = match retry {
                Retry::Never => {
                    if self.may_warn() {
                        tracing::warn!(reason, "spans were rejected; at most one warning a minute");
                    }
                    return Some(u64::MAX);
                }
                // Zero is legal, and would be a loop without a pause.
                Retry::After(delay) => delay.max(BACKOFF),
                // Between half and all of it, so that services don't come back in step.
                Retry::Later => backoff.mul_f64(0.5 + 0.5 * fastrand::f64()),
            };
            self.away(&reason);
            backoff = (backoff * 2).min(MAX_BACKOFF);
            select! {
                () = sleep(delay) => {}
                _ = self.closed.wait_for(|closed| *closed) => return None,
            }
        }
    }

    /// The other side can't be reached, or takes nothing now.
    fn away(&mut self, reason: &str) {
        let may_warn = self.may_warn();
        let outage = self.outage.get_or_insert_default();
        if may_warn {
            outage.is_told = true;
            let dropped = outage.dropped;
            tracing::warn!(
                reason,
                dropped,
                "spans can't be exported; trying on, at most one warning a minute"
            );
        }
    }

    /// Whether the last warning is long enough ago for another one.
    fn may_warn(&mut self) -> bool {
        let may = self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY);
        if may {
            self.warned = Some(Instant::now());
        }
        may
    }
}
