//! The bounded store of spans by trace, and of log records. When it is full, it evicts the oldest trace.
//!
//! A query gets a snapshot (`Arc`s), so that a long search never delays incoming spans.

use super::{
    ids::{SpanId, TraceId},
    logs::{LogStatistics, Logs, StoredRecord, stored_records},
    spans::{DecodedSpan, Rejected, StoredSpan, stored_spans},
};
use opentelemetry_proto::tonic::collector::{
    logs::v1::ExportLogsServiceRequest, trace::v1::ExportTraceServiceRequest,
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    mem::size_of,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tokio::sync::broadcast;

/// The approximate memory of a trace's entries in the store's tables, in bytes.
const TRACE_BYTES: usize = size_of::<Trace>() + 160;

/// How much the store may hold. Beyond these limits, the oldest traces are evicted. No trace may take more
/// than a quarter of a limit. Log records have the same limits, counted separately.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest number of spans.
    pub spans: usize,
    /// The largest memory of all spans together, in bytes.
    pub bytes: usize,
}

/// Allows 200,000 spans and 256 MiB.
impl Default for Limits {
    fn default() -> Self {
        Self { spans: 200_000, bytes: 256 * 1024 * 1024 }
    }
}

impl Limits {
    /// Returns how many spans a trace, or a response, may have at most.
    pub(super) fn spans_of_a_trace(&self) -> usize {
        (self.spans / 4).max(1)
    }

    pub(super) fn bytes_of_a_trace(&self) -> usize {
        self.bytes / 4
    }
}

/// How much is stored, and what happened to everything else that was received.
#[derive(Debug, Clone, Copy, Default)]
pub struct Statistics {
    /// Traces stored.
    pub traces: usize,
    /// Spans stored.
    pub spans: usize,
    /// The memory of the stored spans, in bytes.
    pub bytes: usize,
    /// Spans received so far.
    pub received: u64,
    /// Received spans that were not stored, because they were stored already.
    pub duplicates: u64,
    /// Received spans that were refused, because an id is invalid, or because the trace, the resource or the
    /// scope is too large.
    pub rejected: u64,
    /// Received spans that were stored and later evicted with their trace, to make room.
    pub evicted: u64,
    /// The same counts for log records.
    pub logs: LogStatistics,
    /// Data points of metrics received so far, none of which is stored.
    pub data_points: u64,
}

/// The store of all traces.
pub(super) struct Store {
    contents: Mutex<Contents>,
    logs: Mutex<Logs>,
    data_points: AtomicU64,
    limits: Limits,
    changes: broadcast::Sender<String>,
    page_changes: broadcast::Sender<String>,
}

#[derive(Default)]
struct Contents {
    traces: HashMap<TraceId, Arc<Trace>>,
    /// The traces in the order in which their first spans arrived, oldest first.
    order: VecDeque<TraceId>,
    statistics: Statistics,
}

/// The spans of a trace that have arrived so far.
#[derive(Clone)]
pub(super) struct Trace {
    pub id: TraceId,
    /// The earliest start, in nanoseconds since 1970.
    pub start: u64,
    /// The latest end, in nanoseconds since 1970.
    pub end: u64,
    spans: HashMap<SpanId, Arc<StoredSpan>>,
    bytes: usize,
}

impl Store {
    pub fn new(limits: Limits) -> Self {
        let (changes, _) = broadcast::channel(4096);
        let (page_changes, _) = broadcast::channel(4096);
        let (contents, logs) = Default::default();
        Self { contents, logs, data_points: AtomicU64::new(0), limits, changes, page_changes }
    }

    /// Returns the trace as it is now.
    pub fn trace(&self, id: TraceId) -> Option<Arc<Trace>> {
        self.lock().traces.get(&id).cloned()
    }

    /// Returns all traces as they are now, in no particular order.
    pub fn traces(&self) -> Vec<Arc<Trace>> {
        self.lock().traces.values().cloned().collect()
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn statistics(&self) -> Statistics {
        let logs = self.lock_logs().statistics();
        let data_points = self.data_points.load(Relaxed);
        let contents = self.lock();
        Statistics { traces: contents.traces.len(), logs, data_points, ..contents.statistics }
    }

    /// Returns the log records of a trace, in the order of their arrival.
    pub fn logs(&self, id: TraceId) -> Vec<Arc<StoredRecord>> {
        self.lock_logs().of_trace(id)
    }

    /// Returns a channel that yields a trace's id whenever the trace gets spans.
    pub fn changes(&self) -> broadcast::Receiver<String> {
        self.changes.subscribe()
    }

    /// Returns a channel that yields a trace's id whenever the trace gets a log record, or a span of another
    /// trace links to it.
    pub fn page_changes(&self) -> broadcast::Receiver<String> {
        self.page_changes.subscribe()
    }

    /// Stores the spans that are valid and new.
    pub fn insert(&self, request: ExportTraceServiceRequest) -> Rejected {
        let mut rejected = Rejected::default();
        let spans = stored_spans(request, &mut rejected);
        let (mut changed, mut linked) = (HashSet::new(), HashSet::new());
        let evicted = {
            let mut contents = self.lock();
            for (id, span) in spans {
                linked.extend(span.links.iter().map(|(trace_id, _)| *trace_id));
                if contents.insert(id, span, self.limits, &mut rejected) {
                    changed.insert(id);
                }
            }
            contents.statistics.received += rejected.count;
            contents.statistics.rejected += rejected.count;
            linked.retain(|id| contents.traces.contains_key(id));
            contents.evict(self.limits)
        };
        // Dropping the evicted traces frees thousands of allocations, so it happens outside of the lock.
        drop(evicted);
        tell(&self.changes, changed);
        tell(&self.page_changes, linked);
        rejected
    }

    /// Stores the log records that were written in a trace.
    pub fn insert_logs(&self, request: ExportLogsServiceRequest) -> Rejected {
        let mut rejected = Rejected::default();
        let records = stored_records(request);
        let changed = self.lock_logs().insert(records, self.limits, &mut rejected);
        tell(&self.page_changes, changed);
        rejected
    }

    /// Counts data points that were received. They are not stored, because the backend doesn't show metrics.
    pub fn count_data_points(&self, count: usize) {
        self.data_points.fetch_add(count as u64, Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_logs(&self) -> MutexGuard<'_, Logs> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tell(changes: &broadcast::Sender<String>, changed: HashSet<TraceId>) {
    if changes.receiver_count() > 0 {
        for id in changed {
            let _ = changes.send(id.to_string());
        }
    }
}

impl Contents {
    /// Stores the span. Returns false if the span was already stored, or is rejected.
    fn insert(&mut self, id: TraceId, span: StoredSpan, limits: Limits, rejected: &mut Rejected) -> bool {
        let trace = self.traces.get(&id);
        if trace.is_some_and(|trace| trace.spans.contains_key(&span.id)) {
            self.statistics.received += 1;
            self.statistics.duplicates += 1;
            return false;
        }
        let (spans, bytes) = trace.map_or((0, TRACE_BYTES), |trace| (trace.spans.len(), trace.bytes));
        if spans >= limits.spans_of_a_trace() || bytes + span.bytes > limits.bytes_of_a_trace() {
            rejected.add("its trace already takes a quarter of the store");
            return false;
        }
        let trace = self.traces.entry(id).or_insert_with(|| {
            self.order.push_back(id);
            self.statistics.bytes += TRACE_BYTES;
            Arc::new(Trace { id, start: u64::MAX, end: 0, spans: HashMap::new(), bytes: TRACE_BYTES })
        });
        self.statistics.received += 1;
        self.statistics.spans += 1;
        self.statistics.bytes += span.bytes + span.resource.acquire() + span.scope.acquire();
        // If a query is holding a snapshot of the trace, this call copies the trace's table.
        let trace = Arc::make_mut(trace);
        trace.start = trace.start.min(span.start);
        trace.end = trace.end.max(span.end);
        trace.bytes += span.bytes;
        trace.spans.insert(span.id, Arc::new(span));
        true
    }

    fn evict(&mut self, limits: Limits) -> Vec<Arc<Trace>> {
        let mut evicted = Vec::new();
        while self.statistics.spans > limits.spans || self.statistics.bytes > limits.bytes {
            let Some(trace) = self.order.pop_front().and_then(|id| self.traces.remove(&id)) else {
                break;
            };
            self.statistics.spans -= trace.spans.len();
            self.statistics.evicted += trace.spans.len() as u64;
            self.statistics.bytes -= trace.bytes;
            for span in trace.spans.values() {
                self.statistics.bytes -= span.resource.release() + span.scope.release();
            }
            evicted.push(trace);
        }
        evicted
    }
}

impl Trace {
    /// Returns the trace's spans, in no particular order.
    pub fn spans(&self) -> impl ExactSizeIterator<Item = &StoredSpan> {
        self.spans.values().map(|span| &**span)
    }

    /// Returns the trace's spans, ordered by their start.
    pub fn decoded(&self) -> Vec<DecodedSpan<'_>> {
        let mut spans: Vec<_> = self.spans().collect();
        spans.sort_unstable_by_key(|span| (span.start, span.id));
        spans.into_iter().map(StoredSpan::decoded).collect()
    }

    pub fn span(&self, id: SpanId) -> Option<&StoredSpan> {
        self.spans.get(&id).map(|span| &**span)
    }

    /// Returns the nanoseconds from the first start to the last end.
    pub fn duration(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::{
        resource::v1,
        trace::v1::{ResourceSpans, ScopeSpans, Span},
    };
    use proptest::prelude::*;

    fn request(spans: &[(u8, u8)]) -> ExportTraceServiceRequest {
        let spans = spans.iter().map(|(trace, id)| Span {
            trace_id: vec![*trace; 16],
            span_id: vec![*id; 8],
            name: "x".repeat(usize::from(*id)),
            ..Span::default()
        });
        let scope_spans = vec![ScopeSpans { spans: spans.collect(), ..ScopeSpans::default() }];
        let resource = v1::Resource { dropped_attributes_count: 1, ..v1::Resource::default() };
        let resource_spans =
            vec![ResourceSpans { resource: Some(resource), scope_spans, ..ResourceSpans::default() }];
        ExportTraceServiceRequest { resource_spans }
    }

    proptest! {
        #[test]
        fn whatever_comes_all_of_it_is_accounted_for(
            requests in prop::collection::vec(prop::collection::vec((0..9u8, 0..9u8), 0..20), 0..20),
            spans in 1..100usize,
        ) {
            let store = Store::new(Limits { spans, bytes: 20_000 });
            for spans in &requests {
                // The snapshot makes the next insertion copy the trace's table.
                let _snapshot = store.traces();
                store.insert(request(spans));
            }
            let Statistics { spans: stored, bytes, received, duplicates, rejected, evicted, .. } =
                store.statistics();
            prop_assert!(stored <= spans && bytes <= 20_000);
            prop_assert_eq!(stored, store.traces().iter().map(|trace| trace.spans().len()).sum::<usize>());
            prop_assert_eq!(received, requests.iter().map(|spans| spans.len() as u64).sum::<u64>());
            prop_assert_eq!(received, stored as u64 + duplicates + rejected + evicted);

            let mut contents = store.lock();
            drop(contents.evict(Limits { spans: 0, bytes: 0 }));
            prop_assert_eq!((contents.statistics.spans, contents.statistics.bytes), (0, 0));
            prop_assert!(contents.traces.is_empty() && contents.order.is_empty());
        }
    }
}
