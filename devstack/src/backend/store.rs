//! The bounded store: spans by trace. When it is full, the oldest trace goes.
//!
//! Readers get a snapshot (`Arc`s), so that a long search never holds up what comes in.

use super::{
    ids::{SpanId, TraceId},
    size,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, any_value::Value},
    resource::v1,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    mem::size_of,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};
use tokio::sync::broadcast;

/// The service of spans whose resource names none, as Jaeger calls it.
const NO_SERVICE_NAME: &str = "OTLPResourceNoServiceName";

/// What a trace takes beside its spans: its entries in the store's tables, roughly.
const TRACE_BYTES: usize = size_of::<Trace>() + 160;

/// What a span takes beside what it owns: itself and its entry in the trace's table, with room to grow.
const SPAN_BYTES: usize = size_of::<StoredSpan>() + 16 + 48;

/// The largest resource, and the largest scope: an answer repeats them for every trace.
const MAX_ORIGIN_BYTES: usize = 64 * 1024;

/// The longest name and version of a scope: Jaeger's JSON repeats them for every span.
const MAX_SCOPE_NAME_BYTES: usize = 1024;

/// How much is kept. When there is more, the oldest traces go; no trace may take more than a quarter.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Limits {
    /// Spans.
    pub spans: usize,
    /// Bytes of memory that they take.
    pub bytes: usize,
}

/// 200,000 spans, 256 MiB.
impl Default for Limits {
    fn default() -> Self {
        Self { spans: 200_000, bytes: 256 * 1024 * 1024 }
    }
}

impl Limits {
    /// The most spans that one trace may have, and one answer.
    pub(super) fn spans_of_a_trace(&self) -> usize {
        (self.spans / 4).max(1)
    }

    fn bytes_of_a_trace(&self) -> usize {
        self.bytes / 4
    }
}

/// What the store holds, and what became of the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Traces stored.
    pub traces: usize,
    /// Spans stored.
    pub spans: usize,
    /// Bytes that they take.
    pub bytes: usize,
    /// Spans received so far.
    pub received: u64,
    /// Of these: sent before, so not stored again.
    pub duplicates: u64,
    /// Of these: refused, because their ids are invalid or their trace is too large.
    pub rejected: u64,
    /// Of these: gone again with their trace, to make room.
    pub evicted: u64,
}

/// Spans of a request that were not stored.
#[derive(Debug, Default)]
pub(crate) struct Rejected {
    /// How many.
    pub spans: u64,
    /// Why the first was not.
    pub reason: &'static str,
}

/// All traces.
pub(super) struct Store {
    contents: Mutex<Contents>,
    limits: Limits,
    changes: broadcast::Sender<String>,
}

#[derive(Default)]
struct Contents {
    traces: HashMap<TraceId, Arc<Trace>>,
    /// The oldest first.
    order: VecDeque<TraceId>,
    statistics: Statistics,
}

/// A trace, as far as it has come.
#[derive(Clone)]
pub(super) struct Trace {
    pub id: TraceId,
    /// The earliest start, in nanoseconds since 1970.
    pub start: u64,
    /// The latest end.
    pub end: u64,
    spans: HashMap<SpanId, Arc<StoredSpan>>,
    bytes: usize,
}

/// A span, and where it comes from: what searches and summaries look at, and all of it encoded. Decoded
/// it takes some four times as much, in dozens of small allocations, which leave the heap in shreds.
pub(super) struct StoredSpan {
    pub id: SpanId,
    pub parent: Option<SpanId>,
    pub name: Box<str>,
    pub kind: SpanKind,
    pub is_error: bool,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// Nanoseconds since 1970.
    pub end: u64,
    pub resource: Arc<Shared<Resource>>,
    pub scope: Arc<Shared<Scope>>,
    encoded: Box<[u8]>,
    bytes: usize,
}

/// A span with everything that was sent.
pub(super) struct DecodedSpan<'a> {
    pub stored: &'a StoredSpan,
    pub span: Span,
}

/// What made spans: a process.
pub(super) struct Resource {
    pub service: String,
    pub resource: v1::Resource,
    pub schema_url: String,
}

/// What made spans in a process: a library.
pub(super) struct Scope {
    pub scope: InstrumentationScope,
    pub schema_url: String,
}

/// What the spans of a request share. Its memory is counted once, for as long as one of them is stored.
pub(super) struct Shared<T> {
    value: T,
    bytes: usize,
    /// How many stored spans have it. An `Arc`'s own count has the readers, too.
    spans: AtomicUsize,
}

impl Store {
    pub fn new(limits: Limits) -> Self {
        let (changes, _) = broadcast::channel(4096);
        Self { contents: Mutex::default(), limits, changes }
    }

    /// The trace, as it is now.
    pub fn trace(&self, id: TraceId) -> Option<Arc<Trace>> {
        self.lock().traces.get(&id).cloned()
    }

    /// All traces as they are now, in no order.
    pub fn traces(&self) -> Vec<Arc<Trace>> {
        self.lock().traces.values().cloned().collect()
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn statistics(&self) -> Statistics {
        let contents = self.lock();
        Statistics { traces: contents.traces.len(), ..contents.statistics }
    }

    /// Ids of traces that get spans from now on.
    pub fn changes(&self) -> broadcast::Receiver<String> {
        self.changes.subscribe()
    }

    /// Stores what is valid and new.
    pub fn insert(&self, request: ExportTraceServiceRequest) -> Rejected {
        let mut rejected = Rejected::default();
        let spans = stored_spans(request, &mut rejected);
        let mut changed = HashSet::new();
        let evicted = {
            let mut contents = self.lock();
            for (id, span) in spans {
                if contents.insert(id, span, self.limits, &mut rejected) {
                    changed.insert(id);
                }
            }
            contents.statistics.received += rejected.spans;
            contents.statistics.rejected += rejected.spans;
            contents.evict(self.limits)
        };
        // Thousands of allocations are freed here: outside of the lock.
        drop(evicted);
        if self.changes.receiver_count() > 0 {
            for id in changed {
                let _ = self.changes.send(id.to_string());
            }
        }
        rejected
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Contents {
    /// Whether the span is stored now and was not before.
    fn insert(&mut self, id: TraceId, span: StoredSpan, limits: Limits, rejected: &mut Rejected) -> bool {
        let trace = self.traces.get(&id);
        if trace.is_some_and(|trace| trace.spans.contains_key(&span.id)) {
            self.statistics.received += 1;
            self.statistics.duplicates += 1;
            return false;
        }
        let (spans, bytes) = trace.map_or((0, TRACE_BYTES), |trace| (trace.spans.len(), trace.bytes));
        if spans >= limits.spans_of_a_trace() || bytes + span.bytes > limits.bytes_of_a_trace() {
            rejected.add("its trace takes a quarter of the store already");
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
        // Copies the trace's table if a reader has it at this moment.
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
    /// Its spans, in no order.
    pub fn spans(&self) -> impl ExactSizeIterator<Item = &StoredSpan> {
        self.spans.values().map(|span| &**span)
    }

    /// All of its spans, by their start.
    pub fn decoded(&self) -> Vec<DecodedSpan<'_>> {
        let mut spans: Vec<_> = self.spans().collect();
        spans.sort_unstable_by_key(|span| (span.start, span.id));
        spans.into_iter().map(StoredSpan::decoded).collect()
    }

    pub fn span(&self, id: SpanId) -> Option<&StoredSpan> {
        self.spans.get(&id).map(|span| &**span)
    }

    /// Nanoseconds from the first start to the last end.
    pub fn duration(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

impl StoredSpan {
    /// Nanoseconds; none if the clock went backwards.
    pub fn duration(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    pub fn service(&self) -> &str {
        &self.resource.service
    }

    pub fn decoded(&self) -> DecodedSpan<'_> {
        // It was encoded here, from what was decoded: it is well-formed, and no deeper than allowed.
        DecodedSpan { stored: self, span: Span::decode(&self.encoded[..]).unwrap_or_default() }
    }
}

impl Rejected {
    fn add(&mut self, reason: &'static str) {
        if self.spans == 0 {
            self.reason = reason;
        }
        self.spans += 1;
    }
}

impl<T> Shared<T> {
    fn new(value: T, owned: usize) -> Arc<Self> {
        let bytes = size_of::<Self>() + 16 + owned;
        Arc::new(Self { value, bytes, spans: AtomicUsize::new(0) })
    }

    /// One more stored span has it: the bytes to add. Called under the store's lock, as its opposite.
    fn acquire(&self) -> usize {
        if self.spans.fetch_add(1, Relaxed) == 0 { self.bytes } else { 0 }
    }

    /// One stored span less has it: the bytes to subtract.
    fn release(&self) -> usize {
        if self.spans.fetch_sub(1, Relaxed) == 1 { self.bytes } else { 0 }
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

fn stored_spans(request: ExportTraceServiceRequest, rejected: &mut Rejected) -> Vec<(TraceId, StoredSpan)> {
    let mut stored = Vec::new();
    for resource_spans in request.resource_spans {
        let resource = resource_spans.resource.unwrap_or_default();
        let service = service_name(&resource);
        let bytes =
            size::block(service.len()) + size::of_resource(&resource) + resource_spans.schema_url.capacity();
        let resource =
            Shared::new(Resource { service, resource, schema_url: resource_spans.schema_url }, bytes);
        for scope_spans in resource_spans.scope_spans {
            let scope = scope_spans.scope.unwrap_or_default();
            let bytes = size::of_scope(&scope) + scope_spans.schema_url.capacity();
            let is_too_large = resource.bytes > MAX_ORIGIN_BYTES
                || bytes > MAX_ORIGIN_BYTES
                || scope.name.len() + scope.version.len() > MAX_SCOPE_NAME_BYTES;
            let scope = Shared::new(Scope { scope, schema_url: scope_spans.schema_url }, bytes);
            for span in scope_spans.spans {
                let (Some(trace_id), Some(id)) =
                    (TraceId::from_bytes(&span.trace_id), SpanId::from_bytes(&span.span_id))
                else {
                    rejected.add("its trace id or span id is invalid");
                    continue;
                };
                if is_too_large {
                    rejected.add("its resource or its scope is too large");
                    continue;
                }
                let parent = SpanId::from_bytes(&span.parent_span_id);
                // Zeros say "none" as emptiness does; anything else that is no id is a mistake.
                if parent.is_none() && span.parent_span_id.iter().any(|byte| *byte != 0) {
                    rejected.add("its parent span id is invalid");
                    continue;
                }
                let encoded = span.encode_to_vec().into_boxed_slice();
                let span = StoredSpan {
                    id,
                    parent,
                    kind: span.kind(),
                    is_error: span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error),
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    resource: Arc::clone(&resource),
                    scope: Arc::clone(&scope),
                    bytes: SPAN_BYTES + size::block(encoded.len()) + size::block(span.name.len()),
                    name: span.name.into_boxed_str(),
                    encoded,
                };
                stored.push((trace_id, span));
            }
        }
    }
    stored
}

fn service_name(resource: &v1::Resource) -> String {
    let attribute = resource.attributes.iter().find(|attribute| attribute.key == "service.name");
    match attribute.and_then(|attribute| attribute.value.as_ref()) {
        Some(AnyValue { value: Some(Value::StringValue(name)) }) if !name.is_empty() => name.clone(),
        _ => NO_SERVICE_NAME.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};
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
                // A reader in between makes the next insertion copy.
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
