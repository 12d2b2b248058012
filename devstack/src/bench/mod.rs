//! What tracing costs: the three services as processes, a real broker, a collector that only counts, and
//! a load generator, all on this machine.
//!
//! Each round starts every variant afresh, one after the other, under the same load; the figures are
//! medians over the rounds, and ratios are taken within a round, so that a machine that is slower for
//! a while is slower for all. The last variant is the first one again: how far its ratios are from 1 is
//! how much the others mean.
//!
//! p50 and p99 are medians over the seconds of a run: a machine that is stopped for a moment, as virtual
//! ones are, spoils one second and not the run.

pub mod backend;
pub mod broker;
pub(crate) mod load;
mod sink;

use crate::{process::Process, stack::TestBroker};
use anyhow::{Context, Result, ensure};
use clap::Args;
use load::{Load, Report};
use sink::Sink;
use std::{fs, net::TcpListener, time::Duration};
use tokio::try_join;

/// How to measure.
#[derive(Args)]
pub struct Options {
    /// Logins a second in the paced part.
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    /// Connections in the closed loop.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Rounds; each runs every variant.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of measurement, after two of warm-up.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Only this part: paced or closed.
    #[arg(long)]
    only: Option<String>,
}

/// A way to run the services, by the variables that make it.
struct Variant {
    name: &'static str,
    variables: &'static [(&'static str, &'static str)],
    /// Spans that one login leaves.
    spans: u64,
    /// Whether the collector answers.
    has_collector: bool,
}

const DISABLED: Variant = Variant {
    name: "SDK disabled",
    variables: &[("OTEL_SDK_DISABLED", "true")],
    spans: 0,
    has_collector: true,
};

/// The first is what the others are compared with.
const VARIANTS: [Variant; 5] = [
    DISABLED,
    Variant { name: "sampled off", variables: &[("OTEL_TRACES_SAMPLER", "always_off")], ..DISABLED },
    Variant { name: "all traced", variables: &[], spans: 6, ..DISABLED },
    // It takes connections and never answers: the worst that a collector can do.
    Variant { name: "silent sink", variables: &[], spans: 6, has_collector: false },
    DISABLED,
];

/// What one run of one variant gave.
#[derive(Clone)]
struct Run {
    throughput: f64,
    p50: Duration,
    p99: Duration,
    cpu_per_login: Duration,
    /// Megabytes, of the largest service.
    resident: f64,
    dropped: u64,
}

/// Measures, and prints tables.
///
/// # Errors
/// If something doesn't start, or a login fails.
pub async fn run(options: Options) -> Result<()> {
    let paced = Load { rate: Some(options.rate), connections: 64, seconds: options.seconds };
    let closed = Load { rate: None, connections: options.connections, seconds: options.seconds };
    for (name, load) in [("paced", paced), ("closed", closed)] {
        if options.only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let mut rounds = Vec::new();
        for round in 0..options.rounds {
            let mut runs: [Option<Run>; VARIANTS.len()] = Default::default();
            // Each round in another order, so that none is always first.
            for i in 0..VARIANTS.len() {
                let i = (i + round) % VARIANTS.len();
                print(&format!(
                    "\r{name}: round {} of {}, {:<20}",
                    round + 1,
                    options.rounds,
                    VARIANTS[i].name
                ));
                runs[i] = Some(measure(&VARIANTS[i], &load).await?);
            }
            rounds.push(runs.map(|run| run.expect("every variant ran")));
        }
        print(&format!("\r{:60}\r", ""));
        let title = match load.rate {
            Some(rate) => format!("{rate} logins/s"),
            None => format!("closed loop, {} connections", load.connections),
        };
        print_table(&title, &rounds);
    }
    Ok(())
}

async fn measure(variant: &Variant, load: &Load) -> Result<Run> {
    let sink = Sink::start().await?;
    let broker = TestBroker::rabbitmq().await?;
    let black_hole = TcpListener::bind("127.0.0.1:0")?;
    let collector = if variant.has_collector { sink.address } else { black_hole.local_addr()? };
    let endpoint = format!("http://{collector}");
    let mut variables = vec![
        ("AMQP_URL", broker.url.as_str()),
        ("AMQP_PREFIX", &broker.prefix),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        // A line for each login is no part of what is compared.
        ("RUST_LOG", "info,api::login=warn,mq::processing=warn"),
    ];
    variables.extend(variant.variables);
    let rpc = Process::start("rpc", &variables).await?;
    let usercenter = format!("http://{}", rpc.address);
    let for_api = [&variables[..], &[("USERCENTER_URL", &usercenter)]].concat();
    let (api, mq) = try_join!(Process::start("api", &for_api), Process::start("mq", &variables))?;
    try_join!(api.said("connected to the broker"), mq.said("consuming"))?;
    let mut services = [api, rpc, mq];

    let warm_up = load.warm_up(services[0].address).await?;
    let before = cpu_time(services.iter().map(Process::id))?;
    let Report { logins, failed, seconds, mut latencies } = load.run(services[0].address).await?;
    let cpu = cpu_time(services.iter().map(Process::id))? - before;
    ensure!(failed == 0, "{failed} logins failed:\n{}", services[0].output());
    let resident = services.iter().map(|service| resident(service.id())).collect::<Result<Vec<_>>>()?;

    let mut dropped = 0;
    for service in &mut services {
        service.stop().await?;
        if variant.spans > 0 {
            dropped += dropped_spans(&service.output()).with_context(|| service.output())?;
        }
    }
    let missing = ((warm_up.logins + logins) * variant.spans).saturating_sub(sink.spans());
    ensure!(missing == dropped, "{missing} spans did not arrive, but {dropped} were reported as dropped");
    Ok(Run {
        throughput: logins as f64 / seconds,
        p50: latency(&mut latencies, 0.50),
        p99: latency(&mut latencies, 0.99),
        cpu_per_login: cpu / u32::try_from(logins)?,
        resident: resident.into_iter().fold(0.0, f64::max),
        dropped,
    })
}

/// The median over the seconds of a run.
fn latency(seconds: &mut [Vec<Duration>], quantile: f64) -> Duration {
    let of_one = |second: &mut Vec<Duration>| {
        second.sort();
        let at = (second.len() as f64 * quantile) as usize;
        second.get(at).copied().unwrap_or_default().as_secs_f64()
    };
    Duration::from_secs_f64(median(seconds.iter_mut().map(of_one)))
}

/// User and system time of these processes so far, from `/proc/{pid}/stat`.
fn cpu_time(processes: impl IntoIterator<Item = u32>) -> Result<Duration> {
    const TICKS_PER_SECOND: u64 = 100;

    let mut ticks = 0;
    for process in processes {
        let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
        // The name in parentheses may have spaces; user and system time are fields 14 and 15.
        let (_, fields) = stat.rsplit_once(')').context("stat")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        ticks += fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    }
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// Megabytes of memory that a process has now, from `/proc/{pid}/status`.
fn resident(process: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("kB")?.parse::<f64>()? / 1024.0)
}

fn dropped_spans(output: &str) -> Option<u64> {
    let line = output.lines().rfind(|line| line.contains("dropped="))?;
    line.split_once("dropped=")?.1.split(' ').next()?.parse().ok()
}

fn print_table(title: &str, rounds: &[[Run; VARIANTS.len()]]) {
    print(&format!(
        "{title}, medians of {} rounds\n{:<14}{:>10}{:>10}{:>10}{:>12}{:>10}{:>9}   ratios to the first: {:>6}{:>8}{:>8}\n",
        rounds.len(),
        "",
        "logins/s",
        "p50 ms",
        "p99 ms",
        "CPU us",
        "RSS MB",
        "dropped",
        "rate",
        "p99",
        "CPU"
    ));
    for (i, variant) in VARIANTS.iter().enumerate() {
        let of = |value: fn(&Run) -> f64| median(rounds.iter().map(|runs| value(&runs[i])));
        let ratio =
            |value: fn(&Run) -> f64| median(rounds.iter().map(|runs| value(&runs[i]) / value(&runs[0])));
        print(&format!(
            "{:<14}{:>10.0}{:>10.2}{:>10.2}{:>12.0}{:>10.1}{:>9.0}   {:>27.3}{:>8.3}{:>8.3}\n",
            variant.name,
            of(|run| run.throughput),
            of(|run| run.p50.as_secs_f64() * 1e3),
            of(|run| run.p99.as_secs_f64() * 1e3),
            of(|run| run.cpu_per_login.as_secs_f64() * 1e6),
            of(|run| run.resident),
            of(|run| run.dropped as f64),
            ratio(|run| run.throughput),
            ratio(|run| run.p99.as_secs_f64()),
            ratio(|run| run.cpu_per_login.as_secs_f64()),
        ));
    }
    print("\n");
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

#[expect(clippy::print_stdout, reason = "the table is what this tool is for")]
fn print(text: &str) {
    use std::io::Write;
    print!("{text}");
    let _ = std::io::stdout().flush();
}
