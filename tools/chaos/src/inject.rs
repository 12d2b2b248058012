//! How each fault is injected and ended.

use super::{
    faults::{Fault, Link, Step},
    history::History,
    hostile::Hostile,
    ledger::Ledger,
    load::{self, Load},
    poison::Poison,
    system::{LAST_RETRY_DELAY, Service, System},
};
use amqp::Topology;
use anyhow::{Context, Result};
use harness::{
    poll,
    proxy::{BASIC_ACK, Proxy, Side},
};
use lapin::{
    Channel,
    options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{FieldTable, ShortString},
};
use std::{fs, time::Duration};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};

/// How long to wait until a proxy withholds a frame, or until a queue becomes empty.
const PATIENCE: Duration = Duration::from_secs(10);

/// The result of injecting a fault.
pub struct Injected {
    /// Descriptions of everything that must not happen but did.
    pub wrong: Vec<String>,
    /// How the fault differed from the planned fault, or `None` if it did not differ.
    pub note: Option<&'static str>,
}

impl From<Option<&'static str>> for Injected {
    fn from(note: Option<&'static str>) -> Self {
        Self { wrong: Vec::new(), note }
    }
}

/// The system that faults are injected into, with the logins and the other messages of the run.
pub struct Target<'a> {
    pub system: &'a mut System,
    pub load: &'a Load,
    pub ledger: &'a Ledger,
    pub history: &'a mut History,
    pub poison: &'a mut Poison,
}

impl Target<'_> {
    /// Injects a fault and ends it.
    pub async fn inject(&mut self, step: &Step) -> Result<Injected> {
        let mut wrong = Vec::new();
        match step.fault {
            Fault::KillApi => self.restart(Service::Api).await?,
            Fault::KillUsercenter => self.restart(Service::Usercenter).await?,
            Fault::KillMq => self.restart(Service::Mq).await?,
            Fault::BrokerRestart => {
                self.system.broker.down().await?;
                sleep(step.hold).await;
                self.system.broker.up().await?;
            }
            Fault::Reset => self.link(step.link).cut(),
            Fault::HalfOpen => {
                self.link(step.link).freeze();
                sleep(step.hold).await;
                if step.resets {
                    self.link(step.link).cut();
                }
                self.link(step.link).restore();
            }
            Fault::BrokerBlocked => {
                self.system.broker.set_alarm(true).await?;
                sleep(step.hold).await;
                self.system.broker.set_alarm(false).await?;
            }
            Fault::BrokerSlow => {
                let links = [&self.system.api_broker, &self.system.mq_broker];
                links.iter().for_each(|link| link.slow_down(step.hold / 10));
                sleep(step.hold).await;
                links.iter().for_each(|link| link.restore());
            }
            Fault::CrashAfterConfirm => {
                let confirm = self.system.api_broker.withhold(Side::Server, BASIC_ACK);
                return Ok(self.crash_at(confirm, Service::Api).await?.into());
            }
            Fault::CrashBeforeAck => {
                let ack = self.system.mq_broker.withhold(Side::Client, BASIC_ACK);
                return Ok(self.crash_at(ack, Service::Mq).await?.into());
            }
            Fault::Poison => self.poison.publish(self.system, self.history).await?,
            Fault::DiskFull => {
                // With this limit, api's disk has room for only a few more logins.
                let limit = self.system.spool_size() + 16;
                self.system.kill(Service::Api).await?;
                self.system.api_broker.refuse();
                self.system.start_service(Service::Api, Some(limit)).await?;
                sleep(step.hold).await;
                self.system.kill(Service::Api).await?;
                self.system.api_broker.restore();
                self.system.start_service(Service::Api, None).await?;
            }
            Fault::QueueDeleted => return Ok(self.delete_queue(None).await?.into()),
            Fault::QueueDeletedWithRetries => return Ok(self.delete_queue(Some(step.hold)).await?.into()),
            Fault::CollectorSilent => {
                self.system.collector_link.freeze();
                sleep(step.hold).await;
                self.system.collector_link.restore();
            }
            Fault::KillApiWithoutBroker => {
                self.system.api_broker.refuse();
                sleep(step.hold).await;
                self.restart(Service::Api).await?;
                sleep(step.hold / 2).await;
                self.system.api_broker.restore();
            }
            Fault::HostileCaller => {
                let hostile = Hostile::start(*self.system.api_address.borrow(), 10, 100);
                sleep(step.hold).await;
                wrong.extend(hostile.stop().await.wrong);
            }
            Fault::SilentBroker => {
                let links = [&self.system.api_broker, &self.system.mq_broker];
                links.iter().for_each(|link| link.freeze());
                // After 4 seconds, the services notice that heartbeats are missing.
                sleep(Duration::from_secs(4) + step.hold).await;
                links.iter().for_each(|link| link.restore());
            }
            Fault::Tap => self.tap(step.hold).await?,
            Fault::DatabaseGone => {
                let file = self.system.database();
                let folder = file.parent().context("the database has no folder")?;
                let away = folder.with_extension("away");
                fs::rename(folder, &away)?;
                sleep(step.hold).await;
                // If mq was restarted meanwhile, it made an empty database in the old place.
                let _ = fs::remove_dir_all(folder);
                fs::rename(away, folder)?;
            }
            Fault::KillMqOften => {
                let mut note = None;
                for _ in 0..22 {
                    let ack = self.system.mq_broker.withhold(Side::Client, BASIC_ACK);
                    note = self.crash_at(ack, Service::Mq).await?.or(note);
                }
                return Ok(note.into());
            }
            Fault::BrokerRestartWithRetries => {
                self.history.refuse_all(true).await?;
                sleep(Duration::from_millis(300)).await;
                self.history.refuse_all(false).await?;
                self.system.broker.down().await?;
                sleep(step.hold).await;
                self.system.broker.up().await?;
            }
            Fault::TwoOfEach => {
                for service in Service::ALL {
                    self.system.replace(service, step.hold / 2).await?;
                }
            }
            Fault::DefaultTypeChanged => {
                for queue_type in ["quorum", "classic"] {
                    self.system.broker.node()?.set_default_queue_type(queue_type).await?;
                    self.restart(Service::Mq).await?;
                    self.restart(Service::Api).await?;
                    sleep(step.hold / 2).await;
                }
            }
            Fault::LeaderKilled => {
                self.system.broker.choose_leader(&self.system.topology.queue).await?;
                let leader = self.system.next_node()?;
                leader.kill()?;
                sleep(step.hold).await;
                leader.up().await?;
            }
            Fault::LeaderFrozen => {
                self.system.broker.choose_leader(&self.system.topology.queue).await?;
                let leader = self.system.next_node()?;
                leader.set_frozen(true)?;
                sleep(step.hold).await;
                leader.set_frozen(false)?;
            }
            Fault::RollingRestart => {
                for _ in 0..3 {
                    let node = self.system.next_node()?;
                    node.stop().await?;
                    node.up().await?;
                    sleep(step.hold / 3).await;
                }
            }
            Fault::MessageTooLarge => {
                self.poison.publish_too_large(self.system).await?;
                // The control does not limit the size of messages.
                if !self.system.is_control {
                    let api = *self.system.api_address.borrow();
                    load::log_in_with_large_baggage(api, self.ledger).await;
                    wrong
                        .extend(load::send_too_large_body(api).await.err().map(|error| format!("{error:#}")));
                }
            }
        }
        // With the control, wrong answers don't count, because the control does not refuse such requests.
        wrong.retain(|_| !self.system.is_control);
        Ok(Injected { wrong, note: None })
    }

    fn link(&self, link: Link) -> &Proxy {
        match link {
            Link::ApiBroker => &self.system.api_broker,
            Link::MqBroker => &self.system.mq_broker,
            Link::ApiUsercenter => &self.system.api_usercenter,
        }
    }

    async fn restart(&mut self, service: Service) -> Result<()> {
        self.system.kill(service).await?;
        self.system.start_service(service, None).await
    }

    /// Binds a new queue to the exchange for the time `hold`, in place of the main queue.
    async fn tap(&self, hold: Duration) -> Result<()> {
        let (connection, channel) = self.system.broker.connect().await?;
        let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
        let tap = channel.queue_declare("".into(), options, FieldTable::default()).await?;
        let Topology { exchange, routing_key, queue, .. } = &self.system.topology;
        let (exchange, key) = (ShortString::from(exchange.as_str()), ShortString::from(routing_key.as_str()));
        let queue = ShortString::from(queue.as_str());
        let (options, none) = (QueueBindOptions::default(), FieldTable::default);
        channel.queue_bind(tap.name().clone(), exchange.clone(), key.clone(), options, none()).await?;
        channel.queue_unbind(queue.clone(), exchange.clone(), key.clone(), none()).await?;
        sleep(hold).await;
        channel.queue_bind(queue, exchange, key, options, none()).await?;
        connection.close(200, "done".into()).await?;
        Ok(())
    }

    /// Waits until a frame to or from a service has been withheld, for at most `PATIENCE`. Then kills the
    /// service and starts it again.
    async fn crash_at(
        &mut self,
        sprung: oneshot::Receiver<()>,
        service: Service,
    ) -> Result<Option<&'static str>> {
        let sprung = matches!(timeout(PATIENCE, sprung).await, Ok(Ok(())));
        self.system.kill(service).await?;
        for link in [&self.system.api_broker, &self.system.mq_broker] {
            // Restoring the link also removes the trap if its frame didn't come.
            link.restore();
        }
        self.system.start_service(service, None).await?;
        Ok((!sprung).then_some("killed although the awaited frame did not come"))
    }

    /// Deletes the main queue once it is empty and no message can enter it any more, not even from a retry
    /// queue. With `hold`, then publishes messages to a retry queue. The main queue stays deleted until the
    /// delay of these messages has ended and the time `hold` has passed. With the control, checks only
    /// whether the main queue is empty, because the control loses logins and has no dead letters.
    async fn delete_queue(&mut self, hold: Option<Duration>) -> Result<Option<&'static str>> {
        self.load.pause().await;
        let (connection, channel) = self.system.broker.connect().await?;
        let queue: ShortString = self.system.topology.queue.as_str().into();
        let empty = poll(PATIENCE, async || {
            self.history.catch_up().await.ok()?;
            let owes_nothing = self.system.is_control
                || (self.poison.is_dead(&channel, self.system).await.ok()?
                    && self.poison.owed(self.history) == 0
                    && self.ledger.owed(self.history).is_empty());
            let is_empty = owes_nothing && messages(&channel, &queue).await.ok()? == 0;
            is_empty.then_some(())
        });
        let is_empty = empty.await.is_some();
        if is_empty && let Some(hold) = hold {
            // Without this refusal, mq would declare the queue again.
            self.system.mq_broker.refuse();
            channel.queue_delete(queue, QueueDeleteOptions::default()).await?;
            self.poison.publish_retries(self.system).await?;
            sleep(LAST_RETRY_DELAY + hold).await;
            self.system.mq_broker.restore();
        } else if is_empty {
            channel.queue_delete(queue, QueueDeleteOptions::default()).await?;
        }
        connection.close(200, "done".into()).await?;
        self.load.resume();
        Ok((!is_empty).then_some("not deleted, because the queue did not become empty"))
    }
}

/// Returns how many messages are ready in a queue.
pub async fn messages(channel: &Channel, queue: &ShortString) -> Result<u32> {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let declared = channel.queue_declare(queue.clone(), passive, FieldTable::default()).await;
    Ok(declared.with_context(|| format!("asking how many messages are in {queue}"))?.message_count())
}

/// The time from the end of a fault until the system worked again.
pub struct Recovery {
    /// From the end of the fault until the first 200 answer to a login that was sent after the fault.
    pub answered: Duration,
    /// From the end of the fault until the effect of such a login was seen.
    pub applied: Duration,
}

impl Target<'_> {
    /// Waits until logins are answered and applied again; returns `None` if this takes longer than `limit`.
    pub async fn recover(
        &mut self,
        since: Instant,
        mark: usize,
        limit: Duration,
    ) -> Result<Option<Recovery>> {
        let deadline = since + limit;
        let mut answered = None;
        while Instant::now() < deadline {
            let logins = self.ledger.answered_since(mark, since);
            if let Some(first) = logins.iter().map(|login| login.ended - since).min() {
                let answered = *answered.get_or_insert(first);
                self.history.catch_up().await?;
                if logins.iter().any(|login| self.history.has(login.trace)) {
                    return Ok(Some(Recovery { answered, applied: since.elapsed() }));
                }
            }
            sleep(Duration::from_millis(10)).await;
        }
        Ok(None)
    }
}
