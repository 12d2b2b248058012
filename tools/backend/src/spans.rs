//! Spans as they are stored, made from a decoded request.

use super::{
    ids::{SpanId, TraceId},
    size,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, any_value::Value},
    resource::v1,
    trace::v1::{
        Span,
        span::{Link, SpanKind},
        status::StatusCode,
    },
};
use prost::Message;
use std::{
    mem::size_of,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// The service name of spans whose resource has no `service.name`. Jaeger uses the same name.
const NO_SERVICE_NAME: &str = "OTLPResourceNoServiceName";

/// The memory of a span and of its entry in the trace's table, in bytes. The table has room to grow, so an
/// entry takes more than its own size. The span's data on the heap is not included.
const SPAN_BYTES: usize = size_of::<StoredSpan>() + 16 + 48;

/// The largest size of a resource or a scope. The size is limited because a response repeats both for every
/// trace.
const MAX_ORIGIN_BYTES: usize = 64 * 1024;

/// The largest length of a scope's name and version together. The length is limited because Jaeger's JSON
/// repeats both for every span.
const MAX_SCOPE_NAME_BYTES: usize = 1024;

/// A stored span and its origin. The fields that searches and summaries need are decoded, and the whole span
/// is kept encoded. A decoded span would take about four times as much memory, in dozens of small
/// allocations, which fragment the heap.
pub(super) struct StoredSpan {
    pub id: SpanId,
    pub parent: Option<SpanId>,
    pub name: Box<str>,
    pub kind: SpanKind,
    pub is_error: bool,
    /// The start in nanoseconds since 1970.
    pub start: u64,
    /// The end in nanoseconds since 1970.
    pub end: u64,
    pub resource: Arc<Shared<Resource>>,
    pub scope: Arc<Shared<InstrumentationScope>>,
    /// The trace id and the span id of each link. A link without valid ids is left out.
    pub links: Box<[(TraceId, SpanId)]>,
    encoded: Box<[u8]>,
    pub bytes: usize,
}

/// A stored span with all fields that were sent.
pub(super) struct DecodedSpan<'a> {
    pub stored: &'a StoredSpan,
    pub span: Span,
}

/// The resource of spans, which describes the process that made them.
pub(super) struct Resource {
    pub service: String,
    pub resource: v1::Resource,
}

/// Data that the spans of a request share. The memory of this data is counted once, as long as any of the
/// spans is stored.
pub(super) struct Shared<T> {
    value: T,
    bytes: usize,
    /// How many stored spans have this data. The reference count of the `Arc` would also include the
    /// snapshots of queries.
    spans: AtomicUsize,
}

/// Items of a request (spans, data points or log records) that were not stored.
#[derive(Debug, Default)]
pub struct Rejected {
    /// How many items were not stored.
    pub count: u64,
    /// Why the first item was not stored.
    pub reason: &'static str,
}

impl StoredSpan {
    /// Returns the duration in nanoseconds, or 0 if the clock went backwards.
    pub fn duration(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    pub fn service(&self) -> &str {
        &self.resource.service
    }

    pub fn decoded(&self) -> DecodedSpan<'_> {
        // This backend encoded the span from a decoded request, so it is well-formed and within the depth
        // limit.
        DecodedSpan { stored: self, span: Span::decode(&self.encoded[..]).unwrap_or_default() }
    }
}

impl Rejected {
    pub(crate) fn add(&mut self, reason: &'static str) {
        if self.count == 0 {
            self.reason = reason;
        }
        self.count += 1;
    }
}

impl<T> Shared<T> {
    fn new(value: T, owned: usize) -> Arc<Self> {
        let bytes = size_of::<Self>() + 16 + owned;
        Arc::new(Self { value, bytes, spans: AtomicUsize::new(0) })
    }

    /// Records that a stored span has this data. Returns how many more bytes the store now holds. The caller
    /// must hold the store's lock, as for [`Shared::release`].
    pub fn acquire(&self) -> usize {
        if self.spans.fetch_add(1, Relaxed) == 0 { self.bytes } else { 0 }
    }

    /// Records that a span with this data was removed. Returns how many fewer bytes the store now holds.
    pub fn release(&self) -> usize {
        if self.spans.fetch_sub(1, Relaxed) == 1 { self.bytes } else { 0 }
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// Returns the valid spans of a request, each with its trace id.
pub(super) fn stored_spans(
    request: ExportTraceServiceRequest,
    rejected: &mut Rejected,
) -> Vec<(TraceId, StoredSpan)> {
    let mut stored = Vec::new();
    for resource_spans in request.resource_spans {
        let resource = resource_spans.resource.unwrap_or_default();
        let service = service_name(&resource);
        let bytes = size::block(service.len()) + size::of_resource(&resource);
        let resource = Shared::new(Resource { service, resource }, bytes);
        for scope_spans in resource_spans.scope_spans {
            let scope = scope_spans.scope.unwrap_or_default();
            let bytes = size::of_scope(&scope);
            let is_too_large = resource.bytes > MAX_ORIGIN_BYTES
                || bytes > MAX_ORIGIN_BYTES
                || scope.name.len() + scope.version.len() > MAX_SCOPE_NAME_BYTES;
            let scope = Shared::new(scope, bytes);
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
                // Zeros mean "no parent", as an empty id does. Any other invalid id is a mistake.
                if parent.is_none() && span.parent_span_id.iter().any(|byte| *byte != 0) {
                    rejected.add("its parent span id is invalid");
                    continue;
                }
                let encoded = span.encode_to_vec().into_boxed_slice();
                let links: Box<[_]> = span.links.iter().filter_map(link).collect();
                let span = StoredSpan {
                    id,
                    parent,
                    kind: span.kind(),
                    is_error: span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error),
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    resource: Arc::clone(&resource),
                    scope: Arc::clone(&scope),
                    bytes: SPAN_BYTES
                        + size::block(encoded.len())
                        + size::block(span.name.len())
                        + size::block(size_of_val(&*links)),
                    name: span.name.into_boxed_str(),
                    links,
                    encoded,
                };
                stored.push((trace_id, span));
            }
        }
    }
    stored
}

fn link(link: &Link) -> Option<(TraceId, SpanId)> {
    Some((TraceId::from_bytes(&link.trace_id)?, SpanId::from_bytes(&link.span_id)?))
}

fn service_name(resource: &v1::Resource) -> String {
    let attribute = resource.attributes.iter().find(|attribute| attribute.key == "service.name");
    match attribute.and_then(|attribute| attribute.value.as_ref()) {
        Some(AnyValue { value: Some(Value::StringValue(name)) }) if !name.is_empty() => name.clone(),
        _ => NO_SERVICE_NAME.to_owned(),
    }
}
