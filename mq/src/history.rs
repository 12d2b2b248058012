//! The login history in SQLite. Other modules use a [`History`]. The connection is in the module `database`.
//!
//! Changes that are requested at the same time share a transaction (group commit). Making a transaction
//! durable is expensive, and costs the same for one change as for fifty.

mod database;

use database::Database;
use sqlx::sqlite::SqliteConnectOptions;
use std::{future, time::Duration};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

pub use database::{Change, Login, Refused, Secret, parse_url};

/// The pause between two attempts to reach the database.
const PAUSE: Duration = Duration::from_millis(200);

/// After this time without a request, the database is checked.
const CHECK: Duration = Duration::from_secs(1);

/// The largest number of changes in one transaction.
const MAX_GROUP: usize = 256;

/// The result of recording a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processed {
    /// The login took effect, durably.
    Applied,
    /// The login had taken effect before, so it changed nothing.
    Duplicate,
}

/// The history of logins, each recorded once.
///
/// While the database is unavailable, calls wait. They don't fail, and all of them succeed when the database
/// is back. [`History::available`] tells whether it is available.
#[derive(Clone)]
pub struct History {
    requests: mpsc::Sender<Request>,
    available: watch::Receiver<bool>,
    secret: watch::Receiver<Option<Secret>>,
}

struct Request {
    change: Change,
    reply: oneshot::Sender<Result<i64, Refused>>,
}

impl History {
    /// Starts the history. The database is opened in the background, and opened again whenever it fails. If
    /// the returned task panics, the history can't be used any more.
    pub fn start(options: SqliteConnectOptions) -> (Self, JoinHandle<()>) {
        let (requests, receiver) = mpsc::channel(MAX_GROUP);
        let (sender, available) = watch::channel(false);
        let (secret_sender, secret) = watch::channel(None);
        let task = tokio::spawn(keep(Database::new(options), receiver, sender, secret_sender));
        (Self { requests, available, secret }, task)
    }

    /// Returns a receiver that tells whether the database can be used.
    pub fn available(&self) -> watch::Receiver<bool> {
        self.available.clone()
    }

    /// Waits until the database has been available, and returns the secret of this history.
    pub async fn secret(&self) -> Secret {
        match self.secret.clone().wait_for(Option::is_some).await.map(|secret| *secret) {
            Ok(Some(secret)) => secret,
            // The task has panicked, or the runtime is shutting down, so the process is ending.
            _ => future::pending().await,
        }
    }

    /// Commits a change, durably. Returns its result, which [`Change`] describes.
    ///
    /// # Errors
    /// If the database refuses this change.
    pub async fn commit(&self, change: Change) -> Result<i64, Refused> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.send(Request { change, reply }).await;
        match (sent, answer.await) {
            (Ok(()), Ok(answer)) => answer,
            // The task has panicked, or the runtime is shutting down, so the process is ending.
            _ => future::pending().await,
        }
    }
}

/// Commits the requested changes, until no more can be requested.
async fn keep(
    mut database: Database,
    mut requests: mpsc::Receiver<Request>,
    available: watch::Sender<bool>,
    secret: watch::Sender<Option<Secret>>,
) {
    // Try to open the database before there is a request, so that health checks tell the truth from the
    // start.
    commit(&mut database, &[], &available).await;
    secret.send_replace(database.secret());
    let mut group = Vec::new();
    // Also check the database when there has been no request for a while, because its file may have been
    // deleted.
    while timeout(CHECK, requests.recv_many(&mut group, MAX_GROUP)).await != Ok(0) {
        // If a caller is gone, its message will be delivered again. Its change is dropped, because one
        // redelivery must not be counted twice.
        group.retain(|request| !request.reply.is_closed());
        let (changes, replies): (Vec<_>, Vec<_>) = group.drain(..).map(|r| (r.change, r.reply)).unzip();
        let answers = commit(&mut database, &changes, &available).await;
        for (reply, answer) in replies.into_iter().zip(answers) {
            // The caller may be gone, because of a deadline, or because its connection was lost.
            let _ = reply.send(answer);
        }
    }
}

/// Tries until the database has committed these changes. No change is lost, and none fails because the
/// database is unavailable.
async fn commit(
    database: &mut Database,
    changes: &[Change],
    available: &watch::Sender<bool>,
) -> Vec<Result<i64, Refused>> {
    let mut was_told = false;
    loop {
        match database.commit(changes).await {
            Ok(answers) => {
                if available.send_if_modified(|available| !std::mem::replace(available, true)) {
                    tracing::info!("the database is available");
                }
                return answers;
            }
            Err(error) => {
                available.send_if_modified(|available| std::mem::replace(available, false));
                // This is logged once, not for every attempt.
                if !std::mem::replace(&mut was_told, true) {
                    let why = telemetry::causes(&*error);
                    tracing::warn!("the database is unavailable; still trying: {why}");
                }
                sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_redelivery_whose_caller_is_gone_before_the_database_comes_is_not_counted() {
        let directory = TempDir::new().unwrap();
        // There is a file where the folder should be.
        let folder = directory.path().join("data");
        fs::write(&folder, "").unwrap();
        let url = format!("sqlite://{}/mq.db", folder.display());
        let (history, _) = History::start(parse_url(&url).unwrap());
        // The first attempt, which has no request, begins before any of these calls.
        for _ in 0..30 {
            let counted = history.commit(Change::CountRedelivery("id".to_owned()));
            assert!(timeout(Duration::from_millis(1), counted).await.is_err());
        }
        fs::remove_file(&folder).unwrap();
        assert_eq!(history.commit(Change::CountRedelivery("id".to_owned())).await, Ok(1));
    }
}
