//! Metrics and log records, over every transport, in every encoding and compression.

use crate::{Fixture, JSON, MILLISECOND, NOON, PROTOBUF, attribute, span, text, trace_id};
use anyhow::Result;
use backend::{
    Limits, LogStatistics,
    receiver::{Receiver, Refusal},
};
use flate2::{Compression, write::GzEncoder};
use http::{Method, uri::PathAndQuery};
use loopback::client::Client;
use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
        trace::v1::ExportTraceServiceResponse,
    },
    common::v1::{AnyValue, InstrumentationScope, any_value::Value},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs},
    metrics::v1::{
        AggregationTemporality, Exemplar, ExponentialHistogram, ExponentialHistogramDataPoint, Gauge,
        Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, Summary,
        SummaryDataPoint, metric::Data, number_data_point, summary_data_point::ValueAtQuantile,
    },
    resource::v1::Resource,
};
use prost::Message;
use serde::Serialize;
use serde_json::json;
use std::{io::Write, net::SocketAddr};
use tonic::{codec::CompressionEncoding, transport::Endpoint};
use tonic_prost::ProstCodec;

const METRICS: (&str, &str) = ("/v1/metrics", "metrics.v1.MetricsService");
const LOGS: (&str, &str) = ("/v1/logs", "logs.v1.LogsService");

fn zipped(how: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    match how {
        "gzip" => {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(bytes)?;
            Ok(encoder.finish()?)
        }
        "zstd" => Ok(zstd::encode_all(bytes, 0)?),
        _ => Ok(bytes.into()),
    }
}

/// Sends a request over each transport in each encoding and compression. Each of the nine requests must
/// succeed without rejected items.
async fn send_in_every_way<R>(
    (http, grpc): (SocketAddr, SocketAddr),
    (path, service): (&str, &str),
    request: &R,
) -> Result<usize>
where
    R: Message + Clone + Default + Serialize + 'static,
{
    let mut sent = 0;
    for (headers, body) in [(PROTOBUF, request.encode_to_vec()), (JSON, serde_json::to_vec(request)?)] {
        for encoding in ["identity", "gzip", "zstd"] {
            let headers = [headers, ("content-encoding", encoding)];
            let url = format!("http://{http}{path}");
            let answer = Client::new().send(Method::POST, &url, &headers, zipped(encoding, &body)?).await?;
            let nothing = if headers[0] == JSON { &b"{}"[..] } else { b"" };
            assert_eq!((answer.status.as_u16(), &answer.body[..]), (200, nothing), "{headers:?}");
            sent += 1;
        }
    }
    let channel = Endpoint::from_shared(format!("http://{grpc}"))?.connect().await?;
    for encoding in [None, Some(CompressionEncoding::Gzip), Some(CompressionEncoding::Zstd)] {
        let mut client = tonic::client::Grpc::new(channel.clone());
        if let Some(encoding) = encoding {
            client = client.send_compressed(encoding);
        }
        client.ready().await?;
        let path = format!("/opentelemetry.proto.collector.{service}/Export");
        let codec = ProstCodec::<R, ()>::default();
        let request = tonic::Request::new(request.clone());
        client.unary(request, PathAndQuery::try_from(path)?, codec).await?;
        sent += 1;
    }
    Ok(sent)
}

fn shop() -> Option<Resource> {
    Some(Resource { attributes: vec![text("service.name", "shop")], ..Resource::default() })
}

fn library() -> Option<InstrumentationScope> {
    Some(InstrumentationScope { name: "library".to_owned(), ..InstrumentationScope::default() })
}

/// Returns one metric of each kind.
fn metrics() -> ExportMetricsServiceRequest {
    let number = |value| NumberDataPoint {
        attributes: vec![text("route", "/buy")],
        start_time_unix_nano: NOON,
        time_unix_nano: NOON + MILLISECOND,
        value: Some(value),
        ..NumberDataPoint::default()
    };
    let cumulative = AggregationTemporality::Cumulative.into();
    let delta = AggregationTemporality::Delta.into();
    let sum = |is_monotonic, value| {
        let data_points = vec![number(number_data_point::Value::AsInt(value))];
        Data::Sum(Sum { data_points, aggregation_temporality: cumulative, is_monotonic })
    };
    let histogram = HistogramDataPoint {
        attributes: vec![attribute("status", Value::IntValue(200))],
        count: 3,
        sum: Some(1.5),
        bucket_counts: vec![1, 2],
        explicit_bounds: vec![0.5],
        exemplars: vec![Exemplar::default()],
        ..HistogramDataPoint::default()
    };
    let exponential = ExponentialHistogramDataPoint {
        count: 4,
        sum: Some(2.5),
        ..ExponentialHistogramDataPoint::default()
    };
    let summary = SummaryDataPoint {
        count: 5,
        sum: 3.5,
        quantile_values: vec![ValueAtQuantile { quantile: 0.5, value: 1.0 }],
        ..SummaryDataPoint::default()
    };
    let data = [
        Data::Gauge(Gauge { data_points: vec![number(number_data_point::Value::AsDouble(0.5))] }),
        sum(true, 7),
        sum(false, -7),
        Data::Histogram(Histogram { data_points: vec![histogram], aggregation_temporality: delta }),
        Data::ExponentialHistogram(ExponentialHistogram {
            data_points: vec![exponential],
            aggregation_temporality: delta,
        }),
        Data::Summary(Summary { data_points: vec![summary] }),
    ];
    let metrics = data.map(|data| Metric {
        name: "shop.sales".to_owned(),
        unit: "{sale}".to_owned(),
        data: Some(data),
        ..Metric::default()
    });
    let scope_metrics =
        vec![ScopeMetrics { scope: library(), metrics: metrics.into(), ..ScopeMetrics::default() }];
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: shop(),
            scope_metrics,
            ..ResourceMetrics::default()
        }],
    }
}

/// Returns a log record that belongs to span 2 of trace 1.
fn record(body: &str) -> LogRecord {
    LogRecord {
        time_unix_nano: NOON,
        observed_time_unix_nano: NOON + MILLISECOND,
        severity_number: 13,
        severity_text: "WARN".to_owned(),
        body: Some(AnyValue { value: Some(Value::StringValue(body.to_owned())) }),
        attributes: vec![text("cart", "full")],
        trace_id: 1_u128.to_be_bytes().into(),
        span_id: 2_u64.to_be_bytes().into(),
        flags: 1,
        ..LogRecord::default()
    }
}

fn logs(records: impl IntoIterator<Item = LogRecord>) -> ExportLogsServiceRequest {
    let log_records = records.into_iter().collect();
    let scope_logs = vec![ScopeLogs { scope: library(), log_records, ..ScopeLogs::default() }];
    ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs { resource: shop(), scope_logs, ..ResourceLogs::default() }],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_keeps_every_data_point() -> Result<()> {
    let receiver = Receiver::start().await?;
    let sent = send_in_every_way((receiver.http, receiver.grpc), METRICS, &metrics()).await?;
    let received = receiver.metrics();
    assert_eq!((sent, received.len(), receiver.metrics_requests().len()), (9, 54, 9));
    let [gauge, counter, up_down_counter, histogram, exponential, summary] = &received[..6] else {
        panic!("six kinds")
    };
    for same in received.chunks(6) {
        assert_eq!(same, &received[..6]);
    }
    for metric in &received {
        let names = [&metric.service, &metric.scope, &metric.name, &metric.unit].map(|name| &**name);
        assert_eq!(names, ["shop", "library", "shop.sales", "{sale}"]);
        assert_eq!(metric.resource["service.name"], "shop");
    }
    assert_eq!((gauge.kind, gauge.temporality, gauge.value), ("GAUGE", "UNSPECIFIED", 0.5));
    assert_eq!((counter.kind, counter.temporality, counter.value), ("COUNTER", "CUMULATIVE", 7.0));
    assert_eq!((counter.start, counter.time), (NOON, NOON + MILLISECOND));
    assert_eq!(counter.attributes["route"], "/buy");
    assert_eq!((up_down_counter.kind, up_down_counter.value), ("UP_DOWN_COUNTER", -7.0));
    assert_eq!((histogram.kind, histogram.temporality), ("HISTOGRAM", "DELTA"));
    assert_eq!((histogram.count, histogram.value), (3, 1.5));
    assert_eq!((&histogram.bounds[..], &histogram.buckets[..]), (&[0.5][..], &[1, 2][..]));
    assert_eq!(histogram.attributes["status"], "200");
    assert_eq!((exponential.kind, exponential.count), ("EXPONENTIAL_HISTOGRAM", 4));
    assert_eq!((summary.kind, summary.count, summary.value), ("SUMMARY", 5, 3.5));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_keeps_every_log_record() -> Result<()> {
    let receiver = Receiver::start().await?;
    let outside = LogRecord { trace_id: Vec::new(), span_id: Vec::new(), ..record("outside") };
    let request = logs([record("inside"), outside]);
    let sent = send_in_every_way((receiver.http, receiver.grpc), LOGS, &request).await?;
    let received = receiver.logs();
    assert_eq!((sent, received.len(), receiver.logs_requests().len()), (9, 18, 9));
    for same in received.chunks(2) {
        assert_eq!(same, &received[..2]);
    }
    let inside = receiver.expect_log(|record| record.body == "inside").await;
    assert_eq!([&*inside.service, &*inside.scope, &*inside.severity], ["shop", "library", "WARN"]);
    assert_eq!((inside.severity_number, inside.flags), (13, 1));
    assert_eq!((inside.trace_id, &*inside.span_id), (trace_id(1), "0000000000000002"));
    assert_eq!((inside.time, inside.observed), (NOON, NOON + MILLISECOND));
    assert_eq!(inside.attributes["cart"], "full");
    let outside = receiver.expect_log(|record| record.body == "outside").await;
    assert_eq!((&*outside.trace_id, &*outside.span_id), ("", ""));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_logs_leave_the_refusals_to_the_spans() -> Result<()> {
    let receiver = Receiver::start().await?;
    receiver.refuse([Refusal::Invalid]);
    let addresses = (receiver.http, receiver.grpc);
    send_in_every_way(addresses, METRICS, &metrics()).await?;
    send_in_every_way(addresses, LOGS, &logs([record("inside")])).await?;
    let url = format!("http://{}/v1/traces", receiver.http);
    let spans = crate::request("shop", [span(1, 1, 0, "buy")]).encode_to_vec();
    for status in [400, 200] {
        let answer = Client::new().send(Method::POST, &url, &[PROTOBUF], spans.clone()).await?;
        assert_eq!(answer.status, status);
    }
    assert_eq!((receiver.spans().len(), receiver.requests().len()), (1, 2));
    Ok(())
}

impl Fixture {
    async fn export_logs(&self, records: impl IntoIterator<Item = LogRecord>) -> Result<bytes::Bytes> {
        let url = format!("http://{}/v1/logs", self.backend.addresses().otlp_http);
        let body = logs(records).encode_to_vec();
        let answer = self.client.send(Method::POST, &url, &[PROTOBUF], body).await?;
        assert_eq!(answer.status, 200);
        Ok(answer.body)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_counts_metrics_and_forgets_them() -> Result<()> {
    let fixture = Fixture::start().await?;
    let addresses = fixture.backend.addresses();
    send_in_every_way((addresses.otlp_http, addresses.otlp_grpc), METRICS, &metrics()).await?;
    let statistics = fixture.backend.statistics();
    assert_eq!((statistics.data_points, statistics.received, statistics.bytes), (54, 0, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_logs_of_a_trace_are_answered_by_their_time_whenever_they_came() -> Result<()> {
    let fixture = Fixture::start().await?;
    let addresses = fixture.backend.addresses();
    let later = LogRecord { time_unix_nano: NOON + 2 * MILLISECOND, ..record("later") };
    // This record has no time of its own, and its severity has no name.
    let observed = LogRecord {
        time_unix_nano: 0,
        severity_number: 17,
        severity_text: String::new(),
        attributes: Vec::new(),
        span_id: Vec::new(),
        body: None,
        ..record("")
    };
    fixture.export_logs([later, observed]).await?;
    fixture.export("shop", [span(1, 2, 0, "buy")]).await?;
    let outside = LogRecord { trace_id: Vec::new(), ..record("outside") };
    let invalid = LogRecord { trace_id: vec![1; 15], ..record("invalid") };
    let elsewhere = LogRecord { trace_id: 2_u128.to_be_bytes().into(), ..record("elsewhere") };
    let request = logs([record("first"), outside, invalid, elsewhere]);
    let sent = send_in_every_way((addresses.otlp_http, addresses.otlp_grpc), LOGS, &request).await?;

    let answer = fixture.get(&format!("/api/logs/{}", trace_id(1))).await?;
    let records = answer.json()["data"].clone();
    let noon = NOON / 1000;
    let text = |key: &str, value: &str| json!({ "key": key, "type": "string", "value": value });
    let expected = |timestamp: u64, span_id: &str, severity: &str, body: &str| {
        let attributes = if body.is_empty() { vec![] } else { vec![text("cart", "full")] };
        json!({ "spanID": span_id, "timestamp": timestamp, "severity": severity, "body": text("", body),
            "attributes": attributes })
    };
    assert_eq!(records[0], expected(noon, "0000000000000002", "WARN", "first"));
    assert_eq!(records[sent], expected(noon + 1000, "", "ERROR", ""));
    assert_eq!(records[sent + 1], expected(noon + 2000, "0000000000000002", "WARN", "later"));
    assert_eq!(records.as_array().map(Vec::len), Some(11));
    // The response of Jaeger's own API doesn't contain the log records.
    let trace = fixture.get(&format!("/api/traces/{}", trace_id(1))).await?.json();
    assert_eq!(trace["data"][0]["spans"][0]["logs"], json!([]));

    let statistics = fixture.backend.statistics();
    assert_eq!(statistics.traces, 1);
    let LogStatistics { records, received, untraced, rejected, evicted, .. } = statistics.logs;
    assert_eq!((records, received, untraced, rejected, evicted), (20, 38, 18, 0, 0));
    assert_eq!(fixture.get(&format!("/api/logs/{}", trace_id(3))).await?.json()["data"], json!([]));
    assert_eq!(fixture.get("/api/logs/x").await?.status, 400);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_bounded_by_number_and_bytes_and_of_one_trace_to_a_quarter() -> Result<()> {
    let of_trace =
        |trace: u128, body: &str| LogRecord { trace_id: trace.to_be_bytes().into(), ..record(body) };
    let fixture = Fixture::with_limits(Limits { spans: 100, bytes: 1_000_000 }).await?;
    let body = fixture.export_logs((0..30).map(|_| of_trace(1, "many"))).await?;
    let partial = ExportTraceServiceResponse::decode(body)?.partial_success.expect("a partial success");
    let reason = "the first rejected item: the records of its trace already take a quarter of the store";
    assert_eq!((partial.rejected_spans, partial.error_message.as_str()), (5, reason));
    for trace in 2..=5 {
        fixture.export_logs((0..25).map(|_| of_trace(trace, "many"))).await?;
    }
    // The oldest trace's records were evicted.
    let LogStatistics { records, received, rejected, evicted, .. } = fixture.backend.statistics().logs;
    assert_eq!((records, received, rejected, evicted), (100, 130, 5, 25));
    assert_eq!(fixture.get(&format!("/api/logs/{}", trace_id(1))).await?.json()["total"], 0);
    assert_eq!(fixture.get(&format!("/api/logs/{}", trace_id(2))).await?.json()["total"], 25);

    let large = "x".repeat(200_000);
    for trace in 6..=20 {
        fixture.export_logs([of_trace(trace, &large), of_trace(trace, &large)]).await?;
        assert!(fixture.backend.statistics().logs.bytes <= 1_000_000);
    }
    let logs = fixture.backend.statistics().logs;
    assert_eq!((logs.records, logs.rejected), (4, 20));
    assert!(logs.bytes > 800_000, "{logs:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_forms_of_json_that_otlp_allows_are_taken_and_an_error_names_the_member() -> Result<()> {
    let fixture = Fixture::start().await?;
    let request = |double: serde_json::Value| {
        let attributes = json!([{ "key": "ratio", "value": { "doubleValue": double } }]);
        json!({ "resourceSpans": [{ "resource": null, "schemaUrl": null, "scopeSpans": [{ "scope": null, "spans": [{
            "traceId": trace_id(1), "spanId": "00000000000000a1", "parentSpanId": null, "name": "buy",
            "kind": "2", "startTimeUnixNano": NOON.to_string(), "endTimeUnixNano": NOON, "links": null,
            "events": null, "status": null, "attributes": attributes,
        }]}]}]})
        .to_string()
    };
    for double in [json!("much"), json!([1])] {
        let answer = fixture.post(&[JSON], request(double)).await?;
        assert_eq!(answer.status, 400);
        let message = answer.json()["message"].as_str().expect("a text").to_owned();
        let member = "resourceSpans[0].scopeSpans[0].spans[0].attributes[0].value";
        assert!(message.starts_with(member), "{message}");
    }
    assert_eq!(fixture.post(&[JSON], request(json!("NaN"))).await?.status, 200);
    let spans = fixture.backend.trace(&trace_id(1));
    assert_eq!((spans[0].kind, spans[0].attributes["ratio"].as_str()), ("SERVER", "NaN"));
    Ok(())
}
