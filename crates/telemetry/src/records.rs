//! Gives the attributes of exported log records a namespace, as the semantic conventions ask. Log lines keep
//! the short names of the fields in `tracing`'s macros, because people read them.

use crate::semconv;
use opentelemetry::{
    InstrumentationScope, Key, SpanId, TraceFlags, TraceId,
    logs::{AnyValue, LogRecord, Logger, LoggerProvider, Severity},
};
use std::{borrow::Cow, time::SystemTime};

/// Wraps a logger provider, a logger or a record, so that its attributes have a namespace.
pub(crate) struct Namespaced<T>(pub T);

/// Returns the name of an attribute for a field of `tracing`.
fn namespaced(field: Key) -> Key {
    match field.as_str() {
        "attempt" => semconv::MESSAGE_ATTEMPT.into(),
        "code" => semconv::RPC_STATUS_CODE.into(),
        "error" => semconv::EXCEPTION_MESSAGE.into(),
        "message_id" => semconv::MESSAGING_MESSAGE_ID.into(),
        "queue" => semconv::MESSAGING_DESTINATION_NAME.into(),
        name if name.contains('.') => field,
        name => format!("throughline.{name}").into(),
    }
}

impl<P: LoggerProvider> LoggerProvider for Namespaced<P> {
    type Logger = Namespaced<P::Logger>;

    fn logger_with_scope(&self, scope: InstrumentationScope) -> Self::Logger {
        Namespaced(self.0.logger_with_scope(scope))
    }
}

impl<L: Logger> Logger for Namespaced<L> {
    type LogRecord = Namespaced<L::LogRecord>;

    fn create_log_record(&self) -> Self::LogRecord {
        Namespaced(self.0.create_log_record())
    }

    fn emit(&self, record: Self::LogRecord) {
        self.0.emit(record.0);
    }

    fn event_enabled(&self, level: Severity, target: &str, name: Option<&str>) -> bool {
        self.0.event_enabled(level, target, name)
    }
}

impl<R: LogRecord> LogRecord for Namespaced<R> {
    /// Sets nothing. The name that `tracing` gives is a place in the source code, and a record with a name
    /// would count as an event of the semantic conventions.
    fn set_event_name(&mut self, _: &'static str) {}

    fn set_target<T: Into<Cow<'static, str>>>(&mut self, target: T) {
        self.0.set_target(target);
    }

    fn set_timestamp(&mut self, timestamp: SystemTime) {
        self.0.set_timestamp(timestamp);
    }

    fn set_observed_timestamp(&mut self, timestamp: SystemTime) {
        self.0.set_observed_timestamp(timestamp);
    }

    fn set_severity_text(&mut self, text: &'static str) {
        self.0.set_severity_text(text);
    }

    fn set_severity_number(&mut self, number: Severity) {
        self.0.set_severity_number(number);
    }

    fn set_body(&mut self, body: AnyValue) {
        self.0.set_body(body);
    }

    fn add_attributes<I, K, V>(&mut self, attributes: I)
    where
        I: IntoIterator<Item = (K, V)>,
        K: Into<Key>,
        V: Into<AnyValue>,
    {
        for (key, value) in attributes {
            self.add_attribute(key, value);
        }
    }

    fn add_attribute<K: Into<Key>, V: Into<AnyValue>>(&mut self, key: K, value: V) {
        self.0.add_attribute(namespaced(key.into()), value);
    }

    fn set_trace_context(&mut self, trace_id: TraceId, span_id: SpanId, flags: Option<TraceFlags>) {
        self.0.set_trace_context(trace_id, span_id, flags);
    }
}
