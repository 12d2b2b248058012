//! A circuit decides whether a server is worth calling. It is independent of the protocol:
//! [`crate::CircuitBreaker`] reports the outcomes of calls to the circuit.

use crate::deadline::Deadline;
use std::{
    error::Error,
    iter,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use telemetry::ErrorType;
use tokio::time::Instant;

/// While a circuit is closed, calls pass. It opens when the outcomes of at least 20 calls of the last 10 s
/// are known, and at least half of them are failures. While it is open, no call passes. After a pause, one
/// call passes, which is the probe. If the probe succeeds, the circuit closes. If it fails, the circuit stays
/// open for another pause.
///
/// ```text
///           half of the calls fail         the pause is over
///   closed ───────────────────────▶ open ───────────────────▶ half-open: one probe
///     ▲                               ▲                            │    │
///     │                               └────── the probe fails ─────┘    │
///     └───────────────────── the probe succeeds ────────────────────────┘
/// ```
#[derive(Debug)]
pub struct Circuit {
    name: &'static str,
    pause: Duration,
    fair_time: Duration,
    state: Mutex<State>,
}

/// How long the outcome of a call counts.
const WINDOW: Duration = Duration::from_secs(10);

/// The fewest calls that can open the circuit. Fewer calls prove nothing, because a few calls may fail by
/// chance.
const MIN_CALLS: u32 = 20;

/// A call that fails at its deadline counts only if it had at least this much time, or half of the circuit's
/// time-out if that is less.
const FAIR_TIME: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum State {
    Closed(Window),
    Open { until: Instant },
    HalfOpen,
}

/// The circuit is open, so the call was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the circuit is open")]
pub struct CircuitOpen {
    /// The time until a call may pass.
    pub retry_after: Duration,
    #[source]
    error_type: ErrorType,
}

impl CircuitOpen {
    fn new(retry_after: Duration) -> Self {
        Self { retry_after, error_type: ErrorType("circuit_open") }
    }

    /// Finds the open circuit among the causes of an error.
    pub fn of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        iter::successors(Some(error), |&error| error.source()).find_map(|error| error.downcast_ref())
    }
}

impl Circuit {
    /// Makes a closed circuit. `name` is the name of the server, for the log. An open circuit stays open for
    /// `pause`. `timeout` is the longest time of a call.
    pub fn new(name: &'static str, pause: Duration, timeout: Duration) -> Self {
        Self {
            name,
            pause,
            fair_time: FAIR_TIME.min(timeout / 2),
            state: Mutex::new(State::Closed(Window::new(Instant::now()))),
        }
    }

    /// Returns the name of the server.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Returns `closed`, `open` or `half_open`.
    pub fn state_name(&self) -> &'static str {
        match *self.lock() {
            State::Closed(_) => "closed",
            State::Open { .. } => "open",
            State::HalfOpen => "half_open",
        }
    }

    /// Asks for permission to make a call.
    ///
    /// # Errors
    /// If the circuit is open.
    pub fn enter(self: &Arc<Self>) -> Result<Permission, CircuitOpen> {
        let now = Instant::now();
        let mut state = self.lock();
        let is_probe = match *state {
            State::Closed(_) => false,
            State::Open { until } if until <= now => {
                *state = State::HalfOpen;
                true
            }
            State::Open { until } => return Err(CircuitOpen::new(until - now)),
            // The probe has not ended yet.
            State::HalfOpen => return Err(CircuitOpen::new(self.pause)),
        };
        Ok(Permission {
            circuit: self.clone(),
            is_probe,
            entered: now,
            deadline: Deadline::current(),
            outcome: Outcome::Unknown,
        })
    }

    fn record(&self, outcome: Outcome, is_probe: bool) {
        let now = Instant::now();
        let mut state = self.lock();
        match &mut *state {
            State::Closed(window) => {
                let failed = match outcome {
                    Outcome::Success => false,
                    Outcome::Failure => true,
                    Outcome::Unknown => return,
                };
                let Counts { calls, failures } = window.add(now, failed);
                if calls >= MIN_CALLS && failures * 2 >= calls {
                    *state = State::Open { until: now + self.pause };
                    tracing::warn!(to = self.name, calls, failures, "circuit opened");
                }
            }
            State::HalfOpen if is_probe => match outcome {
                Outcome::Success => {
                    *state = State::Closed(Window::new(now));
                    tracing::info!(to = self.name, "circuit closed");
                }
                // This is not logged, because an outage would log a line for each pause.
                Outcome::Failure => *state = State::Open { until: now + self.pause },
                // The probe proved nothing, so the next call is the probe.
                Outcome::Unknown => *state = State::Open { until: now },
            },
            // The call began before the circuit opened, so its outcome does not count.
            State::Open { .. } | State::HalfOpen => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The permission to make one call. If the permission is dropped without an outcome, the call was given up. A
/// call that was given up is a failure if its deadline has passed, and otherwise does not count. A call that
/// began shortly before its deadline, and failed at the deadline, does not count either. Otherwise, callers
/// with almost no time left could open the circuit for all other callers.
#[must_use = "the circuit counts the outcome of the call"]
#[derive(Debug)]
pub struct Permission {
    circuit: Arc<Circuit>,
    is_probe: bool,
    entered: Instant,
    deadline: Option<Deadline>,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Success,
    Failure,
    Unknown,
}

impl Permission {
    /// Reports that the server works.
    pub fn succeeded(mut self) {
        self.outcome = Outcome::Success;
    }

    /// Reports that the server does not work.
    pub fn failed(mut self) {
        self.outcome = Outcome::Failure;
    }
}

impl Drop for Permission {
    fn drop(&mut self) {
        let is_late = self.deadline.is_some_and(|deadline| deadline.remaining().is_zero());
        let had_a_chance = self.entered.elapsed() >= self.circuit.fair_time;
        let outcome = match self.outcome {
            Outcome::Failure | Outcome::Unknown if is_late && !had_a_chance => Outcome::Unknown,
            Outcome::Unknown if is_late => Outcome::Failure,
            outcome => outcome,
        };
        self.circuit.record(outcome, self.is_probe);
    }
}

/// Counts the calls and failures of the last [`WINDOW`], which is divided into tenths.
#[derive(Debug)]
struct Window {
    tenths: [Counts; 10],
    /// The index of the current tenth in `tenths`, and the time when that tenth began.
    now: usize,
    began: Instant,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    calls: u32,
    failures: u32,
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { tenths: Default::default(), now: 0, began: now }
    }

    /// Counts a call, and returns the sums of all tenths.
    fn add(&mut self, now: Instant, failed: bool) -> Counts {
        let tenth = WINDOW / 10;
        if now.duration_since(self.began) >= WINDOW {
            *self = Self::new(now);
        }
        while now.duration_since(self.began) >= tenth {
            self.began += tenth;
            self.now = (self.now + 1) % self.tenths.len();
            self.tenths[self.now] = Counts::default();
        }
        let counts = &mut self.tenths[self.now];
        counts.calls += 1;
        counts.failures += u32::from(failed);
        self.tenths.iter().fold(Counts::default(), |sum, counts| Counts {
            calls: sum.calls + counts.calls,
            failures: sum.failures + counts.failures,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const PAUSE: Duration = Duration::from_secs(1);
    const TIMEOUT: Duration = Duration::from_secs(1);

    fn opened() -> Arc<Circuit> {
        let circuit = Arc::new(Circuit::new("test", PAUSE, TIMEOUT));
        for _ in 0..MIN_CALLS {
            circuit.enter().unwrap().failed();
        }
        circuit
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_when_half_of_enough_calls_fail() {
        let circuit = Arc::new(Circuit::new("test", PAUSE, TIMEOUT));
        for call in 1..MIN_CALLS {
            let permission = circuit.enter().unwrap();
            if call % 2 == 0 { permission.failed() } else { permission.succeeded() }
        }
        circuit.enter().unwrap().failed();
        assert_eq!(circuit.enter().unwrap_err(), CircuitOpen::new(PAUSE));
    }

    #[tokio::test(start_paused = true)]
    async fn fewer_failures_and_old_ones_leave_it_closed() {
        let circuit = Arc::new(Circuit::new("test", PAUSE, TIMEOUT));
        for call in 0..1000 {
            let permission = circuit.enter().unwrap();
            if call % 3 == 0 { permission.failed() } else { permission.succeeded() }
        }
        let circuit = Arc::new(Circuit::new("test", PAUSE, TIMEOUT));
        for _ in 0..1000 {
            circuit.enter().unwrap().failed();
            advance(WINDOW / 10).await;
        }
        assert!(circuit.enter().is_ok());
    }

    #[test]
    fn a_call_counts_for_the_ten_tenths_of_the_window() {
        let start = Instant::now();
        let mut window = Window::new(start);
        for (milliseconds, calls) in [
            (0, 1),
            (500, 2),
            (5_500, 3),
            (9_999, 4),
            (10_000, 3),
            (15_999, 3),
            (19_999, 3),
            (30_000, 1),
            (39_999, 2),
            (40_000, 2),
        ] {
            let counts = window.add(start + Duration::from_millis(milliseconds), milliseconds == 39_999);
            let failures = u32::from(milliseconds >= 39_999);
            assert_eq!(counts, Counts { calls, failures }, "{milliseconds} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_passes_after_the_pause_and_decides() {
        let circuit = opened();
        advance(PAUSE - Duration::from_millis(1)).await;
        assert!(circuit.enter().is_err());
        advance(Duration::from_millis(1)).await;
        let probe = circuit.enter().unwrap();
        assert!(circuit.enter().is_err(), "one at a time");
        probe.failed();
        assert!(circuit.enter().is_err(), "another pause");

        advance(PAUSE).await;
        circuit.enter().unwrap().succeeded();
        // The circuit is closed, and earlier failures are forgotten.
        circuit.enter().unwrap().failed();
        assert!(circuit.enter().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_began_before_it_opened_is_no_probe() {
        let circuit = Arc::new(Circuit::new("test", PAUSE, TIMEOUT));
        let early: Vec<_> = (0..3).map(|_| circuit.enter().unwrap()).collect();
        for _ in 0..MIN_CALLS {
            circuit.enter().unwrap().failed();
        }
        assert_eq!((circuit.name(), circuit.state_name()), ("test", "open"));
        advance(PAUSE).await;
        let probe = circuit.enter().unwrap();
        for (i, early) in early.into_iter().enumerate() {
            match i {
                0 => early.succeeded(),
                1 => early.failed(),
                _ => drop(early),
            }
            assert_eq!(circuit.state_name(), "half_open");
            assert_eq!(circuit.enter().unwrap_err(), CircuitOpen::new(PAUSE));
        }
        probe.succeeded();
        assert_eq!(circuit.state_name(), "closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_is_given_up_makes_room_for_the_next() {
        let circuit = opened();
        advance(PAUSE).await;
        drop(circuit.enter().unwrap());
        circuit.enter().unwrap().succeeded();
        assert!(circuit.enter().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_had_no_time_says_nothing_of_the_other_side() {
        let circuit = Arc::new(Circuit::new("test", PAUSE, TIMEOUT));
        let _attached = Deadline::within(FAIR_TIME / 2).context().attach();
        let late: Vec<_> = (0..2 * MIN_CALLS).map(|_| circuit.enter().unwrap()).collect();
        advance(FAIR_TIME / 2).await;
        for (i, permission) in late.into_iter().enumerate() {
            if i % 2 == 0 { permission.failed() } else { drop(permission) }
        }
        assert!(circuit.enter().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_dropped_at_its_deadline_has_failed() {
        let circuit = Arc::new(Circuit::new("test", PAUSE, TIMEOUT));
        let _attached = Deadline::within(Duration::from_secs(1)).context().attach();
        for _ in 0..MIN_CALLS {
            drop(circuit.enter().unwrap());
        }
        assert!(circuit.enter().is_ok(), "given up before the deadline");
        let late: Vec<_> = (0..MIN_CALLS).map(|_| circuit.enter().unwrap()).collect();
        advance(Duration::from_secs(1)).await;
        drop(late);
        assert!(circuit.enter().is_err());
    }
}
