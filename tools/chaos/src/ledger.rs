//! The ledger: each login that was sent, with its outcome. The verdict compares the outcomes with the effects
//! in mq's database, as Jepsen compares a history of operations with the final state.

use super::history::History;
use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::time::Instant;

/// The trace id that is sent with a login. By this id, the test finds the login's effect.
pub type TraceId = u128;

/// A login that was sent.
#[derive(Debug, Clone, Copy)]
pub struct Login {
    /// The trace id of the login.
    pub trace: TraceId,
    /// When the login was sent.
    pub begun: Instant,
    /// When the outcome of the login was known.
    pub ended: Instant,
    /// The outcome of the login.
    pub outcome: Outcome,
}

/// The outcome of a login, as far as the caller knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Status 200, so the login must take effect.
    Answered,
    /// Another status. The login may take effect, but need not.
    Refused(u16),
    /// The connection broke, or no response came in time. The login may have taken effect or not.
    Unknown,
}

/// All logins that were sent.
#[derive(Default)]
pub struct Ledger(Mutex<Vec<Login>>);

/// A period in which logins may be refused (see `Step::excuses_refusals`).
pub type Excuse = (Instant, Instant);

/// The result of comparing the outcomes with the effects.
#[derive(Debug, Default)]
pub struct Verdict {
    /// The number of logins that were sent.
    pub attempted: usize,
    /// The number of logins answered with 200.
    pub answered: usize,
    /// The number of logins answered with another status, by status.
    pub refused: BTreeMap<u16, usize>,
    /// The number of logins without a response.
    pub unknown: usize,
    /// The number of logins that took effect without being answered with 200.
    pub applied_unasked: usize,
    /// The logins that were answered with 200 and took no effect.
    pub lost: Vec<TraceId>,
    /// The number of effects beyond the first effect of each login.
    pub duplicated: u64,
    /// Descriptions of everything else that must not happen but did.
    pub unexpected: Vec<String>,
}

impl Ledger {
    /// Records a login that has an outcome.
    pub fn note(&self, login: Login) {
        self.lock().push(login);
    }

    /// Returns the traces of all recorded logins.
    pub fn traces(&self) -> impl Iterator<Item = TraceId> + use<> {
        let traces: Vec<TraceId> = self.lock().iter().map(|login| login.trace).collect();
        traces.into_iter()
    }

    /// Returns the number of recorded logins.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Returns the logins from index `mark` on that were sent after `begun` and answered with 200.
    pub fn answered_since(&self, mark: usize, begun: Instant) -> Vec<Login> {
        let logins = self.lock();
        let since = logins[mark.min(logins.len())..].iter();
        since.filter(|login| login.begun >= begun && login.outcome == Outcome::Answered).copied().collect()
    }

    /// Returns how many logins from index `mark` on were not answered with 200.
    pub fn failed_since(&self, mark: usize) -> usize {
        let logins = self.lock();
        logins[mark.min(logins.len())..].iter().filter(|login| login.outcome != Outcome::Answered).count()
    }

    /// Returns the logins that were answered with 200 and have not taken effect so far.
    pub fn owed(&self, history: &History) -> Vec<TraceId> {
        let logins = self.lock();
        let answered = logins.iter().filter(|login| login.outcome == Outcome::Answered);
        answered.map(|login| login.trace).filter(|trace| !history.has(*trace)).collect()
    }

    /// Compares the outcomes with the history. `others` are the traces of messages that the
    /// test published itself.
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
            verdict.unexpected.push(format!("{count} logins were answered {status}, which no fault excuses"));
        }
        // If the counts exceed the rows of the history, some logins were counted more often than recorded.
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
    /// Returns whether every answered login took effect once, and nothing unexpected happened.
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

    /// Makes a history with a row for each of these traces, and with this count of logins.
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

    /// Makes a ledger of logins 1, 2, 3, … with these outcomes. From `start` on, a login begins each second
    /// and lasts 0.9 seconds.
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
