//! A collector that checks whether each trace is the right tree of spans. It keeps only the ids of the
//! producer spans and the parent ids of the consumer spans.

use super::ledger::TraceId;
use anyhow::Result;
use backend::{
    Rejected,
    ingest::{self, Sink},
};
use http::HeaderMap;
use loopback::background::Background;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    trace::v1::{Span, span::SpanKind},
};
use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tonic::Status;

/// A running collector. It stops when it is dropped.
pub struct Collector {
    /// The address that the collector listens on for OTLP/gRPC.
    pub address: SocketAddr,
    trees: Trees,
    _runtime: Background,
}

#[derive(Clone, Default)]
struct Trees(Arc<Mutex<HashMap<TraceId, Tree>>>);

/// The span ids by which the tree of a trace is judged.
#[derive(Default)]
struct Tree {
    producers: Vec<u64>,
    /// The parent ids of the consumer spans.
    parents: Vec<u64>,
}

/// The numbers of whole, partial and wrong trees.
#[derive(Debug, Default)]
pub struct Judged {
    /// Traces with producer and consumer spans in which every consumer span is a child of a producer span.
    pub whole: usize,
    /// Traces that lack the producer span or the consumer span. For example, a process was killed before it
    /// sent the span, or the test itself published the message, without a span.
    pub partial: usize,
    /// Traces that have a consumer span but belong to no message of the run. Also traces with a producer span
    /// in which a consumer span is the child of another span.
    pub wrong: usize,
}

impl Collector {
    /// Listens on a free port.
    ///
    /// # Errors
    /// If no port is free.
    pub fn start() -> Result<Self> {
        let runtime = Background::start(1, 1)?;
        let listener = runtime.listen(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = listener.local_addr()?;
        let trees = Trees::default();
        runtime.spawn(ingest::serve_grpc(listener, trees.clone()));
        Ok(Self { address, trees, _runtime: runtime })
    }

    /// Judges the trees of these traces. Every other trace with a consumer span counts as wrong.
    pub fn judge(&self, traces: &HashSet<TraceId>) -> Judged {
        let trees = self.trees.lock();
        let mut judged = Judged::default();
        for (trace, Tree { producers, parents }) in trees.iter() {
            let is_right = |parent: &u64| producers.contains(parent);
            if !traces.contains(trace) {
                judged.wrong += usize::from(!parents.is_empty());
            } else if producers.is_empty() || parents.is_empty() {
                judged.partial += 1;
            } else if parents.iter().all(is_right) {
                judged.whole += 1;
            } else {
                judged.wrong += 1;
            }
        }
        judged
    }
}

impl Trees {
    fn lock(&self) -> MutexGuard<'_, HashMap<TraceId, Tree>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_span(&self, span: &Span) -> Option<()> {
        let trace = TraceId::from_be_bytes(span.trace_id.as_slice().try_into().ok()?);
        let id = |id: &[u8]| Some(u64::from_be_bytes(id.try_into().ok()?));
        match span.kind() {
            SpanKind::Producer if span.name == "send_msg_mq" => {
                let producer = id(&span.span_id)?;
                self.lock().entry(trace).or_default().producers.push(producer);
            }
            SpanKind::Consumer => {
                // Parent id 0 means that the consumer span is the root of a trace.
                let parent = id(&span.parent_span_id).unwrap_or_default();
                self.lock().entry(trace).or_default().parents.push(parent);
            }
            _ => {}
        }
        Some(())
    }
}

impl Sink for Trees {
    fn traces(&self, _: HeaderMap, request: ExportTraceServiceRequest) -> Result<Rejected, Status> {
        let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
        for span in scopes.flat_map(|scope| &scope.spans) {
            self.take_span(span).ok_or_else(|| {
                Status::invalid_argument("a trace id must have 16 bytes, and a span id 8 bytes")
            })?;
        }
        Ok(Rejected::default())
    }
}
