//! Set-up and shutdown.

use crate::{
    config::{Config, ConfigError, Exporter},
    export::{
        SpanCounts,
        batch::{self, BatchExport, Format},
        transport::Transport,
    },
    log, metrics, propagation,
};
use opentelemetry::{
    Context, KeyValue,
    baggage::BaggageExt,
    global,
    trace::{Span as _, TracerProvider},
};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SdkTracerProvider, Span, SpanData, SpanProcessor},
};
use std::time::Duration;
use tokio::time::Instant;

/// Tracing and logging of this process, from [`Telemetry::start`] on.
#[must_use = "spans are lost unless it is shut down"]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
    exports: Vec<BatchExport>,
}

impl Telemetry {
    /// Installs the tracer provider, the propagators and the log subscriber; starts the exporters.
    ///
    /// Call it first, inside of the tokio runtime: layers made before it would use a tracer that does
    /// nothing. It opens no connection yet.
    ///
    /// # Errors
    /// If it can't listen where Prometheus is to find the metrics.
    pub fn start(config: Config) -> Result<Self, ConfigError> {
        let metrics = config.metrics.map(metrics::listen).transpose()?;
        // Propagation works with the SDK disabled, too: the caller's context is passed on.
        global::set_text_map_propagator(propagation::composite(&config.propagators));
        if config.sdk_disabled {
            log::install(config.log, None);
            if let Some(listener) = metrics {
                metrics::serve(listener, Vec::new());
            }
            return Ok(Self { provider: None, exports: Vec::new() });
        }

        let mut exports = Vec::new();
        let mut builder = SdkTracerProvider::builder()
            .with_resource(config.resource.clone())
            .with_sampler(config.sampler)
            .with_span_limits(config.limits);
        if !config.baggage_attributes.is_empty() {
            builder = builder.with_span_processor(BaggageAttributes(config.baggage_attributes));
        }
        for exporter in config.exporters {
            let (format, transport) = match exporter {
                Exporter::Otlp(otlp) => (Format::Otlp, Transport::otlp(otlp)),
                Exporter::Zipkin { endpoint, timeout } => {
                    (Format::Zipkin, Transport::zipkin(endpoint, timeout))
                }
                Exporter::Console => {
                    builder = builder.with_simple_exporter(opentelemetry_stdout::SpanExporter::default());
                    continue;
                }
            };
            let (processor, export) = batch::start(format, transport, config.resource.clone(), config.batch);
            builder = builder.with_span_processor(processor);
            exports.push(export);
        }
        let provider = builder.build();
        log::install(config.log, Some(provider.tracer("tracing")));
        global::set_tracer_provider(provider.clone());
        if let Some(listener) = metrics {
            metrics::serve(listener, exports.iter().map(BatchExport::queue).collect());
        }
        Ok(Self { provider: Some(provider), exports })
    }

    /// What became of the spans that ended so far, for each exporter that sends them in batches.
    pub fn span_counts(&self) -> impl Iterator<Item = SpanCounts> {
        self.exports.iter().map(|export| export.queue().counts())
    }

    /// Sends the spans that ended, for at most `limit`, and logs what became of them.
    ///
    /// Call it last, when requests and deliveries are finished, and on failure, too: the last spans
    /// matter most.
    pub async fn shut_down(self, limit: Duration) {
        let deadline = Instant::now() + limit;
        // All at once: one that gets no answer must not take the others' time.
        self.exports.iter().for_each(BatchExport::close);
        for export in self.exports {
            let SpanCounts { ended, exported, dropped } = export.shut_down(deadline).await;
            let dropped = dropped.total();
            if dropped > 0 {
                tracing::warn!(ended, exported, dropped, "spans were lost");
            } else {
                tracing::info!(ended, exported, dropped, "all spans exported");
            }
        }
        if let Some(Err(error)) = self.provider.map(|provider| provider.shutdown()) {
            tracing::warn!(%error, "shutting down the tracer provider");
        }
    }
}

/// Copies chosen members of baggage to the attributes of each span that starts. None by default: whoever
/// calls decides what is in baggage, and it may be personal.
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
