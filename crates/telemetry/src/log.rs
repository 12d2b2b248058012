//! Writes log lines, as text for people or as JSON for machines, each with the ids of its trace. If
//! configured, the same events are also exported by OTLP as log records.
//!
//! `RUST_LOG` decides which lines and records are written. It does not decide which spans are recorded,
//! because spans have a separate filter. A separate thread writes the lines, so that the service does not
//! wait if nobody reads standard error. If too many lines are waiting, further lines are dropped and counted.

use crate::{outage::PartialSuccess, records::Namespaced};
use opentelemetry::{
    Context,
    trace::{SpanContext, TraceContextExt},
};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::{logs::SdkLoggerProvider, trace::SdkTracer};
use serde_json::{Map, Value, json};
use std::{
    any::Any,
    fmt,
    io::{self, BufWriter, IsTerminal, Stderr, Write},
    panic::{self, PanicHookInfo},
    str::FromStr,
    sync::mpsc,
    thread,
    time::Duration,
};
use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, Targets, filter_fn},
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{DefaultFields, Writer},
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

/// The settings of `LOG_FORMAT` and `RUST_LOG`.
#[derive(Debug)]
pub(crate) struct Config {
    pub format: Format,
    pub filter: Option<Filter>,
}

/// Decides which lines are written. Lines of lapin and OpenTelemetry are left out unless `RUST_LOG` names
/// them, because these libraries log several lines for each failed attempt, while the services log once that
/// the broker or the collector is unavailable.
#[derive(Debug)]
pub(crate) struct Filter(String);

impl FromStr for Filter {
    type Err = <EnvFilter as FromStr>::Err;

    fn from_str(directives: &str) -> Result<Self, Self::Err> {
        // A later directive for the same target replaces an earlier one.
        let directives = format!("lapin=off,opentelemetry=off,{directives}");
        directives.parse::<EnvFilter>().map(|_| Self(directives))
    }
}

impl Default for Filter {
    fn default() -> Self {
        "info".parse().expect("a level is a directive")
    }
}

impl Filter {
    /// Makes a filter for one layer.
    fn layer<S: Subscriber>(&self) -> impl tracing_subscriber::layer::Filter<S> + use<S> {
        // lapin logs the unroutable messages that the broker returns, and they hold personal data. At TRACE,
        // lapin logs each frame, and therefore the password. No directive may turn these lines on.
        let is_harmless = filter_fn(|metadata| {
            let is_lapin = metadata.target().starts_with("lapin");
            metadata.target() != "lapin::returned_messages"
                && !(is_lapin && *metadata.level() == Level::TRACE)
        });
        EnvFilter::new(&self.0).and(is_harmless)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Text,
    Json,
}

/// The largest number of lines that may wait to be written. Further lines are dropped.
const MAX_LINES: usize = 4_096;

/// How long writing the remaining lines may take at the end of the process.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How long the thread sleeps after writing, so that lines gather. Waking the thread costs more than writing
/// a line.
const GATHERING: Duration = Duration::from_millis(5);

/// The size of the buffer for lines, in bytes. If several processes write to one pipe, the pipe does not mix
/// writes of up to this size (`PIPE_BUF`).
const WRITTEN_AT_ONCE: usize = 4_096;

/// Standard error, for the thread that writes the lines. The thread flushes it when no line is waiting.
struct Gathering(BufWriter<Stderr>);

impl Write for Gathering {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        thread::sleep(GATHERING);
        Ok(())
    }
}

/// The writer of the lines. It must live as long as the process.
pub(crate) struct Lines {
    guard: Option<WorkerGuard>,
    dropped: ErrorCounter,
}

impl Lines {
    /// Returns the counter of lines that were dropped because nobody read standard error.
    pub fn dropped(&self) -> ErrorCounter {
        self.dropped.clone()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let guard = self.guard.take();
        let (done, written) = mpsc::channel();
        // Dropping the guard writes the last lines. If nobody reads them, the drop blocks, and then complains
        // on standard output, which may also block. So the process waits for it only for a limited time.
        thread::spawn(move || {
            drop(guard);
            let _ = done.send(());
        });
        let _ = written.recv_timeout(LAST_LINES);
    }
}

/// Installs the subscriber, which sends log lines to standard error, `tracing` spans to `tracer`, and log
/// records to `loggers`.
///
/// Spans below INFO are not recorded, because they are internals of libraries (h2 alone makes dozens for each
/// request). lapin's span is not recorded either, because it lasts as long as its connection.
pub(crate) fn install(
    config: Config,
    tracer: Option<SdkTracer>,
    loggers: Option<&SdkLoggerProvider>,
) -> Option<Lines> {
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(MAX_LINES)
        .thread_name("log lines")
        .finish(Gathering(BufWriter::with_capacity(WRITTEN_AT_ONCE, io::stderr())));
    let dropped = writer.error_counter();
    let filter = config.filter.unwrap_or_default();
    let lines = tracing_subscriber::fmt::layer()
        .event_format(config.format)
        .fmt_fields(DefaultFields::new())
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
        .with_writer(writer)
        .with_filter(filter.layer());
    // Each filter wraps the `Option` of its layer. If an absent layer had no filter, tracing would check
    // again for each span whether any layer wants the span.
    let records = loggers.map(|loggers| OpenTelemetryTracingBridge::new(&Namespaced(loggers.clone())));
    let records = records.with_filter(filter.layer());
    let recorded = Targets::new().with_default(LevelFilter::INFO).with_target("lapin", LevelFilter::OFF);
    let spans = tracer.map(|tracer| tracing_opentelemetry::layer().with_tracer(tracer).with_threads(false));
    let spans = spans.with_filter(recorded);
    let answers = PartialSuccess.with_filter(Targets::new().with_target("opentelemetry-otlp", Level::WARN));
    // This fails if a subscriber is already installed, as in a test. That subscriber is then kept.
    let subscriber = tracing_subscriber::registry().with(spans).with(lines).with(records).with(answers);
    subscriber.try_init().ok()?;
    panic::set_hook(Box::new(log_panic));
    Some(Lines { guard: Some(guard), dropped })
}

/// Logs a panic as an ordinary line, with the ids of the trace in which it happened.
fn log_panic(panic: &PanicHookInfo<'_>) {
    // An exporter's panic is caught elsewhere, and logged as a failure of the exporter.
    if thread::current().name().is_some_and(|name| name.starts_with("OpenTelemetry.")) {
        return;
    }
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    tracing::error!(location, reason = panic_reason(panic.payload()), "panicked");
}

/// Returns the message of a panic if it is a literal in the source code. A formatted message is not returned,
/// because it may quote anything, even a mobile number.
fn panic_reason(payload: &(dyn Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("formatted, so not logged")
}

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, cx: &FmtContext<'_, S, N>, out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        Context::map_current(|current| {
            let span = current.span();
            let ids = Some(span.span_context()).filter(|span_context| span_context.is_valid());
            match self {
                Self::Text => text(cx, out, event, ids),
                Self::Json => json(out, event, ids),
            }
        })
    }
}

fn text<S, N>(
    cx: &FmtContext<'_, S, N>,
    mut out: Writer<'_>,
    event: &Event<'_>,
    ids: Option<&SpanContext>,
) -> fmt::Result
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let (dim, reset) = if out.has_ansi_escapes() { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
    write!(out, "{dim}")?;
    SystemTime.format_time(&mut out)?;
    let metadata = event.metadata();
    write!(out, "{reset} {:>5} {dim}{}:{reset} ", metadata.level(), metadata.target())?;
    cx.field_format().format_fields(out.by_ref(), event)?;
    if let Some(ids) = ids {
        write!(out, " {dim}trace_id={} span_id={}{reset}", ids.trace_id(), ids.span_id())?;
    }
    writeln!(out)
}

fn json(mut out: Writer<'_>, event: &Event<'_>, ids: Option<&SpanContext>) -> fmt::Result {
    let mut timestamp = String::new();
    SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
    let mut fields = Fields::default();
    event.record(&mut fields);
    let mut line = json!({
        "timestamp": timestamp,
        "level": event.metadata().level().as_str(),
        "target": event.metadata().target(),
        "fields": fields.0,
    });
    if let Some(ids) = ids {
        line["trace_id"] = json!(ids.trace_id().to_string());
        line["span_id"] = json!(ids.span_id().to_string());
    }
    writeln!(out, "{line}")
}

/// The fields of an event, with their types.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl tracing::field::Visit for Fields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), json!(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.0.insert(field.name().to_owned(), json!(value));
    }

    fn record_i64(&mut self, field: &tracing::field::Field, value: i64) {
        self.0.insert(field.name().to_owned(), json!(value));
    }

    fn record_u64(&mut self, field: &tracing::field::Field, value: u64) {
        self.0.insert(field.name().to_owned(), json!(value));
    }

    fn record_f64(&mut self, field: &tracing::field::Field, value: f64) {
        self.0.insert(field.name().to_owned(), json!(value));
    }

    fn record_bool(&mut self, field: &tracing::field::Field, value: bool) {
        self.0.insert(field.name().to_owned(), json!(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panic_quotes_is_not_logged() {
        let caught = |panics: fn()| panic::catch_unwind(panics).unwrap_err();
        assert_eq!(panic_reason(&*caught(|| panic!("on purpose"))), "on purpose");
        let mobile = || std::hint::black_box("13800138000").to_owned();
        let quoting = panic::catch_unwind(|| panic!("no user {}", mobile())).unwrap_err();
        assert_eq!(panic_reason(&*quoting), "formatted, so not logged");
        let unwrapped = caught(|| assert_eq!("13800138000x".parse::<u64>().unwrap(), 0));
        assert_eq!(panic_reason(&*unwrapped), "formatted, so not logged");
    }
}
