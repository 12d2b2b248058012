//! What was asked and what was answered, login by login, and the verdict: both sides of the account
//! against each other, as Jepsen does it.

use super::history::History;
use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::time::Instant;

/// The trace that a login sends along: by it, its effect is found.
pub type TraceId = u128;

/// A login that was sent.
#[derive(Debug, Clone, Copy)]
pub struct Login {
    /// Its trace.
    pub trace: TraceId,
    /// When it was sent.
    pub begun: Instant,
    /// When it was over.
    pub ended: Instant,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a login ended, as far as the caller knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// 200: its effect is owed.
    Answered,
    /// Another status: no effect is owed, and one does no harm.
    Refused(u16),
    /// The connection broke, or nothing came in time. There may be an effect, or none.
    Unknown,
}

/// All logins.
#[derive(Default)]
pub struct Ledger(Mutex<Vec<Login>>);

/// A time in which logins may be refused, for another reason than the broker.
pub type Excuse = (Instant, Instant);

/// The account.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Logins that were sent.
    pub attempted: usize,
    /// Logins answered with 200.
    pub answered: usize,
    /// Logins answered otherwise, by status.
    pub refused: BTreeMap<u16, usize>,
    /// Logins that were not answered.
    pub unknown: usize,
    /// Of those that were not answered with 200, how many took effect nevertheless.
    pub applied_unasked: usize,
    /// Answered with 200, and without effect.
    pub lost: Vec<TraceId>,
    /// Effects beyond the first one of a login.
    pub duplicated: u64,
    /// Whatever must not be, in words.
    pub unexpected: Vec<String>,
}

impl Ledger {
    /// Notes a login that is over.
    pub fn note(&self, login: Login) {
        self.lock().push(login);
    }

    /// All that were noted.
    pub fn traces(&self) -> impl Iterator<Item = TraceId> + use<> {
        let traces: Vec<TraceId> = self.lock().iter().map(|login| login.trace).collect();
        traces.into_iter()
    }

    /// How many were noted.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// The logins from the `mark`th on that were sent after `begun` and answered with 200.
    pub fn answered_since(&self, mark: usize, begun: Instant) -> Vec<Login> {
        let logins = self.lock();
        let since = logins[mark.min(logins.len())..].iter();
        since.filter(|login| login.begun >= begun && login.outcome == Outcome::Answered).copied().collect()
    }

    /// Logins answered with 200 and without effect so far.
    pub fn owed(&self, history: &History) -> Vec<TraceId> {
        let logins = self.lock();
        let answered = logins.iter().filter(|login| login.outcome == Outcome::Answered);
        answered.map(|login| login.trace).filter(|trace| !history.has(*trace)).collect()
    }

    /// Judges. `others` are traces of messages that were no logins.
    pub fn verdict(&self, history: &History, others: &HashSet<TraceId>, excuses: &[Excuse]) -> Verdict {
        let logins = self.lock();
        let mut verdict = Verdict { attempted: logins.len(), ..Verdict::default() };
        let mut without_excuse: BTreeMap<u16, usize> = BTreeMap::new();
        for login in logins.iter() {
            match login.outcome {
                Outcome::Answered => verdict.answered += 1,
                Outcome::Refused(status) => {
                    *verdict.refused.entry(status).or_default() += 1;
                    if !excuses.iter().any(|(from, to)| login.begun <= *to && login.ended >= *from) {
                        *without_excuse.entry(status).or_default() += 1;
                    }
                }
                Outcome::Unknown => verdict.unknown += 1,
            }
            let effects = history.effects(login.trace);
            verdict.duplicated += effects.saturating_sub(1);
            match login.outcome {
                Outcome::Answered if effects == 0 => verdict.lost.push(login.trace),
                Outcome::Answered => {}
                Outcome::Refused(_) | Outcome::Unknown => verdict.applied_unasked += usize::from(effects > 0),
            }
        }
        for (status, count) in without_excuse {
            verdict
                .unexpected
                .push(format!("{count} logins answered {status} with nothing amiss but the broker"));
        }
        // A count that is higher than its rows was raised twice for one of them.
        verdict.duplicated += history.counted().saturating_sub(history.rows());
        if history.counted() < history.rows() {
            let missing = history.rows() - history.counted();
            verdict.unexpected.push(format!("{missing} logins in the history are not in the counts"));
        }
        let attempted: HashSet<TraceId> = logins.iter().map(|login| login.trace).collect();
        let strangers =
            history.traces().filter(|trace| !attempted.contains(trace) && !others.contains(trace));
        match strangers.count() + history.untraced() {
            0 => {}
            count => verdict.unexpected.push(format!("{count} effects of logins that were never attempted")),
        }
        verdict
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Login>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Verdict {
    /// Whether the promise was kept.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.duplicated == 0 && self.unexpected.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sqlx::{ConnectOptions, sqlite::SqliteConnectOptions};
    use std::time::Duration;

    const KNOWN: u64 = 100;

    /// A history with these traces, one row each, and a count of logins.
    async fn history(traces: &[TraceId], counted: u64) -> History {
        let directory = tempfile::TempDir::new().unwrap();
        let file = directory.path().join("mq.db");
        let options = SqliteConnectOptions::new().filename(&file).create_if_missing(true);
        let mut database = options.connect().await.unwrap();
        for statement in [
            "CREATE TABLE login_history (message_id TEXT PRIMARY KEY, trace_id TEXT)",
            "CREATE TABLE login_count (mobile TEXT PRIMARY KEY, logins BIGINT NOT NULL)",
        ] {
            sqlx::query(statement).execute(&mut database).await.unwrap();
        }
        for (i, trace) in traces.iter().enumerate() {
            let insert = "INSERT INTO login_history (message_id, trace_id) VALUES ($1, $2)";
            let row = sqlx::query(insert).bind(i.to_string()).bind(format!("{trace:032x}"));
            row.execute(&mut database).await.unwrap();
        }
        let count = sqlx::query("INSERT INTO login_count VALUES ('1', $1)").bind(counted.cast_signed());
        count.execute(&mut database).await.unwrap();
        let mut history = History::open(&file).await.unwrap();
        history.read_all().await.unwrap();
        history
    }

    /// Logins 1, 2, 3, … with these outcomes, a second each, one after the other from `start` on.
    fn ledger(start: Instant, outcomes: &[Outcome]) -> Ledger {
        let ledger = Ledger::default();
        for (i, outcome) in outcomes.iter().enumerate() {
            let begun = start + Duration::from_secs(i as u64);
            let ended = begun + Duration::from_millis(900);
            ledger.note(Login { trace: i as TraceId + 1, begun, ended, outcome: *outcome });
        }
        ledger
    }

    async fn verdict(outcomes: &[Outcome], traces: &[TraceId], counted: u64) -> Verdict {
        let others = HashSet::from([TraceId::from(KNOWN)]);
        ledger(Instant::now(), outcomes).verdict(&history(traces, counted).await, &others, &[])
    }

    #[tokio::test]
    async fn every_answered_login_with_one_effect_is_clean() {
        let verdict = verdict(&[Outcome::Answered, Outcome::Answered], &[1, 2], 2).await;
        assert!(verdict.is_clean(), "{verdict:?}");
        assert_eq!((verdict.attempted, verdict.answered), (2, 2));
    }

    #[tokio::test]
    async fn an_answered_login_without_effect_is_lost() {
        let verdict = verdict(&[Outcome::Answered, Outcome::Answered], &[2], 1).await;
        assert_eq!(verdict.lost, [1]);
        assert!(!verdict.is_clean());
    }

    #[tokio::test]
    async fn a_login_without_answer_may_have_an_effect_or_none() {
        let verdict = verdict(&[Outcome::Unknown, Outcome::Unknown], &[2], 1).await;
        assert!(verdict.is_clean(), "{verdict:?}");
        assert_eq!((verdict.unknown, verdict.applied_unasked), (2, 1));
    }

    #[tokio::test]
    async fn a_second_effect_is_a_duplicate_by_its_row_or_by_its_count() {
        assert_eq!(verdict(&[Outcome::Unknown], &[1, 1], 2).await.duplicated, 1);
        assert_eq!(verdict(&[Outcome::Answered], &[1], 2).await.duplicated, 1);
    }

    #[tokio::test]
    async fn effects_of_logins_that_were_never_attempted_are_unexpected() {
        assert_eq!(verdict(&[Outcome::Answered], &[1, 7], 2).await.unexpected.len(), 1);
        assert!(verdict(&[Outcome::Answered], &[1, KNOWN.into()], 2).await.is_clean());
    }

    #[tokio::test]
    async fn effects_that_were_not_counted_are_unexpected() {
        assert_eq!(verdict(&[Outcome::Answered, Outcome::Answered], &[1, 2], 1).await.unexpected.len(), 1);
    }

    #[tokio::test]
    async fn a_refusal_needs_an_excuse() {
        let start = Instant::now();
        let ledger = ledger(start, &[Outcome::Refused(503), Outcome::Refused(503)]);
        let history = history(&[], 0).await;
        let second = Duration::from_secs(1);
        let judge = |excuse: Excuse| ledger.verdict(&history, &HashSet::new(), &[excuse]);
        assert!(judge((start, start + 2 * second)).is_clean());
        assert_eq!(judge((start, start + second / 2)).unexpected.len(), 1);
    }
}
