//! The logins that the broker has not confirmed, on disk: in order, bounded, and synced before anybody is
//! told. `dispatch` appends to it, and reads and removes what it publishes.
//!
//! A thread of its own does the work, since a sync blocks: all that has come during one sync is in the
//! next, so many logins that wait share it. The tables are in `store`.

mod store;

use super::{PublishError, Published, Unconfirmed, dispatch::Request, message::Message};
use std::{
    iter,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::SystemTime,
};
use store::{RETRY, Store, StoreError};
use tokio::sync::oneshot;

pub use store::{Limits, OpenError};

/// Commands that one transaction may take together.
const MAX_TOGETHER: usize = 4096;

/// The spool, open. It is closed when it is dropped, after what it was told.
pub struct Spool {
    commands: mpsc::Sender<Command>,
    state: State,
    /// Never sends: dropped with the thread.
    closed: oneshot::Receiver<()>,
}

/// What everybody may know of it.
#[derive(Clone, Default)]
pub struct State(Arc<Shared>);

#[derive(Default)]
struct Shared {
    entries: AtomicU64,
    bytes: AtomicU64,
    oldest: Mutex<Option<SystemTime>>,
    takes: AtomicBool,
}

enum Command {
    Append(Request, Unconfirmed),
    Read { after: u64, count: usize, entries: oneshot::Sender<Result<Vec<(u64, Message)>, StoreError>> },
    Remove { through: u64 },
}

impl State {
    /// Logins in the spool.
    pub fn entries(&self) -> u64 {
        self.0.entries.load(Relaxed)
    }

    /// Bytes of the logins in the spool.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Relaxed)
    }

    /// When the oldest login in the spool was taken; `None` if there is none.
    pub fn oldest(&self) -> Option<SystemTime> {
        *self.0.oldest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it has room, and its disk works.
    pub fn takes(&self) -> bool {
        self.0.takes.load(Relaxed)
    }
}

impl Spool {
    /// Opens the file in this directory; makes both if they are not there. Only this user may read them.
    ///
    /// # Errors
    /// If the file can't be opened, is another process's, or is damaged.
    pub fn open(directory: &Path, limits: Limits) -> Result<Self, OpenError> {
        let store = Store::open(directory, limits)?;
        let (commands, received) = mpsc::channel();
        let state = State::default();
        let mut keeper = Keeper {
            store,
            state: state.clone(),
            is_failing: false,
            is_failure_told: false,
            is_full: false,
            through: None,
        };
        keeper.tell();
        let (open, closed) = oneshot::channel();
        thread::Builder::new().name("spool".to_owned()).spawn(move || {
            keeper.run(received);
            drop(open);
        })?;
        Ok(Self { commands, state, closed })
    }

    /// What everybody may know of it.
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Appends a login, and tells whoever waits for it.
    pub fn append(&self, request: Request, why: Unconfirmed) {
        // Without the thread the request is dropped, and with it goes the promise to answer.
        let _ = self.commands.send(Command::Append(request, why));
    }

    /// The next entries after this number, in order; what was appended before is among them.
    pub async fn read(&self, after: u64, count: usize) -> Option<Vec<(u64, Message)>> {
        let (entries, read) = oneshot::channel();
        let _ = self.commands.send(Command::Read { after, count, entries });
        read.await.ok()?.ok()
    }

    /// Removes all entries up to this number, sooner or later: until then they count as room that is taken.
    pub fn remove(&self, through: u64) {
        let _ = self.commands.send(Command::Remove { through });
    }

    /// Waits until everything is done, and the file closed.
    pub async fn close(self) {
        drop(self.commands);
        let _ = self.closed.await;
    }
}

/// What the thread has.
struct Keeper {
    store: Store,
    state: State,
    /// The last change failed.
    is_failing: bool,
    /// It was said that it failed, and nothing was appended since.
    is_failure_told: bool,
    is_full: bool,
    /// What was to be removed up to, and could not be yet.
    through: Option<u64>,
}

impl Keeper {
    /// Until nobody can send any more.
    fn run(mut self, commands: mpsc::Receiver<Command>) {
        loop {
            match commands.recv_timeout(RETRY) {
                Ok(first) => {
                    let together = iter::once(first).chain(commands.try_iter().take(MAX_TOGETHER)).collect();
                    self.take(together);
                }
                // Nobody may come any more, if nobody is told that the disk works again.
                Err(RecvTimeoutError::Timeout) if self.is_failing => self.take(Vec::new()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Changes first, in one transaction; then reads.
    fn take(&mut self, commands: Vec<Command>) {
        let (mut appended, mut reads, mut through) = (Vec::new(), Vec::new(), self.through);
        for command in commands {
            match command {
                Command::Append(request, why) => appended.push((request, why)),
                Command::Read { after, count, entries } => reads.push((after, count, entries)),
                Command::Remove { through: number } => through = through.max(Some(number)),
            }
        }
        if !appended.is_empty() || through.is_some() || self.is_failing {
            let messages = appended.iter().map(|(request, _)| request.message.to_bytes());
            let outcomes = self.store.change(messages, through);
            self.through = through.filter(|_| outcomes.is_err());
            self.log(&outcomes);
            // First, so that whoever has an answer sees what it changed.
            self.tell();
            let mut outcomes = outcomes.unwrap_or_default().into_iter();
            for (request, why) in appended {
                let answer = match outcomes.next() {
                    Some(true) => Ok(Published::Spooled(why)),
                    Some(false) => Err(PublishError::SpoolFull),
                    None => Err(PublishError::SpoolFailed),
                };
                // Whoever has stopped waiting need not know.
                let _ = request.done.send(answer);
            }
        }
        for (after, count, entries) in reads {
            let _ = entries.send(self.store.read(after, count));
        }
    }

    /// Says what has changed, once: not for every login.
    fn log(&mut self, outcomes: &Result<Vec<bool>, StoreError>) {
        match outcomes {
            Err(error) if !self.is_failure_told => {
                self.is_failure_told = true;
                tracing::error!(%error, "the spool failed; logins that the broker does not confirm are refused");
            }
            // To open it proves little: a disk may be full all the same.
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
        self.state.0.entries.store(self.store.entries(), Relaxed);
        self.state.0.bytes.store(self.store.bytes(), Relaxed);
        // A disk that fails says so at the next change.
        let oldest = self.store.read(0, 1).ok().and_then(|entries| Some(entries.first()?.1.taken_at()));
        *self.state.0.oldest.lock().unwrap_or_else(PoisonError::into_inner) = oldest;
        self.state.0.takes.store(!self.is_failing && !self.is_full && self.store.has_room(), Relaxed);
    }
}
