//! Sets up metrics: the provider with its readers, and the measurements that every process makes of itself.
//!
//! The metrics of a boundary are defined beside its spans ([`crate::http`], [`crate::grpc`],
//! [`crate::amqp`]). The metrics of a service's own parts are defined in the service.

use crate::{
    config::{ConfigError, MetricsConfig, MetricsExporter},
    export::{Account, Guarded, SpanCounts},
    otlp,
    outage::Outage,
    prometheus,
    scope::layers_meter,
    semconv,
};
use opentelemetry::{
    KeyValue, Value, global,
    metrics::{Histogram, Meter},
};
use opentelemetry_sdk::{
    Resource,
    metrics::{PeriodicReader, SdkMeterProvider, exporter::PushMetricExporter},
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};
use tokio::runtime::RuntimeMetrics;
use tracing_appender::non_blocking::ErrorCounter;

/// The bucket bounds of durations, in seconds (semantic conventions 1.45, HTTP, RPC and messaging metrics).
const SECONDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

/// Makes the meter provider and sets it as the global one. Returns `None` if metrics are not exported.
/// `runtime` is the service's runtime, whose metrics are also exported.
pub(crate) fn start(
    config: MetricsConfig,
    resource: Resource,
    runtime: RuntimeMetrics,
    accounts: Vec<Arc<Account>>,
    dropped_lines: Option<ErrorCounter>,
) -> Result<Option<SdkMeterProvider>, ConfigError> {
    fn reader<E: PushMetricExporter>(
        exporter: E,
        config: &MetricsConfig,
        to: &str,
    ) -> PeriodicReader<Guarded<E>> {
        let exporter = Guarded::new(exporter, Outage::new("metrics", to), config.timeout);
        PeriodicReader::builder(exporter).with_interval(config.interval).build()
    }
    if config.exporters.is_empty() {
        return Ok(None);
    }
    let mut builder = SdkMeterProvider::builder().with_resource(resource);
    for exporter in &config.exporters {
        builder = match exporter {
            MetricsExporter::Otlp(otlp, temporality) => {
                let exporter = otlp::metric_exporter(otlp, *temporality)?;
                builder.with_reader(reader(exporter, &config, &otlp.endpoint.to_string()))
            }
            MetricsExporter::Console => {
                let exporter = opentelemetry_stdout::MetricExporter::default();
                builder.with_reader(reader(exporter, &config, "standard output"))
            }
            MetricsExporter::Prometheus(address) => builder.with_reader(prometheus::start(*address)?),
        };
    }
    let provider = builder.build();
    global::set_meter_provider(provider.clone());
    ARE_EXPORTED.store(true, Relaxed);
    observe_process();
    observe_runtime(runtime);
    observe_spans(accounts);
    if let Some(dropped) = dropped_lines {
        layers_meter()
            .u64_observable_counter("throughline.log.lines.dropped")
            .with_unit("{line}")
            .with_description("Log lines that were dropped because nobody read standard error.")
            .with_callback(move |observer| observer.observe(dropped.dropped_lines() as u64, &[]))
            .build();
    }
    Ok(Some(provider))
}

/// Whether metrics are exported. If they are not, their attributes need not be prepared.
pub(crate) fn are_exported() -> bool {
    ARE_EXPORTED.load(Relaxed)
}

static ARE_EXPORTED: AtomicBool = AtomicBool::new(false);

/// A running measurement of a duration, with the attributes known so far.
#[derive(Debug)]
pub(crate) struct Measurement {
    histogram: Histogram<f64>,
    started: Instant,
    attributes: Vec<KeyValue>,
}

impl Measurement {
    /// Starts the measurement.
    pub fn start(histogram: &Histogram<f64>, attributes: Vec<KeyValue>) -> Self {
        Self { histogram: histogram.clone(), started: Instant::now(), attributes }
    }

    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.attributes.push(KeyValue::new(key, value));
    }

    /// Records the time since the start.
    pub fn record(&self) {
        self.histogram.record(self.started.elapsed().as_secs_f64(), &self.attributes);
    }
}

/// Makes a histogram of durations in seconds, with the buckets of the semantic conventions.
pub fn duration_histogram(meter: &Meter, name: &'static str) -> Histogram<f64> {
    meter.f64_histogram(name).with_unit("s").with_boundaries(SECONDS.to_vec()).build()
}

/// Observes CPU, memory, threads, files and uptime (semantic conventions 1.45, process metrics). All except
/// the uptime are read from `/proc`, so they exist only on Linux.
fn observe_process() {
    #[cfg(target_os = "linux")]
    {
        use procfs::process::Process;

        fn stat() -> Option<procfs::process::Stat> {
            Process::myself().ok()?.stat().ok()
        }
        let meter = layers_meter();
        let ticks = procfs::ticks_per_second() as f64;
        meter
            .f64_observable_counter("process.cpu.time")
            .with_unit("s")
            .with_callback(move |observer| {
                if let Some(stat) = stat() {
                    let mode = |mode| [KeyValue::new("cpu.mode", mode)];
                    observer.observe(stat.utime as f64 / ticks, &mode("user"));
                    observer.observe(stat.stime as f64 / ticks, &mode("system"));
                }
            })
            .build();
        let gauge = |name, unit, value: fn() -> Option<i64>| {
            meter
                .i64_observable_up_down_counter(name)
                .with_unit(unit)
                .with_callback(move |observer| {
                    if let Some(value) = value() {
                        observer.observe(value, &[]);
                    }
                })
                .build();
        };
        gauge("process.memory.usage", "By", || Some((stat()?.rss * procfs::page_size()).cast_signed()));
        gauge("process.memory.virtual", "By", || Some(stat()?.vsize.cast_signed()));
        gauge("process.thread.count", "{thread}", || Some(stat()?.num_threads));
        gauge("process.unix.file_descriptor.count", "{file_descriptor}", || {
            Some(Process::myself().ok()?.fd_count().ok()? as i64)
        });
    }
    let started = Instant::now();
    layers_meter()
        .f64_observable_gauge("process.uptime")
        .with_unit("s")
        .with_callback(move |observer| observer.observe(started.elapsed().as_secs_f64(), &[]))
        .build();
}

/// Observes the tokio runtime, for which there are no semantic conventions.
fn observe_runtime(runtime: RuntimeMetrics) {
    let meter = layers_meter();
    let figures = runtime.clone();
    meter
        .u64_observable_gauge("throughline.tokio.tasks")
        .with_unit("{task}")
        .with_description("Tasks that have not ended.")
        .with_callback(move |observer| observer.observe(figures.num_alive_tasks() as u64, &[]))
        .build();
    let figures = runtime.clone();
    meter
        .u64_observable_gauge("throughline.tokio.queue.size")
        .with_unit("{task}")
        .with_description("Tasks in the global queue, ready to run.")
        .with_callback(move |observer| observer.observe(figures.global_queue_depth() as u64, &[]))
        .build();
    meter
        .f64_observable_counter("throughline.tokio.busy.time")
        .with_unit("s")
        .with_description("Time that the workers were busy.")
        .with_callback(move |observer| {
            let busy = (0..runtime.num_workers()).map(|worker| runtime.worker_total_busy_duration(worker));
            observer.observe(busy.sum::<std::time::Duration>().as_secs_f64(), &[]);
        })
        .build();
}

/// Observes what happened to the spans (semantic conventions 1.45, SDK metrics). The first callback of a
/// collection reads the counts for all callbacks, so that the values agree.
fn observe_spans(accounts: Vec<Arc<Account>>) {
    const PROCESSOR: &str = "batching_span_processor";
    type Snapshot = Arc<Mutex<Vec<SpanCounts>>>;
    type Values = fn(&SpanCounts) -> Vec<(u64, &'static str)>;

    let capacities: Vec<_> = accounts.iter().map(|account| account.max_queue_size).collect();
    let snapshot: Snapshot = Snapshot::default();
    let taken = snapshot.clone();
    let meter = layers_meter();
    let component = |i: usize| KeyValue::new("otel.component.name", format!("{PROCESSOR}/{i}"));
    meter
        .i64_observable_up_down_counter("otel.sdk.processor.span.queue.capacity")
        .with_unit("{span}")
        .with_callback(move |observer| {
            *taken.lock().unwrap_or_else(PoisonError::into_inner) =
                accounts.iter().map(|account| account.counts()).collect();
            for (i, capacity) in capacities.iter().enumerate() {
                let component_type = KeyValue::new("otel.component.type", PROCESSOR);
                observer.observe(*capacity as i64, &[component(i), component_type]);
            }
        })
        .build();
    let observe = |values: Values| {
        let snapshot = snapshot.clone();
        move |observe: &mut dyn FnMut(u64, &[KeyValue])| {
            for (i, counts) in snapshot.lock().unwrap_or_else(PoisonError::into_inner).iter().enumerate() {
                for (value, error_type) in values(counts) {
                    let mut attributes = vec![component(i), KeyValue::new("otel.component.type", PROCESSOR)];
                    if !error_type.is_empty() {
                        attributes.push(KeyValue::new(semconv::ERROR_TYPE, error_type));
                    }
                    observe(value, &attributes);
                }
            }
        }
    };
    let gauge = |name, values| {
        let observe = observe(values);
        meter
            .i64_observable_up_down_counter(name)
            .with_unit("{span}")
            .with_callback(move |observer| {
                observe(&mut |value, kvs| observer.observe(value.cast_signed(), kvs))
            })
            .build();
    };
    let counter = |name, values| {
        let observe = observe(values);
        meter
            .u64_observable_counter(name)
            .with_unit("{span}")
            .with_callback(move |observer| observe(&mut |value, kvs| observer.observe(value, kvs)))
            .build();
    };
    gauge("otel.sdk.processor.span.queue.size", |counts| vec![(counts.waiting() - counts.in_flight, "")]);
    gauge("otel.sdk.exporter.span.inflight", |counts| vec![(counts.in_flight, "")]);
    counter("otel.sdk.processor.span.processed", |SpanCounts { exported, dropped, in_flight, .. }| {
        let handed_over = exported + dropped.not_sent + dropped.rejected + in_flight;
        vec![(handed_over, ""), (dropped.queue_full, "queue_full")]
    });
    counter("otel.sdk.exporter.span.exported", |SpanCounts { exported, dropped, .. }| {
        vec![(*exported, ""), (dropped.not_sent, "not_sent"), (dropped.rejected, "rejected")]
    });
}
