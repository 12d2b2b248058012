//! Runs the one task that publishes all messages. It decides whether a message goes to the broker or to the
//! spool, and publishes the entries of the spool, so that no message overtakes an earlier one.
//!
//! The task opens a session, that is, a connection to the broker, and publishes in rounds. As long as the
//! spool has entries, a round takes the oldest of them, and new messages are appended to the spool. When the
//! spool is empty, a round takes the messages that arrived during the previous round. A round ends when the
//! broker has confirmed all of its messages. Only then does the next round begin. So all messages of a round
//! have the same outcome, and a message that arrives after an earlier message was answered is also sent after
//! that message. If a round takes longer than a tenth of `PUBLISH_TIMEOUT`, the round is overdue, and new
//! messages go to the spool.
//!
//! If a round fails, its messages go to the spool, or stay there, and the session ends. After a pause the
//! task opens another session. Until then, new messages go to the spool. When the service stops, the task
//! publishes the rest of the spool, if there is a session, and ends.
//!
//! A message that the broker does not accept, even alone in its round, must not stop all later messages. Such
//! a message is set aside, that is, it stays in the spool, but is not published again before the next start.
//!
//! ```text
//!   connecting ──────▶ publishing the spool ──────▶ publishing directly
//!       ▲                       │     the spool is empty      │
//!       │                       └──────────────┬──────────────┘
//!       │                                      ▼ the session fails
//!       └──────────────── pausing (if the broker is blocked: first waiting until it is not)
//! ```

use super::{
    copies::Copies,
    message::Message,
    outcome::Published,
    spool::{Done, Spool},
};
use amqp::{Backoff, Failures, IfBlocked, OpenError, Server, Session, Topology, Unconfirmed};
use std::time::{Duration, Instant, SystemTime};
use telemetry::amqp::Broker;
use tokio::{
    pin, select,
    sync::{mpsc, oneshot, watch},
    time::sleep,
};

/// The name of this service's connection on the broker.
pub const CLIENT_ID: &str = "api";

/// The most messages in a round.
const MAX_ROUND: usize = 512;

/// How messages are published.
#[derive(Debug, Clone, Copy)]
pub struct PublishOptions {
    /// How long the broker may take to confirm a message. After that, the message goes to the spool.
    pub timeout: Duration,
    /// Whether a copy of each message goes to the topology's exchange, for other consumers.
    pub copies: bool,
}

/// The state of the broker, as far as the dispatcher knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokerState {
    /// The broker takes messages.
    Connected,
    /// There is no connection.
    Away,
    /// The broker refuses the declaration of a queue. The refusal does not end by itself, so every login
    /// would go to the spool until the spool is full.
    Refuses,
}

/// A message to be published, and the sender for its outcome.
pub struct Request {
    /// The message.
    pub message: Message,
    /// The sender for its outcome.
    pub done: Done,
}

/// The state of the task.
pub struct Dispatcher {
    server: Server,
    publisher: RoundPublisher,
    requests: mpsc::Receiver<Request>,
    stopped: oneshot::Receiver<()>,
    broker_state: watch::Sender<BrokerState>,
    backlog: Backlog,
    backoff: Backoff,
    log: Log,
}

/// Publishes rounds.
struct RoundPublisher {
    topology: Topology,
    /// The longest wait for the confirms of a round.
    timeout: Duration,
    /// How long a round may take before logins stop waiting for its end.
    patience: Duration,
    copies: Option<Copies>,
    broker: Broker,
}

impl RoundPublisher {
    async fn publish(
        &self,
        session: &mut Session,
        messages: impl ExactSizeIterator<Item = &Message> + Clone,
    ) -> Result<(), Unconfirmed> {
        let queue = self.topology.queue.as_str();
        let (started, count) = (Instant::now(), messages.len() as u64);
        let encoded = messages.clone().map(|message| (message.properties(SystemTime::now()), message.body()));
        let result = session.publish(queue, encoded, self.timeout, IfBlocked::Fail).await;
        self.broker.sent(("", queue), count, started, result.err().map(Unconfirmed::reason));
        if let (Ok(()), Some(copies)) = (result, &self.copies) {
            copies.send(messages.cloned().collect());
        }
        result
    }
}

/// The spool, and how much of it has been published.
struct Backlog {
    spool: Spool,
    /// Whether the spool was empty when it was last read, with nothing appended since then.
    is_empty: bool,
    /// All entries up to this number are confirmed or set aside.
    confirmed: u64,
    /// The number of entries in the next round. It is small after a failure, because a slow network may not
    /// carry many entries in time.
    round: usize,
    /// The number of entries that were confirmed since the spool was last empty.
    published: u64,
}

/// Why a session ends.
enum End {
    Trouble(Unconfirmed),
    /// The spool can't be read.
    Spool,
    Stopped,
}

impl From<Unconfirmed> for End {
    fn from(why: Unconfirmed) -> Self {
        Self::Trouble(why)
    }
}

impl Dispatcher {
    /// Makes a dispatcher, which does nothing before [`Dispatcher::run`].
    pub fn new(
        server: Server,
        topology: Topology,
        options: PublishOptions,
        spool: Spool,
        requests: mpsc::Receiver<Request>,
        stopped: oneshot::Receiver<()>,
        broker_state: watch::Sender<BrokerState>,
    ) -> Self {
        let backlog = Backlog { spool, is_empty: false, confirmed: 0, round: 1, published: 0 };
        let broker = Broker::of_hosts(&server.hosts, server.current.clone(), CLIENT_ID);
        let (backoff, log) = (Backoff::new(), Log::new(broker.clone()));
        let copies = options.copies.then(|| Copies::start(server.for_another(), topology.clone()));
        let timeout = options.timeout;
        let publisher = RoundPublisher { topology, timeout, patience: timeout / 10, copies, broker };
        Self { server, publisher, requests, stopped, broker_state, backlog, backoff, log }
    }

    /// Publishes until it is stopped. Then it publishes the rest of the spool, as long as there is a session.
    pub async fn run(mut self) {
        while let Some(mut session) = self.connect().await {
            self.broker_state.send_replace(BrokerState::Connected);
            let end = self.publish(&mut session).await;
            self.broker_state.send_replace(BrokerState::Away);
            self.log.ended(&end);
            match end {
                End::Stopped => {
                    session.close().await;
                    break;
                }
                // Until the broker is unblocked, nothing can be published, not even on another connection.
                End::Trouble(Unconfirmed::Blocked) => {
                    if self.unblocked(&mut session).await.is_none() {
                        break;
                    }
                }
                End::Trouble(_) | End::Spool => {}
            }
            self.backlog.round = 1;
            // A dropped session closes by itself, and nothing here waits for that.
            drop(session);
            if self.pause().await.is_none() {
                break;
            }
        }
        self.backlog.spool.close().await;
    }

    /// Tries to open a session until that succeeds. Returns `None` if the dispatcher is stopped before that.
    async fn connect(&mut self) -> Option<Session> {
        let Self { server, publisher, requests, stopped, broker_state, backlog, backoff, log } = self;
        let connected = async {
            loop {
                match Session::open(server, CLIENT_ID, &publisher.topology, &[]).await {
                    Ok(session) => {
                        log.connected();
                        return session;
                    }
                    Err(error) => {
                        broker_state.send_replace(match error {
                            OpenError::Refused(_) => BrokerState::Refuses,
                            OpenError::Connection(_) | OpenError::Timeout => BrokerState::Away,
                        });
                        log.failures.log(server, &error);
                    }
                }
                backoff.pause().await;
            }
        };
        backlog.append_until(connected, "not_connected", requests, stopped).await
    }

    /// Waits between two sessions. Returns `None` if the dispatcher is stopped before the wait is over.
    async fn pause(&mut self) -> Option<()> {
        let Self { requests, stopped, backlog, backoff, .. } = self;
        backlog.append_until(backoff.pause(), "not_connected", requests, stopped).await
    }

    /// Waits until the broker takes messages again. Returns `None` if the dispatcher is stopped before that.
    async fn unblocked(&mut self, session: &mut Session) -> Option<()> {
        let Self { requests, stopped, backlog, .. } = self;
        backlog.append_until(session.unblocked(), Unconfirmed::Blocked.reason(), requests, stopped).await
    }

    /// Publishes the entries of the spool, and then new messages, until the session ends.
    async fn publish(&mut self, session: &mut Session) -> End {
        loop {
            let round = if self.backlog.is_empty {
                self.publish_next(session).await
            } else {
                self.publish_backlog(session).await
            };
            match round {
                Ok(()) => self.backoff = Backoff::new(),
                Err(end) => return end,
            }
        }
    }

    /// Publishes a round of waiting logins directly. If the round is not confirmed, its logins go to the
    /// spool.
    async fn publish_next(&mut self, session: &mut Session) -> Result<(), End> {
        let mut round = Vec::new();
        select! {
            count = self.requests.recv_many(&mut round, MAX_ROUND) => if count == 0 {
                return Err(End::Stopped);
            },
            why = session.trouble() => return Err(why.into()),
            _ = &mut self.stopped => return Err(End::Stopped),
        }
        let Self { backlog, requests, publisher, .. } = self;
        let publishing = publisher.publish(session, round.iter().map(|request| &request.message));
        match backlog.wait_for(publishing, publisher.patience, requests).await {
            Ok(()) => {
                self.log.confirmed();
                for request in round {
                    // Sending fails if the caller has stopped waiting, which does no harm.
                    let _ = request.done.send(Ok(Published::Confirmed));
                }
                Ok(())
            }
            Err(why) => {
                for request in round {
                    backlog.append(request, why.reason());
                }
                Err(why.into())
            }
        }
    }

    /// Publishes a round from the spool. Logins that arrive meanwhile are appended to the spool. But logins
    /// that arrive during the spool's last round wait until that round ends. Otherwise, the spool would never
    /// become empty under load.
    async fn publish_backlog(&mut self, session: &mut Session) -> Result<(), End> {
        let Self { backlog, requests, publisher, .. } = self;
        let entries = backlog.next().await.ok_or(End::Spool)?;
        let Some((last, _)) = entries.last() else {
            backlog.is_empty = true;
            let published = std::mem::take(&mut backlog.published);
            if published > 0 {
                tracing::info!(published, "published the spooled logins");
            }
            return Ok(());
        };
        let patience = if backlog.ends_with(entries.len()) { publisher.patience } else { Duration::ZERO };
        let messages = entries.iter().map(|(_, message)| message);
        let published = backlog.wait_for(publisher.publish(session, messages), patience, requests).await;
        if let (Err(Unconfirmed::NotAccepted), [(number, message)]) = (published, &*entries) {
            // The message was alone in its round, so it is this message that the broker does not accept.
            let message_id = message.id();
            tracing::error!(
                message_id,
                "the broker does not accept a login; it stays in the spool, and is published again at the next start"
            );
            backlog.set_aside(*number);
        }
        published?;
        self.log.confirmed();
        backlog.confirm(*last, entries.len());
        Ok(())
    }
}

impl Backlog {
    /// Waits for the end of a round. Logins that arrive meanwhile also wait for it. Once the round has taken
    /// longer than `patience`, these logins go to the spool, if the spool takes logins. Otherwise, a broker
    /// that does not answer would let waiting logins reach the limit on requests in flight, and further
    /// logins would be refused.
    async fn wait_for(
        &mut self,
        round: impl Future<Output = Result<(), Unconfirmed>>,
        patience: Duration,
        requests: &mut mpsc::Receiver<Request>,
    ) -> Result<(), Unconfirmed> {
        let (overdue, mut is_overdue) = (sleep(patience), patience.is_zero());
        pin!(round, overdue);
        loop {
            let is_taken = is_overdue && (patience.is_zero() || self.spool.state().borrow().takes);
            select! {
                result = &mut round => return result,
                () = &mut overdue, if !is_overdue => is_overdue = true,
                Some(request) = requests.recv(), if is_taken => self.append(request, "behind_spool"),
            }
        }
    }

    /// Waits for an event. Logins that arrive meanwhile go to the spool, for the reason `why`. Returns `None`
    /// if the dispatcher is stopped before the event.
    async fn append_until<T>(
        &mut self,
        event: impl Future<Output = T>,
        why: &'static str,
        requests: &mut mpsc::Receiver<Request>,
        stopped: &mut oneshot::Receiver<()>,
    ) -> Option<T> {
        pin!(event);
        loop {
            select! {
                result = &mut event => return Some(result),
                Some(request) = requests.recv() => self.append(request, why),
                _ = &mut *stopped => return None,
            }
        }
    }

    fn append(&mut self, request: Request, why: &'static str) {
        self.is_empty = false;
        self.spool.append(request.message, why, request.done);
    }

    /// Reads the entries of the next round. Returns `None` if they can't be read.
    async fn next(&self) -> Option<Vec<(u64, Message)>> {
        self.spool.read(self.confirmed, self.round).await
    }

    /// Whether a round of `count` entries is the last one, because the spool has no more entries.
    fn ends_with(&self, count: usize) -> bool {
        count < self.round
    }

    fn set_aside(&mut self, number: u64) {
        self.confirmed = number;
        self.spool.set_aside(number);
    }

    fn confirm(&mut self, last: u64, count: usize) {
        self.confirmed = last;
        self.published += count as u64;
        self.round = (self.round * 2).min(MAX_ROUND);
        self.spool.remove(last);
    }
}

/// Logs each change of the connection's state once, however long an outage lasts.
struct Log {
    broker: Broker,
    /// The failures to connect since the last session that was logged.
    failures: Failures,
    /// Whether the current session has published something.
    is_useful: bool,
    /// Whether a session has ended without publishing anything. The next sessions may do the same, so they
    /// are not logged.
    is_fruitless: bool,
}

impl Log {
    fn new(broker: Broker) -> Self {
        Self { broker, failures: Failures::default(), is_useful: false, is_fruitless: false }
    }

    fn connected(&mut self) {
        self.is_useful = false;
        if !self.is_fruitless {
            self.failures = Failures::default();
            tracing::info!(broker = %self.broker, "connected to the broker");
        }
    }

    fn confirmed(&mut self) {
        self.is_useful = true;
        if self.is_fruitless {
            self.is_fruitless = false;
            self.connected();
        }
    }

    fn ended(&mut self, end: &End) {
        let reason = match end {
            End::Trouble(why) => &why.to_string(),
            End::Spool => "the spool can't be read",
            End::Stopped => return,
        };
        if !self.is_fruitless {
            tracing::warn!(broker = %self.broker, reason, "lost the connection to the broker");
        }
        // A session whose connection broke may have had nothing to publish, so it does not count as
        // fruitless.
        let broke = matches!(end, End::Trouble(Unconfirmed::ConnectionBroken | Unconfirmed::Blocked));
        self.is_fruitless |= !self.is_useful && !broke;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::Capacity;
    use tempfile::TempDir;

    fn backlog() -> (TempDir, Backlog) {
        let directory = TempDir::new().unwrap();
        let spool = Spool::open(directory.path(), Capacity { entries: 1000, bytes: 1_000_000 }).unwrap();
        (directory, Backlog { spool, is_empty: false, confirmed: 0, round: 1, published: 0 })
    }

    #[tokio::test]
    async fn rounds_double_up_to_the_largest() {
        let (_directory, mut backlog) = backlog();
        for expected in [2, 4, 8, 16, 32, 64, 128, 256, 512, 512] {
            backlog.confirm(0, 1);
            assert_eq!(backlog.round, expected);
            assert!(backlog.ends_with(expected - 1) && !backlog.ends_with(expected));
        }
    }

    #[tokio::test]
    async fn a_login_waits_for_a_round_that_is_not_overdue() {
        let (_directory, mut backlog) = backlog();
        let (sender, mut requests) = mpsc::channel(1);
        let mobile = "13800138000".to_owned().try_into().unwrap();
        let message = Message::new(&opentelemetry::Context::new(), "id".to_owned(), mobile);
        assert!(sender.try_send(Request { message, done: oneshot::channel().0 }).is_ok());
        let round = async {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            Ok(())
        };
        assert_eq!(backlog.wait_for(round, Duration::MAX, &mut requests).await, Ok(()));
        assert!(requests.try_recv().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn between_two_sessions_is_a_pause_which_the_stop_ends() {
        let (_directory, Backlog { spool, .. }) = backlog();
        let server = amqp::connection::parse_url(amqp::connection::DEFAULT_URL).unwrap();
        let (topology, options) = (
            Topology::new("", "e", "k", "q", amqp::QueueType::Classic),
            PublishOptions { timeout: Duration::from_secs(1), copies: false },
        );
        let ((_requests, requests), (stop, stopped)) = (mpsc::channel(1), oneshot::channel());
        let state = watch::Sender::new(BrokerState::Away);
        let mut dispatcher = Dispatcher::new(server, topology, options, spool, requests, stopped, state);
        let before = tokio::time::Instant::now();
        assert!(dispatcher.pause().await.is_some());
        assert!(before.elapsed() >= Duration::from_millis(50), "{:?}", before.elapsed());
        stop.send(()).unwrap();
        assert!(dispatcher.pause().await.is_none());
    }

    #[test]
    fn a_session_that_published_nothing_is_fruitless_unless_it_broke() {
        let server = amqp::connection::parse_url(amqp::connection::DEFAULT_URL).unwrap();
        for (why, is_fruitless) in [(Unconfirmed::NotAccepted, true), (Unconfirmed::ConnectionBroken, false)]
        {
            let mut log = Log::new(Broker::new(server.uri(), "test"));
            log.ended(&End::Trouble(why));
            assert_eq!(log.is_fruitless, is_fruitless, "{why}");
        }
    }
}
