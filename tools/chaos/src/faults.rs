//! The kinds of fault, and their order. Only the seed decides the order, so that a run can be repeated.

use super::broker::Kind;
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
    /// The broker is killed, and comes back with its durable queues and messages.
    BrokerRestart,
    /// The connections of a link are reset.
    Reset,
    /// A link goes silent. Later, the bytes that were sent in the meantime arrive, or the connections are
    /// reset.
    HalfOpen,
    /// The broker raises its memory alarm and accepts no messages (connection.blocked).
    BrokerBlocked,
    /// All data to and from the broker arrive late.
    BrokerSlow,
    /// api is killed after the broker has confirmed a login, but before api has answered it.
    CrashAfterConfirm,
    /// mq is killed after it has processed a login, but before the broker has received the acknowledgement.
    CrashBeforeAck,
    /// Two messages are published: one is unreadable, and the database refuses the other.
    Poison,
    /// api can't write to its disk while the broker is away.
    DiskFull,
    /// The main queue is deleted while it has a consumer. It must be empty, because messages in it would be
    /// lost.
    QueueDeleted,
    /// The main queue is deleted, and is declared again only after the delays of waiting retries have ended.
    QueueDeletedWithRetries,
    /// The collector goes silent.
    CollectorSilent,
    /// api is killed while the broker is away, and started again before the broker is back.
    KillApiWithoutBroker,
    /// Callers send large but valid contexts for an unknown user, requests that they don't finish, and requests
    /// whose connection they reset.
    HostileCaller,
    /// One body is too large for api, and another body is too large for mq. One context is too long for a
    /// frame of api, and one header is too long for a frame of mq.
    MessageTooLarge,
    /// The broker stops answering both services, until confirms and heartbeats are overdue.
    SilentBroker,
    /// Another program's queue is bound to the exchange in place of the main queue.
    Tap,
    /// The folder of mq's database is moved away, and moved back later.
    DatabaseGone,
    /// mq is killed 22 times in a row, each time after it has processed a login, but before the broker has
    /// received the acknowledgement.
    KillMqOften,
    /// The broker is killed while messages wait for a retry.
    BrokerRestartWithRetries,
    /// One service after the other gets a second instance. Both instances run for a while, and then the first
    /// is killed. The spool of the killed api is drained.
    TwoOfEach,
    /// The default queue type of the virtual host becomes quorum, and then classic. After each change, api
    /// and mq are killed and started again. This needs RabbitMQ.
    DefaultTypeChanged,
    /// The node with the leader of the main queue is killed, and comes back. This needs a cluster.
    LeaderKilled,
    /// The node with the leader of the main queue freezes, while the services are connected to another node.
    /// This needs a cluster.
    LeaderFrozen,
    /// The nodes are stopped and started again, one after the other. This needs a cluster.
    RollingRestart,
}

impl Fault {
    /// Returns whether this kind of fault exists on this broker.
    pub fn exists_on(self, broker: Kind) -> bool {
        match self {
            Self::DefaultTypeChanged => broker != Kind::Embedded,
            Self::LeaderKilled | Self::LeaderFrozen | Self::RollingRestart => broker == Kind::Cluster,
            _ => true,
        }
    }
}

/// A link that can fail while the other links work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// From api to the broker.
    ApiBroker,
    /// From mq to the broker.
    MqBroker,
    /// From api to usercenter.
    ApiUsercenter,
}

/// A fault as it is planned.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// The kind of fault.
    pub fault: Fault,
    /// How long the system runs undisturbed before the fault.
    pub pause: Duration,
    /// How long the fault lasts, if faults of this kind have a duration.
    pub hold: Duration,
    /// The link that fails, if faults of this kind concern one link.
    pub link: Link,
    /// Whether the connections of a silent link are reset at the end of the fault.
    pub resets: bool,
}

/// The endless sequence of faults of a run. Each round has every chosen kind once, in a new random order.
pub struct Plan {
    rng: Rng,
    faults: Vec<Fault>,
    round: Vec<Fault>,
}

impl Plan {
    /// Makes the plan that belongs to this seed and these kinds of fault.
    pub fn new(seed: u64, faults: &[Fault]) -> Self {
        let mut faults = faults.to_vec();
        // The order of `faults` must make no difference.
        faults.sort_unstable();
        faults.dedup();
        Self { rng: Rng::with_seed(seed), faults, round: Vec::new() }
    }

    /// Returns the number of faults in a round.
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
            // The services detect a silent link after 4 seconds, so they detect only the longer ones of these
            // faults.
            Fault::HalfOpen => between(2000, 7000),
            // After 5 seconds, the other nodes have chosen another leader.
            Fault::LeaderFrozen => between(5000, 15000),
            _ => between(1000, 3000),
        };
        let link = [Link::ApiBroker, Link::MqBroker, Link::ApiUsercenter][self.rng.usize(..3)];
        Some(Step { fault, pause, hold, link, resets: self.rng.bool() })
    }
}

impl Step {
    /// Returns whether logins may be refused during the fault, because the fault affects usercenter or api's
    /// disk.
    pub fn excuses_refusals(&self) -> bool {
        match self.fault {
            Fault::KillUsercenter | Fault::DiskFull | Fault::TwoOfEach => true,
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
            | Fault::QueueDeletedWithRetries
            | Fault::CollectorSilent
            | Fault::KillApiWithoutBroker
            | Fault::HostileCaller
            | Fault::MessageTooLarge
            | Fault::SilentBroker
            | Fault::Tap
            | Fault::DatabaseGone
            | Fault::KillMqOften
            | Fault::BrokerRestartWithRetries
            | Fault::DefaultTypeChanged
            | Fault::LeaderKilled
            | Fault::LeaderFrozen
            | Fault::RollingRestart => false,
        }
    }
}

/// Writes the fault as it is named on the command line, and its link if it has one.
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
