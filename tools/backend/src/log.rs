//! Log records as they were received.

use crate::trace::{attributes, hex, text};
use opentelemetry_proto::tonic::logs::v1::ResourceLogs;
use std::collections::BTreeMap;

/// A log record, with what its resource and scope say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogRecord {
    /// Its `service.name`.
    pub service: String,
    /// The instrumentation scope.
    pub scope: String,
    /// `INFO` and the like.
    pub severity: String,
    /// 1 (TRACE) to 24 (FATAL4), or 0 if it has none.
    pub severity_number: i32,
    /// The message, as text.
    pub body: String,
    /// Its attributes, as text.
    pub attributes: BTreeMap<String, String>,
    /// Attributes of the process that made it.
    pub resource: BTreeMap<String, String>,
    /// Its name, if it is an event.
    pub event_name: String,
    /// 32 hex digits; empty outside of a trace.
    pub trace_id: String,
    /// 16 hex digits; empty outside of a span.
    pub span_id: String,
    /// W3C flags.
    pub flags: u32,
    /// When it happened, in nanoseconds since 1970; 0 if that is not known.
    pub time: u64,
    /// When it was collected, in nanoseconds since 1970.
    pub observed: u64,
}

/// The log records of one part of an OTLP request.
pub fn records(resource_logs: &ResourceLogs) -> Vec<LogRecord> {
    let resource = resource_logs.resource.as_ref().map(|r| attributes(&r.attributes)).unwrap_or_default();
    let mut records = Vec::new();
    for scope_logs in &resource_logs.scope_logs {
        let scope = scope_logs.scope.clone().unwrap_or_default();
        records.extend(scope_logs.log_records.iter().map(|record| LogRecord {
            service: resource.get("service.name").cloned().unwrap_or_default(),
            scope: scope.name.clone(),
            severity: record.severity_text.clone(),
            severity_number: record.severity_number,
            body: record.body.as_ref().map(text).unwrap_or_default(),
            attributes: attributes(&record.attributes),
            resource: resource.clone(),
            event_name: record.event_name.clone(),
            trace_id: hex(&record.trace_id),
            span_id: hex(&record.span_id),
            flags: record.flags,
            time: record.time_unix_nano,
            observed: record.observed_time_unix_nano,
        }));
    }
    records
}
