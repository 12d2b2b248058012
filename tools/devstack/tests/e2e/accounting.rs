//! The services count their spans exactly: at any moment, ended = exported + dropped + waiting.

use anyhow::{Context, Result, ensure};
use harness::{
    PATIENCE,
    client::Client,
    poll,
    process::Process,
    stack::{KNOWN_MOBILE, Stack},
};
use std::{fs, net::TcpListener};
use tokio::task::JoinSet;

/// Makes each service serve its metrics on a free port.
const METRICS: [(&str, &str, &str); 2] =
    [("*", "OTEL_METRICS_EXPORTER", "prometheus"), ("*", "OTEL_EXPORTER_PROMETHEUS_PORT", "0")];

/// The span counts at one moment.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    ended: u64,
    exported: u64,
    dropped: u64,
    waiting: u64,
}

impl Counts {
    async fn of(service: &Process) -> Result<Self> {
        let line = service.said("metrics for Prometheus").await?;
        let address = line.split_once("address=").context("address")?.1;
        let answer = Client::new().get(&format!("http://{address}/metrics")).await?;
        ensure!(answer.status == 200, "{}", answer.status);
        let mut counts = Self::default();
        let text = String::from_utf8(answer.body.to_vec())?;
        for line in text.lines() {
            let Some((name, rest)) = line.strip_prefix("otel_sdk_").and_then(|line| line.split_once('{'))
            else {
                continue;
            };
            let (labels, value) = rest.rsplit_once(' ').context("value")?;
            let (value, failed) = (value.parse::<u64>()?, labels.contains("error_type"));
            match name {
                "processor_span_processed_total" => {
                    counts.ended += value;
                    counts.dropped += if failed { value } else { 0 };
                }
                "exporter_span_exported_total" if failed => counts.dropped += value,
                "exporter_span_exported_total" => counts.exported += value,
                "processor_span_queue_size" => {
                    counts.ended += value;
                    counts.waiting += value;
                }
                "exporter_span_inflight" => counts.waiting += value,
                "processor_span_queue_capacity" => {}
                other => anyhow::bail!("{other}"),
            }
        }
        let Self { ended, exported, dropped, waiting } = counts;
        ensure!(ended == exported + dropped + waiting, "{counts:?}");
        Ok(counts)
    }
}

async fn log_in(stack: &Stack, times: usize) -> Result<()> {
    let mut logins = JoinSet::new();
    for _ in 0..8 {
        let (client, url) = (stack.client.clone(), stack.login_url());
        logins.spawn(async move {
            for _ in 0..times / 8 {
                let body = format!("{{\"mobile\":\"{KNOWN_MOBILE}\"}}");
                let json = [("content-type", "application/json")];
                let answer = client.send(http::Method::POST, &url, &json, body).await?;
                ensure!(answer.status == 200, "{}", answer.status);
            }
            Ok(())
        });
    }
    while let Some(done) = logins.join_next().await {
        done??;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_span_that_ended_is_exported_dropped_or_waiting_at_any_moment() -> Result<()> {
    let stack = Stack::start(&METRICS).await?;
    let api = Counts::of(&stack.api).await?;
    assert_eq!(api, Counts::default());
    let (logins, counts) = tokio::join!(log_in(&stack, 400), async {
        for _ in 0..20 {
            Counts::of(&stack.api).await?;
        }
        anyhow::Ok(())
    });
    logins?;
    counts?;
    for (service, spans) in [(&stack.api, 1600), (&stack.rpc, 400), (&stack.mq, 400)] {
        let all = Counts { ended: spans, exported: spans, ..Counts::default() };
        let counts = async || Counts::of(service).await.ok().filter(|counts| *counts == all);
        ensure!(poll(PATIENCE, counts).await.is_some(), "{}: {:?}", service.name, Counts::of(service).await);
    }
    assert_eq!(stack.receiver.spans().len(), 2400);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_for_a_collector_that_never_answers_are_counted_and_take_no_more_memory() -> Result<()> {
    // The kernel accepts connections to this port, but no program ever reads from them.
    let black_hole = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", black_hole.local_addr()?);
    let mut variables = METRICS.to_vec();
    variables.extend([
        ("*", "OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("*", "OTEL_BSP_MAX_QUEUE_SIZE", "1000"),
        // With this time-out, the first batch is never given up.
        ("*", "OTEL_BSP_EXPORT_TIMEOUT", "600000"),
        ("*", "SHUTDOWN_TIMEOUT", "2s"),
        ("*", "RUST_LOG", "info,api::login=warn"),
    ]);
    let mut stack = Stack::start(&variables).await?;
    // These logins fill the queue.
    log_in(&stack, 800).await?;
    let before = resident(&stack.api)?;
    log_in(&stack, 2400).await?;
    let grown = resident(&stack.api)?.saturating_sub(before);
    assert!(grown < 1500, "{grown} kB");

    let counts = Counts::of(&stack.api).await?;
    assert_eq!((counts.ended, counts.exported), (12_800, 0));
    // The 1000 waiting spans include the batch that is being sent.
    assert_eq!(counts.waiting, 1000, "{counts:?}");
    stack.stop().await?;
    stack.api.said("ended=12800 exported=0 dropped=12800").await?;
    Ok(())
}

/// Returns the resident memory of a process, in kB.
fn resident(process: &Process) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id()))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("kB")?.parse()?)
}
