//! The output of a run: a line for each fault when it has ended, then a table of the kinds of fault, then the
//! verdict.

use super::{Options, Outcome, broker::Kind, faults::Step, inject::Recovery};
use std::{collections::BTreeMap, time::Duration};

/// A fault that was injected.
pub struct Event {
    /// The planned fault.
    pub step: Step,
    /// The time from the start of the run to the start of the fault.
    pub at: Duration,
    /// How long the fault lasted.
    pub lasted: Duration,
    /// How soon the system worked again, or `None` if it did not recover in time.
    pub recovery: Option<Recovery>,
    /// How the fault differed from the planned fault, or `None` if it did not differ.
    pub note: Option<&'static str>,
}

/// Prints what the run is about to do.
pub fn begin(options: &Options, round: usize) {
    // A fault, with the pause before it and the recovery after it, lasts 4 seconds on average.
    let faults = 4 * round as u64;
    let load = options.logins as u64 / u64::from(options.rate.max(1));
    say(&format!(
        "{}, seed {}: {} logins at {} per second, {round} kinds of fault; about {} s, at most {} s",
        broker(options.broker),
        options.seed.unwrap_or_default(),
        thousands(options.logins),
        options.rate,
        faults.max(load).min(options.seconds),
        options.seconds,
    ));
}

/// Prints a fault that has ended.
pub fn event(event: &Event, attempted: usize) {
    let recovery = match &event.recovery {
        Some(Recovery { answered, applied }) => {
            format!("answered after {}, applied after {}", seconds(*answered), seconds(*applied))
        }
        None => "NOT RECOVERED".to_owned(),
    };
    say(&format!(
        "{:>7}  {:<30} {:>7}  {recovery}  ({} logins){}",
        seconds(event.at),
        event.step.to_string(),
        seconds(event.lasted),
        thousands(attempted),
        event.note.map(|note| format!("  {note}")).unwrap_or_default(),
    ));
}

/// Prints the results of the run.
pub fn print(options: &Options, outcome: &Outcome) {
    let Outcome { verdict, judged, events, elapsed } = outcome;
    let mut kinds: BTreeMap<String, Vec<&Event>> = BTreeMap::new();
    for event in events {
        kinds.entry(event.step.to_string()).or_default().push(event);
    }
    say(&format!("\n{:<30}{:>6}{:>22}{:>22}", "", "", "answered again after", "applied again after"));
    say(&format!("{:<30}{:>6}{:>11}{:>11}{:>11}{:>11}", "fault", "times", "median", "max", "median", "max"));
    for (kind, events) in &kinds {
        let of = |part: fn(&Recovery) -> Duration| {
            let mut times: Vec<Duration> =
                events.iter().filter_map(|e| e.recovery.as_ref()).map(part).collect();
            times.sort();
            (times.get(times.len() / 2).copied(), times.last().copied())
        };
        let ((answered, longest_answered), (applied, longest_applied)) =
            (of(|recovery| recovery.answered), of(|recovery| recovery.applied));
        let cells = [answered, longest_answered, applied, longest_applied];
        let [a, b, c, d] = cells.map(|time| time.map_or("never".to_owned(), seconds));
        say(&format!("{kind:<30}{:>6}{a:>11}{b:>11}{c:>11}{d:>11}", events.len()));
    }

    let refused: Vec<String> = verdict
        .refused
        .iter()
        .map(|(status, count)| format!("{} with {status}", thousands(*count)))
        .collect();
    let recovered = events.iter().filter(|event| event.recovery.is_some()).count();
    let lines = [
        ("attempted", thousands(verdict.attempted)),
        ("answered", thousands(verdict.answered)),
        ("refused", if refused.is_empty() { "0".to_owned() } else { refused.join(", ") }),
        ("unknown", thousands(verdict.unknown)),
        ("recovered", format!("{recovered} of {} faults", events.len())),
        ("lost", thousands(verdict.lost.len())),
        ("duplicated", verdict.duplicated.to_string()),
        ("unexpected", verdict.unexpected.len().to_string()),
    ];
    say("");
    for (name, value) in lines {
        say(&format!("{name:<11}{value}"));
    }
    say(&format!(
        "{} logins took effect without being answered 200; {} traces are whole, {} lack the producer span or \
         the consumer span, {} are wrong",
        thousands(verdict.applied_unasked),
        thousands(judged.whole),
        thousands(judged.partial),
        judged.wrong,
    ));
    for unexpected in &verdict.unexpected {
        say(&format!("unexpected: {unexpected}"));
    }
    for trace in verdict.lost.iter().take(if options.control { 0 } else { 10 }) {
        say(&format!("lost: trace {trace:032x}"));
    }
    let conclusion = match (options.control, verdict.is_clean(), verdict.lost.is_empty()) {
        (true, _, false) => "the control lost logins, as expected: this test detects lost logins".to_owned(),
        (true, _, true) => "the control lost nothing: with these faults, the test proves nothing".to_owned(),
        (false, true, _) => "nothing was lost".to_owned(),
        (false, false, _) => format!("NOT AS PROMISED; to repeat the run: {}", command(options)),
    };
    say(&format!("{conclusion}, in {} on {}", seconds(*elapsed), broker(options.broker)));
}

/// Returns the command that repeats a run.
fn command(options: &Options) -> String {
    let mut command = format!(
        "cargo dev chaos --broker {} --seed {} --logins {} --rate {} --callers {} --seconds {}",
        match options.broker {
            Kind::Embedded => "embedded",
            Kind::Rabbitmq => "rabbitmq",
            Kind::Cluster => "cluster",
        },
        options.seed.unwrap_or_default(),
        options.logins,
        options.rate,
        options.callers,
        options.seconds
    );
    if !options.faults.is_empty() {
        let faults: Vec<String> = options.faults.iter().map(ToString::to_string).collect();
        command += &format!(" --faults {}", faults.join(","));
    }
    command
}

fn broker(kind: Kind) -> &'static str {
    match kind {
        Kind::Embedded => "the embedded broker",
        Kind::Rabbitmq => "RabbitMQ",
        Kind::Cluster => "a cluster of three nodes of RabbitMQ",
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

fn thousands(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Prints a line of text.
#[expect(clippy::print_stdout, reason = "this is what the tool is for")]
pub fn say(text: &str) {
    println!("{text}");
}
