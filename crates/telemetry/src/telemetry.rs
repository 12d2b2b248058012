//! Sets up the telemetry of a process, and shuts it down.

use crate::{
    config::{Config, ConfigError, Exporter, LogsConfig, LogsExporter},
    export::{self, AccountedProcessor, Export, Guarded, SpanCounts},
    log, metrics, otlp,
    outage::Outage,
};
use opentelemetry::{
    Context, KeyValue,
    baggage::BaggageExt,
    global,
    trace::{Span as _, TracerProvider},
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{BatchConfigBuilder, BatchLogProcessor, LogExporter, SdkLoggerProvider},
    metrics::SdkMeterProvider,
    trace::{SdkTracerProvider, Span, SpanData, SpanProcessor},
};
use std::{thread, time::Duration};
use tokio::{
    runtime::Handle,
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// Exports the traces, metrics and logs of this process, from [`Telemetry::start`] to
/// [`Telemetry::shut_down`].
#[must_use = "spans are lost unless the telemetry is shut down"]
pub struct Telemetry {
    tracers: Option<SdkTracerProvider>,
    meters: Option<SdkMeterProvider>,
    loggers: Option<SdkLoggerProvider>,
    exports: Vec<Export>,
    /// Dropped last, because dropping it writes the remaining log lines.
    lines: Option<log::Lines>,
}

impl Telemetry {
    /// Installs the providers, the propagators and the log subscriber, and starts the exporters.
    ///
    /// Call it inside the tokio runtime, and before any layer is made, because a layer that was made earlier
    /// would use a tracer that does nothing. No connection is opened yet.
    ///
    /// # Errors
    /// If a certificate can't be used, or if the process can't listen on the address at which Prometheus
    /// fetches the metrics.
    pub fn start(config: Config) -> Result<Self, ConfigError> {
        // The propagators are set even if the SDK is disabled, so that the caller's context is forwarded.
        global::set_text_map_propagator(propagation::composite(&config.propagators));
        if config.sdk_disabled {
            let lines = log::install(config.log, None, None);
            return Ok(Self { tracers: None, meters: None, loggers: None, exports: Vec::new(), lines });
        }

        let service = Handle::current().metrics();
        let connections = export::connections().map_err(|error| {
            ConfigError::new("OTEL_TRACES_EXPORTER", format!("can't start the exporters' thread: {error}"))
        })?;
        // Exporters open their connections on the runtime in which they are built.
        let _entered = connections.enter();
        let mut builder = SdkTracerProvider::builder()
            .with_resource(config.resource.clone())
            .with_sampler(config.sampler.clone())
            .with_span_limits(config.limits);
        if !config.baggage_attributes.is_empty() {
            builder = builder.with_span_processor(BaggageAttributes(config.baggage_attributes.clone()));
        }
        let mut exports = Vec::new();
        for exporter in &config.exporters {
            let (processor, export) = start_export(exporter, &config)?;
            builder = builder.with_span_processor(processor);
            exports.push(export);
        }
        let tracers = builder.build();
        let loggers = loggers(&config.logs, &config.resource)?;
        let lines = log::install(config.log, Some(tracers.tracer("tracing")), loggers.as_ref());
        global::set_tracer_provider(tracers.clone());
        let accounts = exports.iter().map(|export| export.account.clone()).collect();
        let dropped_lines = lines.as_ref().map(log::Lines::dropped);
        let meters = metrics::start(config.metrics, config.resource, service, accounts, dropped_lines)?;
        Ok(Self { tracers: Some(tracers), meters, loggers, exports, lines })
    }

    /// Sends the remaining telemetry, for at most `limit`, and logs how many spans were exported or lost.
    ///
    /// Call it last, when requests and deliveries are finished. Call it even after a failure, because the
    /// last spans matter most.
    pub async fn shut_down(self, limit: Duration) {
        let deadline = Instant::now() + limit;
        // Log records are sent last, because they may tell what happened to the spans and metrics.
        let limit = limit.mul_f64(0.8);
        let until_log = Instant::now() + limit;
        // All exporters shut down at the same time, so that an exporter that gets no answer doesn't use up
        // the others' time. Each shutdown has its own thread, because the SDK blocks until the remaining data
        // is sent.
        let meters = self.meters.map(|meters| on_thread(move || drop(meters.shutdown_with_timeout(limit))));
        let exports = self.exports.into_iter().map(|export| {
            let account = export.account.clone();
            (account, on_thread(move || export.shut_down(limit)))
        });
        for (account, ended) in exports.collect::<Vec<_>>() {
            let _ = timeout_at(until_log, ended).await;
            let SpanCounts { ended, exported, dropped, .. } = account.counts();
            // Spans that are still waiting now are also lost.
            let dropped = dropped.total().max(ended - exported);
            if dropped > 0 {
                tracing::warn!(ended, exported, dropped, "spans were lost");
            } else {
                tracing::info!(ended, exported, dropped, "all spans exported");
            }
        }
        let dropped = self.lines.as_ref().map_or(0, |lines| lines.dropped().dropped_lines());
        if dropped > 0 {
            tracing::warn!(dropped, "log lines were lost: nobody read standard error");
        }
        if let Some(meters) = meters {
            let _ = timeout_at(until_log, meters).await;
        }
        if let Some(loggers) = self.loggers {
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = on_thread(move || drop(loggers.shutdown_with_timeout(left)));
            let _ = timeout_at(deadline, ended).await;
        }
        // The processors of the tracers have been shut down already.
        drop(self.tracers);
    }
}

/// Runs `work` on its own thread. When the process ends, it does not wait for this thread. The SDK's meters
/// have no time limit for their shutdown, and a blocking task would delay the end of the runtime.
fn on_thread(work: impl FnOnce() + Send + 'static) -> oneshot::Receiver<()> {
    let (done, ended) = oneshot::channel();
    thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    ended
}

fn start_export(exporter: &Exporter, config: &Config) -> Result<(AccountedProcessor, Export), ConfigError> {
    let (resource, batch, limit) = (&config.resource, config.batch, config.value_length_limit);
    Ok(match exporter {
        Exporter::Otlp(otlp) => {
            let outage = Outage::new("spans", &otlp.endpoint);
            export::start(otlp::span_exporter(otlp)?, outage, resource, batch, limit)
        }
        #[cfg(feature = "zipkin")]
        Exporter::Zipkin { endpoint, timeout } => {
            let unused = (endpoint.scheme_str() != Some("https")).then_some("not https");
            let tls = tls::Client::read([tls::PemFile("OTEL_EXPORTER_OTLP_CERTIFICATE", None); 3], unused);
            let tls = tls.map_err(|error| ConfigError::new(&error.variable, error.problem))?;
            let client = otlp::client(tls.as_ref(), *timeout);
            let exporter = crate::zipkin::exporter(client, endpoint, resource)?;
            export::start(exporter, Outage::new("spans", endpoint), resource, batch, limit)
        }
        Exporter::Console => {
            let exporter = opentelemetry_stdout::SpanExporter::default();
            export::start(exporter, Outage::new("spans", "standard output"), resource, batch, limit)
        }
    })
}

/// Builds the logger provider, or returns `None` if log records are not exported.
fn loggers(config: &LogsConfig, resource: &Resource) -> Result<Option<SdkLoggerProvider>, ConfigError> {
    fn processor<E: LogExporter + 'static>(
        exporter: E,
        config: &LogsConfig,
        outage: Outage,
    ) -> BatchLogProcessor {
        let batch = BatchConfigBuilder::default()
            .with_max_queue_size(config.batch.max_queue_size)
            .with_max_export_batch_size(config.batch.max_export_batch_size)
            .with_scheduled_delay(config.batch.schedule_delay)
            .build();
        let exporter = Guarded::new(exporter, outage, config.batch.export_timeout);
        BatchLogProcessor::builder(exporter).with_batch_config(batch).build()
    }
    if config.exporters.is_empty() {
        return Ok(None);
    }
    let mut builder = SdkLoggerProvider::builder().with_resource(resource.clone());
    for exporter in &config.exporters {
        builder = builder.with_log_processor(match exporter {
            LogsExporter::Otlp(otlp) => {
                processor(otlp::log_exporter(otlp)?, config, Outage::new("log records", &otlp.endpoint))
            }
            LogsExporter::Console => {
                let outage = Outage::new("log records", "standard output");
                processor(opentelemetry_stdout::LogExporter::default(), config, outage)
            }
        });
    }
    Ok(Some(builder.build()))
}

/// Copies chosen members of baggage to the attributes of each span that starts. No member is copied by
/// default, because callers decide what baggage holds, and it may be personal data.
#[derive(Debug)]
struct BaggageAttributes(Vec<String>);

impl SpanProcessor for BaggageAttributes {
    fn on_start(&self, span: &mut Span, cx: &Context) {
        for key in &self.0 {
            if let Some(value) = cx.baggage().get(key) {
                span.set_attribute(KeyValue::new(key.clone(), value.clone()));
            }
        }
    }

    fn on_end(&self, _span: SpanData) {}

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}
