//! `cargo dev chaos --flood` compares honest logins during a flood of hostile callers with honest logins
//! without the flood. Laps with and without the flood alternate, so that other work on the machine slows both
//! kinds of laps equally.

use super::{
    Options,
    history::History,
    hostile::Hostile,
    ledger::{Ledger, Verdict},
    load::Load,
    poison::Poison,
    report::say,
    settle,
    system::{Service, System},
};
use anyhow::Result;
use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// The duration of a lap.
const LAP: Duration = Duration::from_secs(5);

/// The number of honest logins per second, and also of hostile requests per second.
const RATE: u32 = 50;

/// The largest allowed ratio of the p99 of honest logins with the flood to the p99 without the flood.
const MOST_SLOWER: f64 = 1.5;

/// How much api's memory may grow in a flood, in KiB.
const MOST_MEMORY: usize = 32 * 1024;

/// The results of a flood.
pub struct Flooded {
    /// The verdict on the honest logins.
    pub verdict: Verdict,
    /// The number of hostile requests that were sent.
    pub hostile: usize,
    /// The median p99 of the laps with the flood, divided by the median p99 of the laps without it. The first
    /// ratio is for a flood from one caller, the second for a flood from fifty callers.
    pub slower: [f64; 2],
    /// The largest resident memory of api in KiB, first without a flood, then with a flood.
    pub memory: [usize; 2],
}

/// The measurements of the laps of one kind.
#[derive(Default)]
struct Laps {
    p50: Vec<Duration>,
    p99: Vec<Duration>,
    failed: usize,
    memory: usize,
}

impl Laps {
    fn add(&mut self, mut took: Vec<Duration>, failed: usize, memory: usize) {
        self.failed += failed;
        took.sort();
        self.p50.extend(took.get(took.len() / 2));
        self.p99.extend(took.get(took.len() * 99 / 100));
        self.memory = self.memory.max(memory);
    }

    fn say(&self, name: &str) {
        let of = |times: &[Duration]| median(times).as_secs_f64() * 1000.0;
        let (p50, p99) = (of(&self.p50), of(&self.p99));
        let (laps, failed, memory) = (self.p50.len(), self.failed, self.memory);
        say(&format!("{name:<28}{laps:>6}{p50:>10.1} ms{p99:>10.1} ms{failed:>8}{memory:>11} KiB"));
    }
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

impl Flooded {
    /// Returns whether no honest login failed and api's memory stayed bounded.
    pub fn is_harmless(&self) -> bool {
        let Verdict { refused, unknown, .. } = &self.verdict;
        let [alone, flooded] = self.memory;
        self.verdict.is_clean() && refused.is_empty() && *unknown == 0 && flooded < alone + MOST_MEMORY
    }

    /// Returns whether the flood was harmless and hardly slowed the honest logins.
    pub fn is_right(&self) -> bool {
        self.is_harmless() && self.slower.iter().all(|slower| *slower <= MOST_SLOWER)
    }
}

/// Runs laps with a flood for `seconds` seconds in all and laps without it for as long. Prints the results.
///
/// # Errors
/// If the run can't be carried out.
pub async fn test(options: &Options, seconds: u64) -> Result<Flooded> {
    let mut system = System::start(options.broker, false).await?;
    let carried = carry_out(options, seconds, &mut system).await;
    if options.keep || !carried.as_ref().is_ok_and(Flooded::is_harmless) {
        let _ = system.stop().await;
        say(&format!("logs and data of the services: {}", system.keep().display()));
    }
    carried
}

async fn carry_out(options: &Options, seconds: u64, system: &mut System) -> Result<Flooded> {
    let mut history = History::open(&system.database()).await?;
    let ledger = Arc::new(Ledger::default());
    let load = Load::start(system.api_address.subscribe(), Arc::clone(&ledger), options.callers, RATE);
    let api = *system.api_address.borrow();
    let (mut alone, mut on_one, mut on_fifty) = (Laps::default(), Laps::default(), Laps::default());
    let (mut hostile, mut wrong) = (0, BTreeSet::new());
    // The first lap only warms up.
    sleep(LAP).await;
    for lap in 0..(2 * seconds).div_ceil(LAP.as_secs()).max(4) {
        let (laps, connections) = match lap % 4 {
            1 => (&mut on_one, 1),
            3 => (&mut on_fifty, 50),
            _ => (&mut alone, 0),
        };
        let (mark, begun) = (ledger.len(), Instant::now());
        let flood = Hostile::start(api, connections, RATE);
        sleep(LAP).await;
        let memory = system.memory(Service::Api)?;
        let sent = flood.stop().await;
        hostile += sent.requests;
        wrong.extend(sent.wrong);
        let logins = ledger.answered_since(mark, begun);
        laps.add(
            logins.iter().map(|login| login.ended - login.begun).collect(),
            ledger.failed_since(mark),
            memory,
        );
    }
    load.stop().await;
    settle(system, &ledger, &Poison::default(), &mut history).await?;
    let ended = system.stop().await?;
    history.read_all().await?;
    let mut verdict = ledger.verdict(&history, &HashSet::new(), &[]);
    verdict.unexpected.extend(wrong.into_iter().chain(ended));

    say(&format!(
        "{:<28}{:>6}{:>13}{:>13}{:>8}{:>15}",
        "", "laps", "median", "p99", "failed", "api's memory"
    ));
    alone.say("honest logins alone");
    on_one.say("flood on one connection");
    on_fifty.say("flood on fifty connections");
    let slower = [&on_one, &on_fifty].map(|laps| {
        median(&laps.p99).as_secs_f64() / median(&alone.p99).as_secs_f64().max(f64::MIN_POSITIVE)
    });
    let memory = [alone.memory, on_one.memory.max(on_fifty.memory)];
    let flooded = Flooded { verdict, hostile, slower, memory };
    let Verdict { attempted, answered, .. } = flooded.verdict;
    say(&format!(
        "p99 with the flood, divided by p99 without it: {:.2} on one connection, {:.2} on fifty\n\
         {answered} of {attempted} honest logins were answered with 200, while {hostile} hostile requests \
         were sent",
        slower[0], slower[1],
    ));
    for unexpected in &flooded.verdict.unexpected {
        say(&format!("unexpected: {unexpected}"));
    }
    Ok(flooded)
}
