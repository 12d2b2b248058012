//! Measures on this machine what traces, metrics and logs cost. The three services run as processes, with a
//! real broker, a collector that only counts, and a load generator.
//!
//! Each round starts every variant afresh. Then the variants have turns of a few seconds under the same load,
//! in random order. During a turn, the other variants are idle. A lap is one turn of each variant. Variants
//! are compared within a lap, because a machine or disk that is slow for a while slows all variants of the
//! lap. Many laps show how reliable a figure is. The last variant repeats the first variant, so the distance
//! of the last variant's ratios from 1 is the error of the method.
//!
//! The module `running` has a variant while it runs, `sink` has its collector, and `load` has the load
//! generator.

mod load;
mod running;
mod sink;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use harness::{go_zero, rabbitmq::Node};
use load::{Load, Report};
use running::{Costs, Place, Running};
use std::{fmt, fs, path::Path, time::Duration};
use tempfile::TempDir;

/// How to measure.
#[derive(Args)]
pub struct Options {
    /// Logins per second in the paced part.
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    /// Simultaneous connections in the closed loop.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Rounds. Each round starts every variant afresh.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Laps in a round. Each variant has one turn in a lap.
    #[arg(long, default_value_t = 8)]
    laps: usize,
    /// Length of a turn, in seconds.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Start a RabbitMQ, and keep all files of this broker and of the services in memory (/dev/shm). A disk's
    /// time to sync varies by more than the costs measured here.
    #[arg(long)]
    in_memory: bool,
    /// Run only this part: paced or closed.
    #[arg(long)]
    only: Option<String>,
    /// Instead of measuring what tracing costs, compare these services with another system that does the same
    /// work. The only such system is the one in Go, in tools/peers/go-zero.
    #[arg(long)]
    peer: Option<Peer>,
}

/// Another system, with which this system can be compared.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    GoZero,
}

/// A file system in memory.
const MEMORY: &str = "/dev/shm";

/// A configuration of the services, as environment variables. In every variant, the services in Rust write
/// the same lines to standard error, two for each login.
struct Variant {
    name: &'static str,
    variables: &'static [(&'static str, &'static str)],
    /// The number of spans of one login.
    spans: u64,
    /// The number of log records of one login. If this number is above 0, metrics are also exported.
    records: u64,
    /// Whether the collector answers.
    has_collector: bool,
    /// Whether these are the services in Go.
    in_go: bool,
}

const DISABLED: Variant = Variant {
    name: "SDK disabled",
    variables: &[("OTEL_SDK_DISABLED", "true")],
    spans: 0,
    records: 0,
    has_collector: true,
    in_go: false,
};

const ALL_SIGNALS: Variant = Variant {
    name: "traces + metrics + logs",
    variables: &[
        ("OTEL_METRICS_EXPORTER", "otlp"),
        // With this interval, there is one export in each turn of two seconds. The default is one export per
        // minute.
        ("OTEL_METRIC_EXPORT_INTERVAL", "2000"),
        ("OTEL_LOGS_EXPORTER", "otlp"),
    ],
    spans: 6,
    records: 2,
    ..DISABLED
};

/// The variants that show what tracing costs. Each other variant is compared with the first.
const VARIANTS: &[Variant] = &[
    DISABLED,
    Variant { name: "sampled off", variables: &[("OTEL_TRACES_SAMPLER", "always_off")], ..DISABLED },
    Variant { name: "all traced", variables: &[], spans: 6, ..DISABLED },
    ALL_SIGNALS,
    // This collector accepts connections and never answers. No other fault of a collector costs more.
    Variant { name: "silent sink, all three", has_collector: false, ..ALL_SIGNALS },
    Variant { name: "disabled again", ..DISABLED },
];

const TRACED: Variant = Variant { name: "in Rust", variables: &[], spans: 6, ..DISABLED };

/// The variants of `--peer go-zero`. Each other variant is compared with the first.
const PEERS: &[Variant] =
    &[TRACED, Variant { name: "in Go", in_go: true, ..TRACED }, Variant { name: "in Rust again", ..TRACED }];

/// The measurements of all rounds under one load. Each lap and each round has a value for each variant.
struct Measured {
    variants: &'static [Variant],
    laps: Vec<Vec<Report>>,
    rounds: Vec<Vec<Costs>>,
}

/// Measures all variants, and prints tables. If Go is needed but not available, reports that on standard
/// error, and measures nothing.
///
/// # Errors
/// If a process doesn't start, or if a login fails.
pub async fn run(options: Options) -> Result<()> {
    let variants = match options.peer {
        None => VARIANTS,
        Some(Peer::GoZero) if go_zero::is_available() => PEERS,
        Some(Peer::GoZero) => return Ok(()),
    };
    let node = match options.in_memory {
        true => Some(Node::start_in(Path::new(MEMORY)).await?),
        false => None,
    };
    let place = match &node {
        Some(node) => Place { directory: TempDir::new_in(MEMORY)?, amqp_url: Some(node.url()) },
        None => Place { directory: TempDir::new()?, amqp_url: None },
    };
    let paced = Load { rate: Some(options.rate), connections: 64, seconds: options.seconds };
    let closed = Load { rate: None, connections: options.connections, seconds: options.seconds };
    for (name, load) in [("paced", paced), ("closed", closed)] {
        if options.only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let mut measured = Measured { variants, laps: Vec::new(), rounds: Vec::new() };
        for round in 1..=options.rounds {
            print(&format!("\r{name}: round {round} of {}", options.rounds));
            round_of(&load, options.laps, &place, &mut measured).await?;
        }
        let title = match load.rate {
            Some(rate) => format!("{rate} logins/s"),
            None => format!("closed loop, {} connections", load.connections),
        };
        let Options { rounds, laps, seconds, .. } = options;
        print(&format!("\r{title}, medians of {rounds} rounds of {laps} laps, turns of {seconds} s\n"));
        print_tables(&measured);
    }
    Ok(())
}

async fn round_of(load: &Load, laps: usize, place: &Place, measured: &mut Measured) -> Result<()> {
    let mut running = Vec::new();
    for variant in measured.variants {
        running.push(Running::start(variant, load, place).await?);
    }
    for _ in 0..laps {
        let mut order: Vec<usize> = (0..running.len()).collect();
        fastrand::shuffle(&mut order);
        let mut lap: Vec<Report> = running.iter().map(|_| Report::default()).collect();
        for i in order {
            lap[i] = running[i].turn(load).await?;
        }
        measured.laps.push(lap);
    }
    let mut costs = Vec::new();
    for running in running {
        costs.push(running.stop().await?);
    }
    measured.rounds.push(costs);
    Ok(())
}

/// Prints the medians of each variant, in total and for each process. Then prints the ratio of each other
/// variant to the first variant.
fn print_tables(Measured { variants, laps, rounds }: &Measured) {
    let over_laps = |i: usize, value: fn(&Report) -> f64| median(laps.iter().map(|lap| value(&lap[i])));
    let over_rounds =
        |i: usize, value: &dyn Fn(&Costs) -> f64| median(rounds.iter().map(|round| value(&round[i])));

    print(&format!(
        "{:<24}{:>10}{:>10}{:>10}{:>10}{:>12}{:>11}{:>15}{:>10}\n",
        "", "logins/s", "p50 ms", "p99 ms", "CPU us", "spans lost", "logs lost", "messages lost", "ready ms"
    ));
    for (i, variant) in variants.iter().enumerate() {
        print(&format!(
            "{:<24}{:>10.0}{:>10.2}{:>10.2}{:>10.0}{:>12.0}{:>11.0}{:>15.0}{:>10.0}\n",
            variant.name,
            over_laps(i, Report::throughput),
            over_laps(i, |report| milliseconds(report.latency(0.50))),
            over_laps(i, |report| milliseconds(report.latency(0.99))),
            over_rounds(i, &|costs| costs.cpu_per_login().as_secs_f64() * 1e6),
            over_rounds(i, &|costs| costs.lost_spans as f64),
            over_rounds(i, &|costs| costs.lost_records as f64),
            over_rounds(i, &|costs| costs.lost_messages as f64),
            over_rounds(i, &|costs| milliseconds(costs.ready)),
        ));
    }
    print(&format!(
        "\n{:<24}{:>10}{:>18}{:>10}{:>12}{:>18}{:>10}\n",
        "", "api us", "usercenter us", "mq us", "api MB", "usercenter MB", "mq MB"
    ));
    for (i, variant) in variants.iter().enumerate() {
        let cpu = |service: usize| over_rounds(i, &|costs| costs.cpu[service].as_secs_f64() * 1e6);
        let memory = |service: usize| over_rounds(i, &|costs| costs.resident[service]);
        print(&format!(
            "{:<24}{:>10.0}{:>18.0}{:>10.0}{:>12.1}{:>18.1}{:>10.1}\n",
            variant.name,
            cpu(0),
            cpu(1),
            cpu(2),
            memory(0),
            memory(1),
            memory(2),
        ));
    }
    print(&format!(
        "\nas a multiple of {}\n{:<24}{:>22}{:>22}{:>22}{:>22}\n",
        variants[0].name, "(95 % interval)", "logins/s", "p50", "p99", "CPU"
    ));
    for (i, variant) in variants.iter().enumerate().skip(1) {
        let of_laps =
            |value: fn(&Report) -> f64| Ratio::of(laps.iter().map(|lap| value(&lap[i]) / value(&lap[0])));
        let cpu =
            rounds.iter().map(|round| round[i].cpu_per_login().div_duration_f64(round[0].cpu_per_login()));
        print(&format!(
            "{:<24}{:>22}{:>22}{:>22}{:>22}\n",
            variant.name,
            of_laps(Report::throughput),
            of_laps(|report| milliseconds(report.latency(0.50))),
            of_laps(|report| milliseconds(report.latency(0.99))),
            Ratio::of(cpu),
        ));
    }
    print("\n");
}

/// A median with its 95 % confidence interval.
struct Ratio {
    median: f64,
    low: f64,
    high: f64,
}

impl Ratio {
    /// Computes the median and its interval. The bounds of the interval are order statistics, so that nothing
    /// need be assumed about the distribution of the values.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let count = values.len() as f64;
        let low = ((count - 1.96 * count.sqrt()) / 2.0).max(0.0) as usize;
        let (low, high) = (values[low], values[values.len() - 1 - low]);
        Self { median: median(values.into_iter()), low, high }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, low, high } = self;
        f.pad(&format!("{median:.3} ({low:.3}-{high:.3})"))
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Returns the user and system time that a process has used so far, from `/proc/{pid}/stat`.
fn cpu_time(process: u32) -> Result<Duration> {
    const TICKS_PER_SECOND: u64 = 100;

    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name in parentheses may contain spaces. User and system time are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(')').context("stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// Returns the resident memory of a process in megabytes, from `/proc/{pid}/status`.
fn resident(process: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("kB")?.parse::<f64>()? / 1024.0)
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
