//! The login history in SQLite. [`History`] is what others hold; the connection is in `store`.
//!
//! Callers that come at the same time share a transaction (group commit): making it durable is what
//! costs, and it costs the same for one change as for fifty.

mod store;

use crate::processing::{Login, Processed};
use sqlx::sqlite::SqliteConnectOptions;
use std::{future, time::Duration};
use store::{Change, Store};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::sleep,
};

pub use store::parse_url;

/// Between two attempts to reach the database.
const PAUSE: Duration = Duration::from_millis(200);

/// Changes that share a transaction, at most.
const MAX_GROUP: usize = 256;

/// The database refuses one login: its content breaks a rule there. Others are not concerned.
// Without the database's own text, which may quote the row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the database refuses this login (code {code})")]
pub struct Refused {
    /// The database's code: SQLite's extended result code, or an SQLSTATE.
    pub code: String,
}

/// The history of logins, each recorded once.
///
/// While the database is unavailable, calls wait: that is nobody's failure, and all of them succeed when
/// it is back. [`History::available`] tells.
#[derive(Clone)]
pub struct History {
    requests: mpsc::Sender<Request>,
    available: watch::Receiver<bool>,
}

struct Request {
    change: Change,
    reply: oneshot::Sender<Result<i64, Refused>>,
}

impl History {
    /// Opens the database in the background, and again whenever it fails.
    pub fn start(options: SqliteConnectOptions) -> Self {
        let (requests, receiver) = mpsc::channel(MAX_GROUP);
        let (sender, available) = watch::channel(false);
        tokio::spawn(keep(Store::new(options), receiver, sender));
        Self { requests, available }
    }

    /// Whether the database can be used.
    pub fn available(&self) -> watch::Receiver<bool> {
        self.available.clone()
    }

    /// Records a login and counts it, unless that was done before. Once this returns, it is durable.
    ///
    /// # Errors
    /// If the database refuses this very login.
    pub async fn apply(&self, login: Login) -> Result<Processed, Refused> {
        let recorded = self.commit(Change::Apply(login)).await?;
        Ok(if recorded == 0 { Processed::Duplicate } else { Processed::Applied })
    }

    /// Counts that a message was delivered once more without a result of the time before; how often by now.
    ///
    /// # Errors
    /// If the database refuses this very message.
    pub async fn count_redelivery(&self, message_id: String) -> Result<i64, Refused> {
        self.commit(Change::CountRedelivery(message_id)).await
    }

    /// Forgets that count.
    ///
    /// # Errors
    /// If the database refuses this very message.
    pub async fn forget_redeliveries(&self, message_id: String) -> Result<(), Refused> {
        self.commit(Change::ForgetRedeliveries(message_id)).await.map(drop)
    }

    async fn commit(&self, change: Change) -> Result<i64, Refused> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.send(Request { change, reply }).await;
        match (sent, answer.await) {
            (Ok(()), Ok(answer)) => answer,
            // The task is gone, and with it the runtime: the process is ending.
            _ => future::pending().await,
        }
    }
}

/// Commits what is asked for, until nobody can ask any more.
async fn keep(mut store: Store, mut requests: mpsc::Receiver<Request>, available: watch::Sender<bool>) {
    // Before anything is asked for: health should tell the truth from the start.
    commit(&mut store, &[], &available).await;
    let mut group = Vec::new();
    while requests.recv_many(&mut group, MAX_GROUP).await > 0 {
        let (changes, replies): (Vec<_>, Vec<_>) = group.drain(..).map(|r| (r.change, r.reply)).unzip();
        let answers = commit(&mut store, &changes, &available).await;
        for (reply, answer) in replies.into_iter().zip(answers) {
            // Who asked may be gone: cut off at a deadline, or with its connection.
            let _ = reply.send(answer);
        }
    }
}

/// Tries until the database has taken these changes: none is lost, none is anybody's failure.
async fn commit(
    store: &mut Store,
    changes: &[Change],
    available: &watch::Sender<bool>,
) -> Vec<Result<i64, Refused>> {
    let mut was_told = false;
    loop {
        match store.commit(changes).await {
            Ok(answers) => {
                if available.send_if_modified(|available| !std::mem::replace(available, true)) {
                    tracing::info!("the database is available");
                }
                return answers;
            }
            Err(error) => {
                available.send_if_modified(|available| std::mem::replace(available, false));
                // Once, not for every attempt.
                if !std::mem::replace(&mut was_told, true) {
                    tracing::warn!("the database is unavailable; trying on: {error:#}");
                }
                sleep(PAUSE).await;
            }
        }
    }
}
