//! Metrics as they were received, flattened to one value for each data point.

use crate::trace::attributes;
use opentelemetry_proto::tonic::{
    common::v1::KeyValue,
    metrics::v1::{
        self as otlp, AggregationTemporality, NumberDataPoint, ResourceMetrics, metric::Data,
        number_data_point::Value,
    },
};
use std::collections::BTreeMap;

/// A data point, with fields from its metric, scope and resource.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metric {
    /// The `service.name` of the metric's resource.
    pub service: String,
    /// The attributes of the metric's resource (the process that made the metric), as text.
    pub resource: BTreeMap<String, String>,
    /// The name of the metric's instrumentation scope.
    pub scope: String,
    /// The metric's name.
    pub name: String,
    /// The metric's unit, `s` for example.
    pub unit: String,
    /// `COUNTER` (a sum that only grows), `UP_DOWN_COUNTER` (any other sum), `GAUGE`, `HISTOGRAM`,
    /// `EXPONENTIAL_HISTOGRAM` or `SUMMARY`.
    pub kind: &'static str,
    /// `DELTA` or `CUMULATIVE`, or `UNSPECIFIED` for kinds without a temporality, such as a gauge.
    pub temporality: &'static str,
    /// The point's own attributes, as text.
    pub attributes: BTreeMap<String, String>,
    /// The value of a sum or of a gauge. For other kinds, the sum of the recorded values.
    pub value: f64,
    /// How many values were recorded, or 0 for a sum or a gauge.
    pub count: u64,
    /// The upper bounds of a histogram's buckets, except for the last bucket, which has no upper bound.
    pub bounds: Vec<f64>,
    /// How many values were recorded in each of a histogram's buckets.
    pub buckets: Vec<u64>,
    /// When the counted period began, in nanoseconds since 1970.
    pub start: u64,
    /// When the value was read, in nanoseconds since 1970.
    pub time: u64,
}

/// Returns the data points of one `ResourceMetrics` of an OTLP request.
pub fn metrics(resource_metrics: &ResourceMetrics) -> Vec<Metric> {
    let resource = resource_metrics.resource.as_ref().map(|r| attributes(&r.attributes)).unwrap_or_default();
    let mut points = Vec::new();
    for scope_metrics in &resource_metrics.scope_metrics {
        let scope = scope_metrics.scope.clone().unwrap_or_default();
        for metric in &scope_metrics.metrics {
            points.extend(data_points(metric).into_iter().map(|point| Metric {
                service: resource.get("service.name").cloned().unwrap_or_default(),
                resource: resource.clone(),
                scope: scope.name.clone(),
                name: metric.name.clone(),
                unit: metric.unit.clone(),
                ..point
            }));
        }
    }
    points
}

/// Returns how many data points one `ResourceMetrics` of an OTLP request has.
pub(crate) fn count(resource_metrics: &ResourceMetrics) -> usize {
    let metrics = resource_metrics.scope_metrics.iter().flat_map(|scope| &scope.metrics);
    let points = metrics.map(|metric| match &metric.data {
        None => 0,
        Some(Data::Gauge(gauge)) => gauge.data_points.len(),
        Some(Data::Sum(sum)) => sum.data_points.len(),
        Some(Data::Histogram(histogram)) => histogram.data_points.len(),
        Some(Data::ExponentialHistogram(histogram)) => histogram.data_points.len(),
        Some(Data::Summary(summary)) => summary.data_points.len(),
    });
    points.sum()
}

fn data_points(metric: &otlp::Metric) -> Vec<Metric> {
    match &metric.data {
        None => Vec::new(),
        Some(Data::Gauge(gauge)) => {
            gauge.data_points.iter().map(|point| number(point, "GAUGE", "UNSPECIFIED")).collect()
        }
        Some(Data::Sum(sum)) => {
            let kind = if sum.is_monotonic { "COUNTER" } else { "UP_DOWN_COUNTER" };
            let temporality = temporality(sum.aggregation_temporality());
            sum.data_points.iter().map(|point| number(point, kind, temporality)).collect()
        }
        Some(Data::Histogram(histogram)) => {
            let temporality = temporality(histogram.aggregation_temporality());
            let points = histogram.data_points.iter().map(|point| Metric {
                value: point.sum.unwrap_or_default(),
                count: point.count,
                bounds: point.explicit_bounds.clone(),
                buckets: point.bucket_counts.clone(),
                temporality,
                ..blank("HISTOGRAM", &point.attributes, point.start_time_unix_nano, point.time_unix_nano)
            });
            points.collect()
        }
        Some(Data::ExponentialHistogram(histogram)) => {
            let temporality = temporality(histogram.aggregation_temporality());
            let kind = "EXPONENTIAL_HISTOGRAM";
            let points = histogram.data_points.iter().map(|point| Metric {
                value: point.sum.unwrap_or_default(),
                count: point.count,
                temporality,
                ..blank(kind, &point.attributes, point.start_time_unix_nano, point.time_unix_nano)
            });
            points.collect()
        }
        Some(Data::Summary(summary)) => {
            let points = summary.data_points.iter().map(|point| Metric {
                value: point.sum,
                count: point.count,
                ..blank("SUMMARY", &point.attributes, point.start_time_unix_nano, point.time_unix_nano)
            });
            points.collect()
        }
    }
}

fn number(point: &NumberDataPoint, kind: &'static str, temporality: &'static str) -> Metric {
    let value = match point.value {
        Some(Value::AsDouble(value)) => value,
        Some(Value::AsInt(value)) => value as f64,
        None => f64::NAN,
    };
    let blank = blank(kind, &point.attributes, point.start_time_unix_nano, point.time_unix_nano);
    Metric { value, temporality, ..blank }
}

fn blank(kind: &'static str, of_point: &[KeyValue], start: u64, time: u64) -> Metric {
    let temporality = temporality(AggregationTemporality::Unspecified);
    Metric { kind, temporality, attributes: attributes(of_point), start, time, ..Metric::default() }
}

fn temporality(temporality: AggregationTemporality) -> &'static str {
    match temporality {
        AggregationTemporality::Unspecified => "UNSPECIFIED",
        AggregationTemporality::Delta => "DELTA",
        AggregationTemporality::Cumulative => "CUMULATIVE",
    }
}
