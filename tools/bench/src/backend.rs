//! Measures how many spans a second the embedded trace backend accepts. A generator on the same machine sends
//! them over OTLP/gRPC, in batches of 512.
//!
//! The generator encodes a single batch, and sends this batch again and again, each time with new ids. A row
//! shows the medians of several runs, each with a new backend process.

use super::{cpu_time, median, print, resident};
use ::backend::{Addresses, Limits, Statistics};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::Args;
use harness::client::Client;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span::SpanKind, status::StatusCode},
};
use prost::Message;
use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};
use tonic::{client::Grpc, codegen::http::uri::PathAndQuery, transport::Endpoint};
use tonic_prost::ProstCodec;

/// The default batch size of OpenTelemetry's SDKs.
const BATCH: usize = 512;
/// The number of spans of a login.
const SPANS_OF_A_TRACE: usize = 6;
/// Eight bytes that occur nowhere else in a batch. In every id, these bytes are replaced by the number of the
/// batch.
const PLACEHOLDER: u64 = 0xA5C3_5AA5_C35A_A5C3;

/// How to measure.
#[derive(Args)]
pub struct Options {
    /// Spans a second in the paced part.
    #[arg(long, default_value_t = 50_000)]
    rate: u32,
    /// Connections of the generator.
    #[arg(long, default_value_t = 2)]
    connections: usize,
    /// Runs. The table shows their medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a run, in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// A backend process, which is killed when this value is dropped.
struct BackendProcess {
    addresses: Addresses,
    id: u32,
    _child: Child,
}

/// The measurements of one run.
struct Run {
    spans_per_second: f64,
    /// How many of the sent spans are neither stored nor evicted.
    dropped: f64,
    /// How many cores the backend used on average.
    cpu: f64,
    /// The memory of the stored spans as the store counts it, in megabytes.
    accounted: f64,
    /// Resident memory of the backend at the end of the load, in megabytes.
    resident: f64,
    /// Milliseconds of a search through all stored traces.
    search: f64,
    /// Milliseconds to read a trace of 10,000 spans.
    large_trace: f64,
}

/// Measures the backend, and prints a table.
///
/// # Errors
/// If the backend doesn't start, or if it refuses spans.
pub async fn run(options: Options) -> Result<()> {
    let Limits { spans, bytes } = Limits::default();
    print(&format!(
        "medians of {} runs of {} s; bounds: {spans} spans, {} MiB\n{:<16}{:>12}{:>10}{:>8}{:>14}{:>10}{:>11}{:>15}\n",
        options.rounds,
        options.seconds,
        bytes >> 20,
        "",
        "spans/s",
        "dropped",
        "cores",
        "accounted MB",
        "RSS MB",
        "search ms",
        "10,000 spans ms"
    ));
    for (name, rate) in [("paced", Some(options.rate)), ("closed loop", None)] {
        let mut runs = Vec::new();
        for _ in 0..options.rounds {
            runs.push(measure(&options, rate).await?);
        }
        let of = |value: fn(&Run) -> f64| median(runs.iter().map(value));
        print(&format!(
            "{name:<16}{:>12.0}{:>10.0}{:>8.2}{:>14.1}{:>10.1}{:>11.1}{:>15.1}\n",
            of(|run| run.spans_per_second),
            of(|run| run.dropped),
            of(|run| run.cpu),
            of(|run| run.accounted),
            of(|run| run.resident),
            of(|run| run.search),
            of(|run| run.large_trace),
        ));
    }
    Ok(())
}

async fn measure(options: &Options, rate: Option<u32>) -> Result<Run> {
    let backend = BackendProcess::start().await?;
    let endpoint = Endpoint::from_shared(format!("http://{}", backend.addresses.otlp_grpc))?;
    let batches = Arc::new(AtomicU64::new(0));
    let template = Template::new();
    let (start, cpu_before) = (Instant::now(), cpu_time(backend.id)?);
    let end = start + Duration::from_secs(options.seconds);
    let mut senders = JoinSet::new();
    for _ in 0..options.connections {
        let client = Grpc::new(endpoint.connect().await?);
        let beat = rate.map(|rate| {
            Duration::from_secs_f64((BATCH * options.connections) as f64 / f64::from(rate.max(1)))
        });
        senders.spawn(send(client, template.clone(), Arc::clone(&batches), beat, end));
    }
    while let Some(sender) = senders.join_next().await {
        sender??;
    }
    let seconds = start.elapsed().as_secs_f64();
    let cpu = (cpu_time(backend.id)? - cpu_before).as_secs_f64() / seconds;

    let sent = batches.load(Relaxed) * BATCH as u64;
    let statistics = backend.statistics().await?;
    let kept = statistics.spans as u64 + statistics.evicted;
    let resident = resident(backend.id)?;
    let (search, large_trace) = query(&backend.addresses).await?;
    Ok(Run {
        spans_per_second: sent as f64 / seconds,
        dropped: sent as f64 - kept as f64,
        cpu,
        accounted: statistics.bytes as f64 / 1e6,
        resident,
        search,
        large_trace,
    })
}

impl BackendProcess {
    async fn start() -> Result<Self> {
        let free = "127.0.0.1:0";
        let mut child = Command::new(std::env::current_exe()?)
            .args(["backend", "--otlp-grpc", free, "--otlp-http", free, "--query", free])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let said = BufReader::new(child.stdout.take().context("stdout")?).lines().next_line().await?;
        let said = said.context("the backend did not start")?;
        let address = |name: &str| {
            let (_, rest) = said.split_once(name).with_context(|| said.clone())?;
            Ok::<_, anyhow::Error>(rest.split(' ').next().unwrap_or_default().parse()?)
        };
        let addresses = Addresses {
            otlp_grpc: address("otlp_grpc=")?,
            otlp_http: address("otlp_http=")?,
            query: address("query=")?,
        };
        let id = child.id().context("it ended")?;
        Ok(Self { addresses, id, _child: child })
    }

    async fn statistics(&self) -> Result<Statistics> {
        let answer = Client::new().get(&format!("http://{}/api/statistics", self.addresses.query)).await?;
        Ok(serde_json::from_value(answer.json()["statistics"].take())?)
    }
}

/// Sends batches until `end`: one batch every `beat`, or, without a beat, each batch as soon as the previous
/// batch is answered.
async fn send(
    mut client: Grpc<tonic::transport::Channel>,
    template: Template,
    batches: Arc<AtomicU64>,
    beat: Option<Duration>,
    end: Instant,
) -> Result<()> {
    let path = PathAndQuery::from_static("/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    let mut beat = beat.map(interval);
    if let Some(beat) = &mut beat {
        beat.set_missed_tick_behavior(MissedTickBehavior::Burst);
    }
    while Instant::now() < end {
        if let Some(beat) = &mut beat {
            beat.tick().await;
        }
        let request = template.batch(batches.fetch_add(1, Relaxed) + 1);
        client.ready().await?;
        let codec = ProstCodec::<EncodedRequest, ExportTraceServiceResponse>::default();
        let response = client.unary(tonic::Request::new(request), path.clone(), codec).await?;
        ensure!(response.get_ref().partial_success.is_none(), "{response:?}");
    }
    Ok(())
}

/// Returns the milliseconds of a search without results through all traces, and of reading a trace of 10,000
/// spans.
async fn query(addresses: &Addresses) -> Result<(f64, f64)> {
    let query = format!("http://{}/api/traces", addresses.query);
    let client = Client::new();
    let start = Instant::now();
    let answer = client.get(&format!("{query}?service=shop&tag=user.id:nobody")).await?;
    let search = start.elapsed();
    ensure!(answer.json()["total"] == 0, "{answer:?}");

    let spans = (0..10_000).map(|i| span(u128::MAX, i + 1, i)).collect();
    let url = format!("http://{}/v1/traces", addresses.otlp_http);
    let headers = [("content-type", "application/x-protobuf")];
    let answer = client.send(http::Method::POST, &url, &headers, request(spans).encode_to_vec()).await?;
    ensure!(answer.status == 200 && answer.body.is_empty(), "{answer:?}");
    let start = Instant::now();
    let answer = client.get(&format!("{query}/{:032x}", u128::MAX)).await?;
    let large_trace = start.elapsed();
    let spans = answer.json()["data"][0]["spans"].as_array().map(Vec::len);
    ensure!(spans == Some(10_000), "{spans:?}");
    Ok((search.as_secs_f64() * 1e3, large_trace.as_secs_f64() * 1e3))
}

/// An `ExportTraceServiceRequest` whose resource spans are already encoded. This makes no difference on the
/// wire.
#[derive(Clone, PartialEq, Message)]
struct EncodedRequest {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    resource_spans: Vec<Bytes>,
}

/// An encoded batch that is sent many times, each time with other ids.
#[derive(Clone)]
struct Template {
    encoded: Vec<u8>,
    /// The offsets of the placeholders in the ids.
    placeholders: Vec<usize>,
}

impl Template {
    fn new() -> Self {
        let spans = (0..BATCH).map(|i| {
            let (trace, of_trace) = (i / SPANS_OF_A_TRACE, i % SPANS_OF_A_TRACE);
            let trace_id = u128::from(PLACEHOLDER) << 64 | (trace as u128 + 1);
            span(trace_id, i as u64 + 1, if of_trace == 0 { 0 } else { i as u64 })
        });
        let encoded = request(spans.collect()).resource_spans[0].encode_to_vec();
        let placeholder = PLACEHOLDER.to_be_bytes();
        let found = encoded.windows(8).enumerate().filter(|(_, window)| **window == placeholder);
        let placeholders = found.map(|(i, _)| i).collect();
        Self { encoded, placeholders }
    }

    fn batch(&self, number: u64) -> EncodedRequest {
        let mut encoded = self.encoded.clone();
        for i in &self.placeholders {
            encoded[*i..i + 8].copy_from_slice(&number.to_be_bytes());
        }
        EncodedRequest { resource_spans: vec![encoded.into()] }
    }
}

fn request(spans: Vec<Span>) -> ExportTraceServiceRequest {
    let scope = InstrumentationScope { name: "bench".into(), version: "1.0".into(), ..Default::default() };
    let resource = Resource {
        attributes: vec![
            text("service.name", "shop"),
            text("service.version", "0.1.0"),
            text("service.instance.id", "0e2f5a1c-8f6f-4a8f-9a53-1d2b3c4d5e6f"),
            text("host.name", "shop-7d9c5b6f4-x2x4z"),
            text("telemetry.sdk.language", "rust"),
        ],
        ..Resource::default()
    };
    let scope_spans = ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() };
    let resource_spans =
        ResourceSpans { resource: Some(resource), scope_spans: vec![scope_spans], ..Default::default() };
    ExportTraceServiceRequest { resource_spans: vec![resource_spans] }
}

/// Makes a span with the attributes of an HTTP request.
fn span(trace_id: u128, id: u64, parent: u64) -> Span {
    const START: u64 = 1_769_860_800_000_000_000;

    let number = |key: &str, number| attribute(key, Value::IntValue(number));
    Span {
        trace_id: trace_id.to_be_bytes().into(),
        span_id: id.to_be_bytes().into(),
        parent_span_id: if parent == 0 { Vec::new() } else { parent.to_be_bytes().into() },
        flags: 0x101,
        name: "POST /usercenter/v1/user/login".into(),
        kind: SpanKind::Server.into(),
        start_time_unix_nano: START + id * 1000,
        end_time_unix_nano: START + id * 1000 + 2_345_678,
        attributes: vec![
            text("http.request.method", "POST"),
            text("http.route", "/usercenter/v1/user/login"),
            number("http.response.status_code", 200),
            text("url.path", "/usercenter/v1/user/login"),
            text("url.scheme", "http"),
            text("user_agent.original", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101"),
            text("network.protocol.version", "1.1"),
            text("server.address", "127.0.0.1"),
            number("server.port", 8888),
            text("client.address", "127.0.0.1"),
            text("network.peer.address", "127.0.0.1"),
            number("network.peer.port", 54321),
        ],
        status: Some(Status { code: StatusCode::Unset.into(), message: String::new() }),
        ..Span::default()
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.into()))
}
