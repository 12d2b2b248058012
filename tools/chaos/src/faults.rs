//! The kinds of fault, and in which order they come: that is the seed's business alone, so that a run can
//! be repeated.

use clap::ValueEnum;
use fastrand::Rng;
use std::{fmt, time::Duration};

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Fault {
    /// api is killed, and started again at once.
    KillApi,
    /// usercenter is killed, and started again at once.
    KillUsercenter,
    /// mq is killed, and started again at once.
    KillMq,
    /// The broker is killed, and comes back with what is durable.
    BrokerRestart,
    /// The connections of a link are reset.
    Reset,
    /// A link goes silent; later what was sent arrives, or the connections are reset.
    HalfOpen,
    /// The broker raises its memory alarm: it takes no messages (connection.blocked).
    BrokerBlocked,
    /// All to and from the broker comes late.
    BrokerSlow,
    /// api is killed when the broker has confirmed and the login is not answered.
    CrashAfterConfirm,
    /// mq is killed when it has processed and the broker has not got the acknowledgement.
    CrashBeforeAck,
    /// A message that can't be read, and one that the database refuses.
    Poison,
    /// api can't write to its disk while the broker is away.
    DiskFull,
    /// The queue is deleted, with its consumer attached. It is empty then: what is in it would be gone.
    QueueDeleted,
    /// The collector goes silent.
    CollectorSilent,
    /// api is killed while the broker is away, and started again before it is back.
    KillApiWithoutBroker,
}

/// A link that can fail by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// From api to the broker.
    ApiBroker,
    /// From mq to the broker.
    MqBroker,
    /// From api to usercenter.
    ApiUsercenter,
}

/// A fault to come.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Which.
    pub fault: Fault,
    /// How long all goes well before.
    pub pause: Duration,
    /// How long it lasts, if it lasts.
    pub hold: Duration,
    /// Where, if it is a link's.
    pub link: Link,
    /// Whether a link that went silent is reset in the end.
    pub resets: bool,
}

/// The faults of a run: all that were chosen, in an order, then all of them again in another one. It has
/// no end.
pub struct Plan {
    rng: Rng,
    faults: Vec<Fault>,
    round: Vec<Fault>,
}

impl Plan {
    /// The plan that belongs to this seed and these faults.
    pub fn new(seed: u64, faults: &[Fault]) -> Self {
        let mut faults = faults.to_vec();
        // The order in which they were named makes no difference.
        faults.sort_unstable();
        faults.dedup();
        Self { rng: Rng::with_seed(seed), faults, round: Vec::new() }
    }

    /// Steps of a round.
    pub fn round(&self) -> usize {
        self.faults.len()
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if self.round.is_empty() {
            self.round.clone_from(&self.faults);
            self.rng.shuffle(&mut self.round);
        }
        let fault = self.round.pop()?;
        let mut between = |from: u64, to: u64| Duration::from_millis(self.rng.u64(from..to));
        let pause = between(200, 1500);
        let hold = match fault {
            // A silent link is noticed after 4 seconds: sometimes it is, sometimes not.
            Fault::HalfOpen => between(2000, 7000),
            _ => between(1000, 3000),
        };
        let link = [Link::ApiBroker, Link::MqBroker, Link::ApiUsercenter][self.rng.usize(..3)];
        Some(Step { fault, pause, hold, link, resets: self.rng.bool() })
    }
}

impl Step {
    /// Whether logins may be refused during it: the promise is about the broker only.
    pub fn excuses_refusals(&self) -> bool {
        match self.fault {
            Fault::KillUsercenter | Fault::DiskFull => true,
            Fault::Reset | Fault::HalfOpen => self.link == Link::ApiUsercenter,
            Fault::KillApi
            | Fault::KillMq
            | Fault::BrokerRestart
            | Fault::BrokerBlocked
            | Fault::BrokerSlow
            | Fault::CrashAfterConfirm
            | Fault::CrashBeforeAck
            | Fault::Poison
            | Fault::QueueDeleted
            | Fault::CollectorSilent
            | Fault::KillApiWithoutBroker => false,
        }
    }
}

/// As it is named on the command line, with its link if it has one.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let link = match self.link {
            Link::ApiBroker => "api to broker",
            Link::MqBroker => "mq to broker",
            Link::ApiUsercenter => "api to usercenter",
        };
        match self.fault {
            Fault::Reset | Fault::HalfOpen => write!(f, "{}, {link}", self.fault),
            fault => fault.fmt(f),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64, faults: &[Fault]) -> Vec<String> {
        Plan::new(seed, faults).take(40).map(|step| format!("{step:?}")).collect()
    }

    #[test]
    fn a_seed_fixes_order_time_and_kind() {
        let all = Fault::value_variants();
        assert_eq!(plan(7, all), plan(7, all));
        assert_ne!(plan(7, all), plan(8, all));
        let reversed: Vec<Fault> = all.iter().rev().copied().collect();
        assert_eq!(plan(7, all), plan(7, &reversed));
    }

    #[test]
    fn a_round_has_every_fault_once() {
        let mut plan = Plan::new(7, Fault::value_variants());
        for _ in 0..3 {
            let mut round: Vec<Fault> =
                plan.by_ref().take(Fault::value_variants().len()).map(|step| step.fault).collect();
            round.sort_unstable();
            assert_eq!(round, Fault::value_variants());
        }
    }
}
