//! Log records as they were received.

use crate::trace::{attributes, hex, text};
use opentelemetry_proto::tonic::logs::v1::ResourceLogs;
use std::collections::BTreeMap;

/// A log record, with fields from its resource and scope.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogRecord {
    /// The `service.name` of the record's resource.
    pub service: String,
    /// The name of the record's instrumentation scope.
    pub scope: String,
    /// The severity's name, such as `INFO`.
    pub severity: String,
    /// The severity's number, from 1 (TRACE) to 24 (FATAL4), or 0 if the record has no severity.
    pub severity_number: i32,
    /// The message, as text.
    pub body: String,
    /// The record's own attributes, as text.
    pub attributes: BTreeMap<String, String>,
    /// The attributes of the record's resource (the process that wrote the record), as text.
    pub resource: BTreeMap<String, String>,
    /// The event's name, if the record is an event.
    pub event_name: String,
    /// The trace id as 32 hex digits, or empty if the record was written outside of a trace.
    pub trace_id: String,
    /// The span id as 16 hex digits, or empty if the record was written outside of a span.
    pub span_id: String,
    /// The W3C trace flags.
    pub flags: u32,
    /// When the event happened, in nanoseconds since 1970, or 0 if that is unknown.
    pub time: u64,
    /// When the record was collected, in nanoseconds since 1970.
    pub observed: u64,
}

/// Returns the log records of one `ResourceLogs` of an OTLP request.
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
