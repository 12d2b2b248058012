//! Delivers messages to the broker, or writes them to the spool on disk and delivers them later, in order.
//!
//! - `message`: the message; `outcome`: how the message was published, or why not
//! - `dispatch`: the one task that sends all messages, to the broker directly, or to the spool and then to
//!   the broker
//! - `spool`: the file of messages that the broker has not confirmed

mod copies;
mod dispatch;
mod message;
mod outcome;
mod spool;

use amqp::{Server, Topology};
use dispatch::{BrokerState, Dispatcher, Request};
use std::{future, time::Duration};
use tokio::{
    select,
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};

pub use dispatch::{CLIENT_ID, PublishOptions};
pub use message::Message;
pub use outcome::{PublishError, Published};
pub use spool::{Capacity, FILE as SPOOL_FILE, OpenSpoolError, Spool};

/// The largest number of messages in the channel to the dispatcher. Further messages wait until the channel
/// has room.
const MAX_WAITING: usize = 1024;

/// Takes messages. All clones share one connection to the broker.
#[derive(Clone)]
pub struct Outbox {
    requests: mpsc::Sender<Request>,
    /// The longest time that publishing may take, including the write to the spool.
    limit: Duration,
    broker: watch::Receiver<BrokerState>,
    spool: watch::Receiver<spool::State>,
}

/// Whether logins can be published now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Whether the broker takes messages.
    pub broker: bool,
    /// False if the broker refuses the declaration of a queue.
    pub topology: bool,
    /// Whether the spool has room, and its disk works.
    pub spool: bool,
    /// The number of logins in the spool.
    pub spooled: u64,
    /// The bytes of these logins.
    pub bytes: u64,
    /// The time since api accepted the oldest of these logins, or zero if the spool is empty.
    pub age: Duration,
}

impl Readiness {
    /// Whether a login would be published, either directly or through the spool.
    pub fn is_ready(&self) -> bool {
        self.topology && (self.spool || (self.broker && self.spooled == 0))
    }
}

impl Outbox {
    /// Starts publishing. Connects to the broker in the background, and connects again whenever the
    /// connection breaks.
    pub fn start(
        server: Server,
        topology: Topology,
        options: PublishOptions,
        spool: Spool,
    ) -> (Self, Publishing) {
        let (requests, incoming) = mpsc::channel(MAX_WAITING);
        let (stop, stopped) = oneshot::channel();
        let (broker_state, broker) = watch::channel(BrokerState::Away);
        // A message waits for the messages before it, then for its own confirmation, then for the disk.
        let limit = options.timeout.mul_f64(2.5);
        let spool_state = spool.state();
        observe(spool.state());
        let spool_panicked = spool.panicked();
        let dispatcher = Dispatcher::new(server, topology, options, spool, incoming, stopped, broker_state);
        let task = tokio::spawn(async move {
            select! {
                () = dispatcher.run() => Ok(()),
                () = spool_panicked => Err("the spool's thread"),
            }
        });
        let publishing = Publishing { stop, task, spool: spool_state.clone() };
        (Self { requests, limit, broker, spool: spool_state }, publishing)
    }

    /// Whether messages can be published now.
    pub fn readiness(&self) -> Readiness {
        let (broker, spool) = (*self.broker.borrow(), *self.spool.borrow());
        Readiness {
            broker: broker == BrokerState::Connected,
            topology: broker != BrokerState::Refuses,
            spool: spool.takes,
            spooled: spool.entries,
            bytes: spool.bytes,
            age: spool.age(),
        }
    }

    /// Publishes a message. If the future is dropped, the message may be published nevertheless.
    ///
    /// # Errors
    /// If the broker has not confirmed the message, and the message could not be written to disk either.
    pub async fn publish(&self, message: Message) -> Result<Published, PublishError> {
        let (done, outcome) = oneshot::channel();
        let handed_over = async {
            self.requests.send(Request { message, done }).await.ok()?;
            outcome.await.ok()
        };
        // If there is no outcome, the disk hangs or the service is ending, and nobody knows whether the
        // message was published.
        timeout(self.limit, handed_over).await.ok().flatten().unwrap_or(Err(PublishError::SpoolFailed))
    }
}

/// Registers the metrics of the spool.
fn observe(spool: watch::Receiver<spool::State>) {
    let meter = telemetry::meter("api", env!("CARGO_PKG_VERSION"));
    let gauge = |name, unit, description, value: fn(&spool::State) -> u64| {
        let spool = spool.clone();
        meter
            .u64_observable_gauge(name)
            .with_unit(unit)
            .with_description(description)
            .with_callback(move |observer| {
                let state = *spool.borrow();
                observer.observe(value(&state), &[]);
            })
            .build();
    };
    gauge("throughline.spool.entries", "{login}", "Logins in the spool.", |spool| spool.entries);
    gauge("throughline.spool.size", "By", "Bytes of the logins in the spool.", |spool| spool.bytes);
    gauge("throughline.spool.set_aside", "{login}", "Logins that were set aside.", |spool| spool.set_aside);
    gauge("throughline.spool.age", "s", "Time since api accepted the oldest login in the spool.", |spool| {
        spool.age().as_secs()
    });
}

/// The task that runs behind an [`Outbox`].
pub struct Publishing {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), &'static str>>,
    spool: watch::Receiver<spool::State>,
}

impl Publishing {
    /// Waits until the task or the spool's thread panics. Returns which of the two panicked. If nobody waited
    /// for a panic, logins would be refused while `/readyz` still reported the last state.
    pub async fn failed(&mut self) -> &'static str {
        match (&mut self.task).await {
            Err(_) => "the dispatcher",
            Ok(Err(part)) => part,
            // The task was stopped.
            Ok(Ok(())) => future::pending().await,
        }
    }

    /// Publishes the logins in the spool until `deadline`, if there is a connection. The rest stays in the
    /// spool for the next start. Call this when no more logins will come.
    pub async fn close(mut self, deadline: Instant) {
        // Sending fails only if the task has already ended, and then it needs no signal.
        let _ = self.stop.send(());
        if timeout_at(deadline, &mut self.task).await.is_err() {
            self.task.abort();
        }
        let spooled = self.spool.borrow().entries;
        if spooled > 0 {
            tracing::warn!(spooled, "logins stay in the spool until the next start");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_published_directly_only_if_the_spool_is_empty() {
        for (spool, broker, spooled, expected) in [
            (true, false, 1, true),
            (false, true, 0, true),
            (false, true, 1, false),
            (false, false, 0, false),
        ] {
            let ready = |topology| {
                Readiness { broker, topology, spool, spooled, bytes: 0, age: Duration::ZERO }.is_ready()
            };
            assert_eq!(ready(true), expected, "{spool} {broker} {spooled}");
            assert!(!ready(false));
        }
    }
}
