//! Keeps unconfirmed logins on disk, in order and up to a bound. A login is synced to disk before its caller
//! gets an answer. `dispatch` appends logins, and reads and removes those that it publishes.
//!
//! A separate thread does the work, because a sync blocks. All logins that arrive during one sync are written
//! by the next sync, so many waiting logins share a sync. The module `store` reads and writes the file.

mod store;

use super::{
    message::Message,
    outcome::{PublishError, Published},
};
use futures_util::{FutureExt, future};
use std::{
    iter,
    path::Path,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, SystemTime},
};
use store::{RETRY, Store};
use tokio::sync::{oneshot, watch};

pub use store::{Capacity, FILE, OpenSpoolError};

/// The largest number of commands in one transaction.
const MAX_TOGETHER: usize = 4096;

/// The open spool. When it is dropped, its thread carries out the commands that were sent, and then closes
/// the file.
pub struct Spool {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<State>,
    /// Becomes ready when the thread ends, with an error if the thread panicked.
    closed: future::Shared<oneshot::Receiver<()>>,
}

/// The part of the spool's state that other threads may read.
#[derive(Debug, Clone, Copy, Default)]
pub struct State {
    /// The number of logins in the spool.
    pub entries: u64,
    /// The bytes of these logins.
    pub bytes: u64,
    /// The number of logins in the spool that were set aside.
    pub set_aside: u64,
    /// Whether the spool has room, and its disk works.
    pub takes: bool,
    /// When api accepted the oldest login in the spool.
    oldest: Option<SystemTime>,
}

/// The sender for the outcome of a message. If the sender is dropped, nobody knows the outcome.
pub type Done = oneshot::Sender<Result<Published, PublishError>>;

enum Command {
    Append(Message, &'static str, Done),
    Read { after: u64, count: usize, entries: oneshot::Sender<Vec<(u64, Message)>> },
    Remove { through: u64 },
    SetAside { number: u64 },
}

impl State {
    /// Returns the time since api accepted the oldest login in the spool, or zero if the spool is empty.
    pub fn age(&self) -> Duration {
        // The clock may have been set back.
        self.oldest.and_then(|taken| taken.elapsed().ok()).unwrap_or_default()
    }
}

impl Spool {
    /// Opens the spool's file in this directory. Makes the directory and the file if they are missing,
    /// readable only by the user of this process.
    ///
    /// # Errors
    /// If the file can't be opened, is in use by another process, or is damaged.
    pub fn open(directory: &Path, capacity: Capacity) -> Result<Self, OpenSpoolError> {
        let store = Store::open(directory, capacity)?;
        let (commands, received) = mpsc::channel();
        let (told, state) = watch::channel(State::default());
        let mut keeper = Keeper {
            store,
            state: told,
            is_failing: false,
            is_failure_told: false,
            is_full: false,
            through: None,
        };
        keeper.tell();
        let (open, closed) = oneshot::channel();
        thread::Builder::new().name("spool".to_owned()).spawn(move || {
            keeper.run(received);
            let _ = open.send(());
        })?;
        Ok(Self { commands, state, closed: closed.shared() })
    }

    /// Waits until the thread panics.
    pub fn panicked(&self) -> impl Future<Output = ()> + use<> {
        let closed = self.closed.clone();
        async {
            if closed.await.is_ok() {
                future::pending().await
            }
        }
    }

    /// Returns the part of the spool's state that other threads may read.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Appends a login, which is in the spool for the reason `why`. The outcome goes to `done`.
    pub fn append(&self, message: Message, why: &'static str, done: Done) {
        let _ = self.commands.send(Command::Append(message, why, done));
    }

    /// Returns up to `count` entries after this number, in order. The result includes entries whose append
    /// was requested before this call.
    pub async fn read(&self, after: u64, count: usize) -> Option<Vec<(u64, Message)>> {
        let (entries, read) = oneshot::channel();
        let _ = self.commands.send(Command::Read { after, count, entries });
        read.await.ok()
    }

    /// Sets an entry aside. [`Spool::remove`] then keeps this entry, which is published again at the next
    /// start.
    pub fn set_aside(&self, number: u64) {
        let _ = self.commands.send(Command::SetAside { number });
    }

    /// Makes the thread remove all entries up to this number, except for those that were set aside. An entry
    /// takes up room until it is removed.
    pub fn remove(&self, through: u64) {
        let _ = self.commands.send(Command::Remove { through });
    }

    /// Waits until all commands are carried out, and the file is closed.
    pub async fn close(self) {
        drop(self.commands);
        let _ = self.closed.await;
    }
}

/// The state of the thread.
struct Keeper {
    store: Store,
    state: watch::Sender<State>,
    /// Whether the last change failed.
    is_failing: bool,
    /// Whether a failed change was logged, and no login has been appended since then.
    is_failure_told: bool,
    is_full: bool,
    /// Entries up to this number must still be removed, because an earlier removal failed.
    through: Option<u64>,
}

impl Keeper {
    /// Carries out commands until no more can be sent.
    fn run(mut self, commands: mpsc::Receiver<Command>) {
        loop {
            match commands.recv_timeout(RETRY) {
                Ok(first) => {
                    let together = iter::once(first).chain(commands.try_iter().take(MAX_TOGETHER)).collect();
                    self.take(together);
                }
                // Try again even if there is no command. Nothing else would then detect that the disk works
                // again, or that the file is gone.
                Err(RecvTimeoutError::Timeout) if self.is_failing || self.store.is_gone() => {
                    self.is_failing = true;
                    self.take(Vec::new());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Makes the changes first, in one transaction, and then the reads.
    fn take(&mut self, commands: Vec<Command>) {
        let (mut appended, mut reads, mut through) = (Vec::new(), Vec::new(), self.through);
        for command in commands {
            match command {
                Command::Append(message, why, done) => appended.push((message, why, done)),
                Command::Read { after, count, entries } => reads.push((after, count, entries)),
                Command::Remove { through: number } => through = through.max(Some(number)),
                Command::SetAside { number } => {
                    self.store.set_aside(number);
                    self.state.send_modify(|state| state.set_aside += 1);
                }
            }
        }
        if !appended.is_empty() || through.is_some() || self.is_failing {
            let messages = appended.iter().map(|(message, ..)| message.to_bytes());
            let outcomes = self.store.change(messages, through);
            self.through = through.filter(|_| outcomes.is_err());
            self.log(&outcomes);
            // The state is updated first, so that it is up to date when a caller has its answer.
            self.tell();
            let mut outcomes = outcomes.unwrap_or_default().into_iter();
            for (_, why, done) in appended {
                // Sending fails if the caller has stopped waiting, which does no harm.
                let _ = done.send(match outcomes.next() {
                    Some(true) => Ok(Published::Spooled(why)),
                    Some(false) => Err(PublishError::SpoolFull),
                    None => Err(PublishError::SpoolFailed),
                });
            }
        }
        for (after, count, entries) in reads {
            // Without an answer, the entries can't be read.
            let _ = self.store.read(after, count).map(|read| entries.send(read));
        }
    }

    /// Logs each change once, not for every login.
    fn log(&mut self, outcomes: &Result<Vec<bool>, redb::Error>) {
        match outcomes {
            Err(error) if !self.is_failure_told => {
                self.is_failure_told = true;
                tracing::error!(%error, "the spool failed; logins that the broker does not confirm are refused");
            }
            // Only an appended login proves that the spool works, because a file can be opened even on a full
            // disk.
            Ok(appended) if self.is_failure_told && appended.contains(&true) => {
                self.is_failure_told = false;
                tracing::info!("the spool works again");
            }
            _ => {}
        }
        self.is_failing = outcomes.is_err();

        let Ok(outcomes) = outcomes else { return };
        let was_full = self.is_full;
        self.is_full = outcomes.last().map_or(!self.store.has_room(), |is_taken| !is_taken);
        if self.is_full && !was_full {
            let spooled = self.store.entries();
            tracing::error!(
                spooled,
                "the spool is full; logins that the broker does not confirm are refused"
            );
        } else if was_full && !self.is_full {
            tracing::info!("the spool has room again");
        }
    }

    fn tell(&mut self) {
        // An error is ignored here, because a failing disk is reported at the next change.
        let oldest = self.store.read(0, 1).ok().and_then(|entries| Some(entries.first()?.1.taken_at()));
        let (entries, bytes) = (self.store.entries(), self.store.bytes());
        let takes = !self.is_failing && !self.is_full && self.store.has_room();
        self.state.send_modify(|state| *state = State { entries, bytes, takes, oldest, ..*state });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::Context;
    use tempfile::TempDir;

    /// Appends a login, and returns its outcome.
    async fn append(spool: &Spool, id: &str) -> Result<Published, PublishError> {
        let message =
            Message::new(&Context::new(), id.to_owned(), "13800138000".to_owned().try_into().unwrap());
        let (done, appended) = oneshot::channel();
        spool.append(message, "why", done);
        appended.await.unwrap()
    }

    #[tokio::test]
    async fn the_state_tells_what_is_in_the_spool() {
        let directory = TempDir::new().unwrap();
        let open = || Spool::open(directory.path(), Capacity { entries: 2, bytes: 1_000_000 }).unwrap();
        let spool = open();
        let watched = spool.state();
        let state = || *watched.borrow();
        assert_eq!((state().entries, state().bytes, state().age()), (0, 0, Duration::ZERO));
        assert!(state().takes);
        for (id, outcome) in [
            ("a", Ok(Published::Spooled("why"))),
            ("b", Ok(Published::Spooled("why"))),
            ("c", Err(PublishError::SpoolFull)),
        ] {
            assert_eq!(append(&spool, id).await, outcome, "{id}");
        }
        assert_eq!((state().entries, state().set_aside, state().takes), (2, 0, false));
        assert!(state().bytes > 2 && state().age() > Duration::ZERO);
        let entries = spool.read(0, 10).await.unwrap();
        assert_eq!(entries.iter().map(|(_, message)| message.id()).collect::<Vec<_>>(), ["a", "b"]);

        // The entry that is set aside stays in the spool, and is read again after the next start.
        spool.set_aside(entries[0].0);
        spool.remove(entries[1].0);
        assert!(spool.read(entries[1].0, 10).await.unwrap().is_empty());
        assert_eq!((state().entries, state().set_aside, state().takes), (1, 1, true));
        spool.close().await;
        let spool = open();
        let state = *spool.state().borrow();
        assert_eq!((state.entries, state.set_aside), (1, 0));
        assert_eq!(spool.read(0, 10).await.unwrap()[0].1.id(), "a");
    }
}
