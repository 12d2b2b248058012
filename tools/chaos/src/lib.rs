//! `cargo dev chaos` tests that no login is lost. It sends many logins while it injects faults in an order
//! that a seed determines. At the end, it compares the answer to each login with the login's effect in mq's
//! database.
//!
//! - [`faults`]: the kinds of fault and their order; `inject`: how each fault is injected
//! - `system`: the services with a proxy on each link; [`broker`]: the broker, embedded or RabbitMQ
//! - `load`: the logins; `poison`: messages that can't be processed; `hostile`: hostile callers
//! - [`flood`]: honest logins with and without a flood of hostile callers
//! - `ledger`: how logins were answered; `history`: which logins took effect; `spans`: the trees of spans
//! - [`control`]: an api and an mq that work like the Go original, and so lose logins

pub mod broker;
pub mod control;
pub mod faults;
pub mod flood;
mod history;
mod hostile;
mod inject;
mod ledger;
mod load;
mod poison;
mod report;
mod spans;
mod system;

use anyhow::{Context, Result};
use broker::Kind;
use clap::{Args, ValueEnum};
use faults::{Fault, Plan};
use history::History;
use inject::{Target, messages};
use ledger::{Excuse, Ledger, TraceId, Verdict};
use load::Load;
use poison::Poison;
use report::{Event, say};
use spans::Judged;
use std::{collections::HashSet, process::ExitCode, sync::Arc, time::Duration};
use system::System;
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};

/// The longest time from the end of a fault until logins are answered and take effect again.
const RECOVERY_LIMIT: Duration = Duration::from_secs(45);

/// At the end of a run, the test waits for logins without effect until nothing has changed for this long. The
/// answered logins that are still without effect then count as lost.
const QUIET: Duration = Duration::from_secs(15);

/// How to test.
#[derive(Args, Clone)]
pub struct Options {
    /// The least number of logins to send. The run also continues until every kind of fault has occurred.
    #[arg(long, default_value_t = 20_000)]
    pub logins: usize,
    /// The largest number of logins per second.
    #[arg(long, default_value_t = 400)]
    pub rate: u32,
    /// The number of callers that send logins at the same time.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub callers: u32,
    /// Send logins for at most this many seconds.
    #[arg(long, default_value_t = 1800)]
    pub seconds: u64,
    /// The seed that decides the order, the times and the durations of the faults. By default, it is random.
    #[arg(long)]
    pub seed: Option<u64>,
    /// The faults to inject, comma-separated; by default, all faults that the chosen broker supports.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub faults: Vec<Fault>,
    /// The broker to use; `rabbitmq` starts a node for this run, and `cluster` starts three.
    #[arg(long, value_enum, default_value = "embedded")]
    pub broker: Kind,
    /// Instead of api and mq, test substitutes that work like the Go original. Their api publishes without
    /// confirms, and their mq acknowledges messages on receipt. The test must then find lost logins.
    #[arg(long)]
    pub control: bool,
    /// Instead of injecting faults, send 50 logins per second, in turns with and without a flood of hostile
    /// requests. In all, the flood is on for this many seconds, and off for as many. No login may fail, and
    /// the flood may raise the p99 by at most half.
    #[arg(long, conflicts_with_all = ["control", "faults"])]
    pub flood: Option<u64>,
    /// Keep the logs and data of the services, whatever the verdict is.
    #[arg(long)]
    pub keep: bool,
}

/// The results of a run.
pub struct Outcome {
    /// The verdict on the logins.
    pub verdict: Verdict,
    /// The numbers of whole, partial and wrong trees of spans.
    judged: Judged,
    events: Vec<Event>,
    elapsed: Duration,
}

/// Runs the test, and prints its progress and its results. The exit code is 0 if no login was lost or
/// duplicated, and nothing unexpected happened. With the control, the exit code is 0 if a login was lost. The
/// exit code is 2 if the broker is not installed, or does not support one of the faults.
///
/// # Errors
/// If the test can't be carried out.
pub async fn run(mut options: Options) -> Result<ExitCode> {
    if !options.broker.is_installed() {
        say("RabbitMQ is not installed: run `apt-get install rabbitmq-server`, or use --broker embedded");
        return Ok(ExitCode::from(2));
    }
    if let Some(fault) = options.faults.iter().find(|fault| !fault.exists_on(options.broker)) {
        let needed = if fault.exists_on(Kind::Rabbitmq) { "rabbitmq" } else { "cluster" };
        say(&format!("the fault {fault} needs --broker {needed}"));
        return Ok(ExitCode::from(2));
    }
    if let Some(seconds) = options.flood {
        let is_right = flood::test(&options, seconds).await?.is_right();
        return Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let seed = *options.seed.get_or_insert_with(|| fastrand::u64(..1_000_000));
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let outcome = select! {
        outcome = test(&options) => outcome,
        // Dropping the future also ends the processes that it started.
        _ = interrupt.recv() => return Ok(ExitCode::from(130)),
        _ = terminate.recv() => return Ok(ExitCode::from(143)),
    };
    let outcome = outcome.with_context(|| format!("with --seed {seed}"))?;
    report::print(&options, &outcome);
    let is_right =
        if options.control { !outcome.verdict.lost.is_empty() } else { outcome.verdict.is_clean() };
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Carries out one run, from the start of the system to the verdict. If the verdict is not clean, the
/// services' logs are kept, and their directory is printed.
///
/// # Errors
/// If the run can't be carried out.
pub async fn test(options: &Options) -> Result<Outcome> {
    let mut faults = options.faults.clone();
    if faults.is_empty() {
        faults.extend(Fault::value_variants().iter().filter(|fault| fault.exists_on(options.broker)));
    }
    let plan = Plan::new(options.seed.unwrap_or_default(), &faults);
    report::begin(options, plan.round());
    let start = Instant::now();
    let mut system = System::start(options.broker, options.control).await?;
    let carried = carry_out(options, plan, &mut system, start).await;
    let is_clean = options.control || carried.as_ref().is_ok_and(|outcome| outcome.verdict.is_clean());
    if options.keep || !is_clean {
        let _ = system.stop().await;
        say(&format!("logs and data of the services: {}", system.keep().display()));
    }
    carried
}

async fn carry_out(options: &Options, plan: Plan, system: &mut System, start: Instant) -> Result<Outcome> {
    let mut history = History::open(&system.database()).await?;
    history.prepare_refusals().await?;
    let ledger = Arc::new(Ledger::default());
    let mut poison = Poison::default();
    let mut excuses: Vec<Excuse> = Vec::new();
    let mut unexpected = Vec::new();
    let mut events = Vec::new();

    let load =
        Load::start(system.api_address.subscribe(), Arc::clone(&ledger), options.callers, options.rate);
    let end = start + Duration::from_secs(options.seconds);
    let round = plan.round();
    for step in plan {
        if Instant::now() > end || (ledger.len() >= options.logins && events.len() >= round) {
            break;
        }
        sleep(step.pause).await;
        let begun = Instant::now();
        let mut target =
            Target { system, load: &load, ledger: &ledger, history: &mut history, poison: &mut poison };
        let injected = target.inject(&step).await.with_context(|| format!("injecting {step}"))?;
        unexpected.extend(injected.wrong);
        let healed = Instant::now();
        let recovery = target.recover(healed, ledger.len(), RECOVERY_LIMIT).await?;
        if step.excuses_refusals() {
            excuses.push((begun, Instant::now()));
        }
        unexpected.extend(system.revive().await?);
        let event = Event { step, at: begun - start, lasted: healed - begun, recovery, note: injected.note };
        report::event(&event, ledger.len());
        if event.recovery.is_none() {
            unexpected.push(format!("no login was answered and applied within 45 s after {step}"));
        }
        events.push(event);
    }
    if events.len() < round {
        say(&format!("the time limit was reached after {} of {round} kinds of fault", events.len()));
    }
    load.stop().await;

    settle(system, &ledger, &poison, &mut history).await?;
    // The control only logs poison messages and drops them.
    if !options.control {
        // mq retries the logins that the database refuses, which takes time.
        unexpected.extend(poison.judge(system, &history, RECOVERY_LIMIT).await?);
    }
    unexpected.extend(system.stop().await?);
    history.read_all().await?;
    let others: HashSet<TraceId> = poison.traces().collect();
    let mut verdict = ledger.verdict(&history, &others, &excuses);
    let judged = system.collector.judge(&ledger.traces().chain(others).collect());
    if judged.wrong > 0 {
        unexpected.push(format!("{} traces have a wrong tree of spans", judged.wrong));
    }
    verdict.unexpected.extend(unexpected);
    Ok(Outcome { verdict, judged, events, elapsed: start.elapsed() })
}

/// Waits until all answered logins have taken effect and nothing has changed for `GRACE`, or until nothing has
/// changed for [`QUIET`].
async fn settle(system: &System, ledger: &Ledger, poison: &Poison, history: &mut History) -> Result<()> {
    /// How long to wait for logins that were not answered, because these logins may still take effect.
    const GRACE: Duration = Duration::from_secs(2);

    let (connection, channel) = system.broker.connect().await?;
    let queue = system.topology.queue.as_str().into();
    let (mut rows, mut waiting, mut changed) = (0, 0, Instant::now());
    loop {
        history.catch_up().await?;
        let now_waiting = messages(&channel, &queue).await?;
        if (history.rows(), now_waiting) != (rows, waiting) {
            (rows, waiting, changed) = (history.rows(), now_waiting, Instant::now());
        }
        let owes_nothing = waiting == 0 && poison.owed(history) == 0 && ledger.owed(history).is_empty();
        if changed.elapsed() > if owes_nothing { GRACE } else { QUIET } {
            connection.close(200, "done".into()).await?;
            return Ok(());
        }
        sleep(Duration::from_millis(100)).await;
    }
}
