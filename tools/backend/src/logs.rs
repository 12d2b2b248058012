//! The log records of traces, bounded like the spans, and the page's endpoint for them. Jaeger has no log
//! records: the `logs` in its JSON are the events of a span.

use super::{
    ids::{SpanId, TraceId},
    jaeger::Envelope,
    parameters::{self, Refusal},
    query::{blocking, json},
    size,
    spans::Rejected,
    store::{Limits, Store},
    tags::{self, Tag},
};
use axum::{
    Router,
    extract::{Path, State},
    response::Response,
    routing::get,
};
use opentelemetry_proto::tonic::{
    collector::logs::v1::ExportLogsServiceRequest, common::v1::KeyValue, logs::v1::LogRecord,
};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    mem::size_of,
    sync::Arc,
};

/// The memory of a record and of its place in the trace's list, in bytes. The list has room to grow, so a
/// place counts twice. The record's encoded contents are not included.
const RECORD_BYTES: usize = size_of::<StoredRecord>() + 16 + 2 * size_of::<Arc<StoredRecord>>();

/// The approximate memory of a trace's entries in the tables, in bytes.
const TRACE_BYTES: usize = size_of::<TraceLogs>() + 160;

/// How many log records are stored, and what happened to all other records that were received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogStatistics {
    /// How many records are stored.
    pub records: usize,
    /// The memory of the stored records, in bytes.
    pub bytes: usize,
    /// Records received so far.
    pub received: u64,
    /// Received records that were not stored, because they were written outside of a trace.
    pub untraced: u64,
    /// Received records that were refused, because their trace has too many records.
    pub rejected: u64,
    /// Received records that were stored and later evicted with their trace, to make room.
    pub evicted: u64,
}

/// The records by trace. Records may arrive before or after the trace's spans, and are evicted separately
/// from the spans.
#[derive(Default)]
pub(super) struct Logs {
    traces: HashMap<TraceId, TraceLogs>,
    /// The traces in the order in which their first records arrived, oldest first.
    order: VecDeque<TraceId>,
    statistics: LogStatistics,
}

#[derive(Default)]
struct TraceLogs {
    records: Vec<Arc<StoredRecord>>,
    bytes: usize,
}

/// An encoded record. A decoded record would take about four times as much memory.
pub(super) struct StoredRecord {
    encoded: Box<[u8]>,
}

/// Returns the records of a request with their trace ids. The id of a record that was written outside of a
/// trace is `None`. An invalid id also becomes `None`, because OpenTelemetry treats it like a missing id.
pub(super) fn stored_records(request: ExportLogsServiceRequest) -> Vec<(Option<TraceId>, StoredRecord)> {
    let scopes = request.resource_logs.into_iter().flat_map(|resource| resource.scope_logs);
    let records = scopes.flat_map(|scope| scope.log_records).map(|record| {
        let encoded = record.encode_to_vec().into_boxed_slice();
        (TraceId::from_bytes(&record.trace_id), StoredRecord { encoded })
    });
    records.collect()
}

impl Logs {
    pub fn statistics(&self) -> LogStatistics {
        self.statistics
    }

    /// Returns the records of a trace in the order of their arrival.
    pub fn of_trace(&self, id: TraceId) -> Vec<Arc<StoredRecord>> {
        self.traces.get(&id).map(|logs| logs.records.clone()).unwrap_or_default()
    }

    /// Stores the records that belong to a trace and are within the trace's limits. Returns the traces that
    /// got records.
    pub fn insert(
        &mut self,
        records: Vec<(Option<TraceId>, StoredRecord)>,
        limits: Limits,
        rejected: &mut Rejected,
    ) -> HashSet<TraceId> {
        let mut changed = HashSet::new();
        for (id, record) in records {
            self.statistics.received += 1;
            let Some(id) = id else {
                self.statistics.untraced += 1;
                continue;
            };
            let bytes = RECORD_BYTES + size::block(record.encoded.len());
            let (records, taken) =
                self.traces.get(&id).map_or((0, TRACE_BYTES), |logs| (logs.records.len(), logs.bytes));
            if records >= limits.spans_of_a_trace() || taken + bytes > limits.bytes_of_a_trace() {
                self.statistics.rejected += 1;
                rejected.add("the records of its trace already take a quarter of the store");
                continue;
            }
            let logs = self.traces.entry(id).or_insert_with(|| {
                self.order.push_back(id);
                self.statistics.bytes += TRACE_BYTES;
                TraceLogs { records: Vec::new(), bytes: TRACE_BYTES }
            });
            logs.records.push(Arc::new(record));
            logs.bytes += bytes;
            self.statistics.records += 1;
            self.statistics.bytes += bytes;
            changed.insert(id);
        }
        while self.statistics.records > limits.spans || self.statistics.bytes > limits.bytes {
            let Some(logs) = self.order.pop_front().and_then(|id| self.traces.remove(&id)) else {
                break;
            };
            self.statistics.records -= logs.records.len();
            self.statistics.evicted += logs.records.len() as u64;
            self.statistics.bytes -= logs.bytes;
        }
        changed
    }
}

pub(super) fn routes() -> Router<Arc<Store>> {
    Router::new().route("/api/logs/{id}", get(logs))
}

/// A record in the form that the page reads.
#[derive(Serialize)]
struct Record<'a> {
    /// The span id, or empty outside of a span.
    #[serde(rename = "spanID")]
    span_id: String,
    /// When the event happened, in microseconds since 1970.
    timestamp: u64,
    severity: &'a str,
    body: Tag<'a>,
    attributes: Vec<Tag<'a>>,
}

/// Returns the records of a trace, ordered by their time. The list may be empty.
async fn logs(State(store): State<Arc<Store>>, Path(id): Path<String>) -> Response {
    blocking(move || {
        let id = parameters::trace_id(&id).map_err(|error| Refusal::malformed(&error))?;
        let stored = store.logs(id);
        let decoded = stored.iter().map(|record| LogRecord::decode(&record.encoded[..]).unwrap_or_default());
        let mut records: Vec<_> = decoded
            .map(|mut record| {
                let body = KeyValue { key: String::new(), value: record.body.take(), key_strindex: 0 };
                (time(&record), record, body)
            })
            .collect();
        records.sort_by_key(|(time, ..)| *time);
        let records = records.iter().map(|(time, record, body)| Record {
            span_id: SpanId::from_bytes(&record.span_id).map_or_else(String::new, |id| id.to_string()),
            timestamp: time / 1000,
            severity: severity(record),
            body: Tag::new(body),
            attributes: tags::of_attributes(&record.attributes),
        });
        Ok(json(&Envelope::new(records.collect())))
    })
    .await
}

/// Returns when the event happened or, if that is unknown, when the record was collected.
fn time(record: &LogRecord) -> u64 {
    if record.time_unix_nano == 0 { record.observed_time_unix_nano } else { record.time_unix_nano }
}

/// Returns the severity's name in the record or, if the record has no name, the name for the severity's
/// number. Each name stands for four numbers.
fn severity(record: &LogRecord) -> &str {
    const NAMES: [&str; 6] = ["TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"];

    if !record.severity_text.is_empty() {
        return &record.severity_text;
    }
    let index = usize::try_from(record.severity_number - 1).map(|index| index / 4);
    index.ok().and_then(|index| NAMES.get(index)).copied().unwrap_or_default()
}
