//! The file of the spool: numbered entries in one table of an embedded database (redb).

use super::super::message::Message;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageBackend,
    TableDefinition, backends::FileBackend,
};
use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The name of the file in the directory of the spool.
pub const FILE: &str = "spool.redb";

/// The entries by their number. An entry with a lower number is older.
const ENTRIES: TableDefinition<u64, &[u8]> = TableDefinition::new("entries");

/// The total size in bytes of the pages that are kept in memory. It is small, because entries are read only
/// once.
const CACHE: usize = 4 * 1024 * 1024;

/// The time between attempts to open the file after a failure. Each attempt reads the whole file.
pub const RETRY: Duration = Duration::from_secs(1);

/// The most that the spool may hold. The file may be several times as large.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// The most messages.
    pub entries: u64,
    /// The most bytes of all messages together.
    pub bytes: u64,
}

/// Why the spool can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenSpoolError {
    /// The directory or the file can't be made or read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Another process uses the file. Each instance needs its own directory.
    #[error("another process uses it")]
    InUse,
    /// The content of the file is damaged, or is not a spool.
    #[error("the file is damaged, or is not a spool: {0}")]
    Damaged(String),
}

/// The open file, and what is in it.
pub struct Store {
    path: PathBuf,
    capacity: Capacity,
    /// `None` after an error, because redb then refuses everything until the file is opened again.
    database: Option<Database>,
    /// The device and inode of the file that was last opened.
    file: (u64, u64),
    /// The time of the last attempt to open the file.
    opened: Instant,
    held: Held,
    last: u64,
    /// The entries that [`Store::change`] must not remove.
    set_aside: BTreeSet<u64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    entries: u64,
    bytes: u64,
}

impl Store {
    /// Opens or makes the file in this directory, and reads it once.
    pub fn open(directory: &Path, capacity: Capacity) -> Result<Self, OpenSpoolError> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let path = directory.join(FILE);
        let (database, file) = open(&path)?;
        let (held, last) = count(&database).map_err(|error| OpenSpoolError::Damaged(error.to_string()))?;
        let (database, opened, set_aside) = (Some(database), Instant::now(), BTreeSet::new());
        Ok(Self { path, capacity, database, file, opened, held, last, set_aside })
    }

    /// Returns the number of entries.
    pub fn entries(&self) -> u64 {
        self.held.entries
    }

    /// Returns how many bytes the entries take together.
    pub fn bytes(&self) -> u64 {
        self.held.bytes
    }

    /// Whether there is room for a small message.
    pub fn has_room(&self) -> bool {
        self.held.entries < self.capacity.entries && self.held.bytes < self.capacity.bytes
    }

    /// Keeps this entry, whatever else is removed, until the store is opened again by [`Store::open`].
    pub fn set_aside(&mut self, number: u64) {
        self.set_aside.insert(number);
    }

    /// Appends the messages, and removes the entries up to `through`. All of this is on disk when the
    /// function returns. The result says for each message whether there was room for it.
    ///
    /// # Errors
    /// If a change failed. Then nobody knows which of the changes were made.
    pub fn change(
        &mut self,
        messages: impl Iterator<Item = Vec<u8>>,
        through: Option<u64>,
    ) -> Result<Vec<bool>, redb::Error> {
        let messages: Vec<_> = messages.collect();
        if self.is_gone() {
            // As long as the missing file is open, its entries can still be published and removed. When no
            // entry is left, a new file takes its place.
            self.try_change(&[], through)?;
            if self.held.entries > 0 {
                let gone = io::Error::other(format!("{} was deleted or replaced", self.path.display()));
                return Err(redb::Error::Io(gone));
            }
            self.database = None;
        }
        self.try_change(&messages, through)
    }

    /// Whether the open file was deleted or replaced. Entries that are in it when the process ends are lost.
    pub fn is_gone(&self) -> bool {
        let named = fs::metadata(&self.path).ok().map(|named| (named.dev(), named.ino()));
        self.database.is_some() && named != Some(self.file)
    }

    fn try_change(&mut self, messages: &[Vec<u8>], through: Option<u64>) -> Result<Vec<bool>, redb::Error> {
        let database = self.opened()?;
        let (mut held, mut last) = (self.held, self.last);
        let mut is_taken = Vec::with_capacity(messages.len());
        let mut transaction = database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        {
            let mut table = transaction.open_table(ENTRIES)?;
            if let Some(through) = through {
                table.retain_in(..=through, |number, message| {
                    if self.set_aside.contains(&number) {
                        return true;
                    }
                    held.entries -= 1;
                    held.bytes -= message.len() as u64;
                    false
                })?;
            }
            for message in messages {
                let size = message.len() as u64;
                let has_room =
                    held.entries < self.capacity.entries && held.bytes + size <= self.capacity.bytes;
                is_taken.push(has_room);
                if has_room {
                    last += 1;
                    table.insert(last, message.as_slice())?;
                    held = Held { entries: held.entries + 1, bytes: held.bytes + size };
                }
            }
        }
        transaction.commit()?;
        (self.held, self.last, self.database) = (held, last, Some(database));
        Ok(is_taken)
    }

    /// Returns the first `count` entries after this number, in order.
    pub fn read(&mut self, after: u64, count: usize) -> Result<Vec<(u64, Message)>, redb::Error> {
        if self.held.entries == 0 {
            return Ok(Vec::new());
        }
        let database = self.opened()?;
        let mut entries = Vec::new();
        {
            let table = database.begin_read()?.open_table(ENTRIES)?;
            for entry in table.range(after + 1..)?.take(count) {
                let (number, bytes) = entry?;
                let message = Message::from_bytes(bytes.value()).ok_or_else(not_a_message)?;
                entries.push((number.value(), message));
            }
        }
        self.database = Some(database);
        Ok(entries)
    }

    /// Takes the database, which the caller puts back unless something fails. After a failure, opens the file
    /// again.
    fn opened(&mut self) -> Result<Database, redb::Error> {
        if let Some(database) = self.database.take() {
            return Ok(database);
        }
        if self.opened.elapsed() < RETRY {
            return Err(redb::Error::PreviousIo);
        }
        self.opened = Instant::now();
        let (database, file) = open(&self.path).map_err(|error| match error {
            OpenSpoolError::Io(error) => redb::Error::Io(error),
            error @ (OpenSpoolError::InUse | OpenSpoolError::Damaged(_)) => {
                redb::Error::Corrupted(error.to_string())
            }
        })?;
        let last;
        (self.held, last) = count(&database)?;
        self.file = file;
        // As long as the process runs, no number is used again, because entries are removed by number.
        self.last = self.last.max(last);
        Ok(database)
    }
}

/// Opens or makes the file. Also returns its device and inode.
fn open(path: &Path) -> Result<(Database, (u64, u64)), OpenSpoolError> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    // The name of the file must also survive a power cut.
    File::open(path.parent().unwrap_or(path))?.sync_all()?;
    let metadata = file.metadata()?;
    let database = open_in(FileBackend::new(file).map_err(open_error)?)?;
    Ok((database, (metadata.dev(), metadata.ino())))
}

fn open_in(backend: impl StorageBackend) -> Result<Database, OpenSpoolError> {
    let mut builder = Builder::new();
    // The check finds a damaged file now rather than later.
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
    builder.create_with_backend(backend).map_err(open_error)
}

fn open_error(error: DatabaseError) -> OpenSpoolError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => OpenSpoolError::InUse,
        DatabaseError::Storage(redb::StorageError::Io(error))
            if error.kind() != io::ErrorKind::InvalidData =>
        {
            OpenSpoolError::Io(error)
        }
        error => OpenSpoolError::Damaged(error.to_string()),
    }
}

/// Returns how much is in the file, and the highest number of an entry. Also checks that all entries can be
/// read.
fn count(database: &Database) -> Result<(Held, u64), redb::Error> {
    let mut held = Held::default();
    let mut last = 0;
    let table = match database.begin_read()?.open_table(ENTRIES) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok((held, last)),
        Err(error) => return Err(error.into()),
    };
    for entry in table.iter()? {
        let (number, bytes) = entry?;
        Message::from_bytes(bytes.value()).ok_or_else(not_a_message)?;
        held = Held { entries: held.entries + 1, bytes: held.bytes + bytes.value().len() as u64 };
        last = number.value();
    }
    Ok((held, last))
}

fn not_a_message() -> redb::Error {
    redb::Error::Corrupted("an entry is not a message".to_owned())
}

#[cfg(test)]
mod tests {
    mod power_cut;

    use super::*;
    use proptest::prelude::*;
    use std::{collections::BTreeMap, os::unix::fs::PermissionsExt};
    use tempfile::TempDir;

    const LARGE: Capacity = Capacity { entries: 1000, bytes: 1_000_000 };

    fn message(id: &str) -> Message {
        let entry = serde_json::json!({ "id": id, "taken_at": 7, "headers": [], "mobile": "13800138000" });
        Message::from_bytes(entry.to_string().as_bytes()).unwrap()
    }

    fn append(store: &mut Store, ids: &[&str]) -> Vec<bool> {
        store.change(ids.iter().map(|id| message(id).to_bytes()), None).unwrap()
    }

    fn numbers(store: &mut Store, after: u64) -> Vec<u64> {
        store.read(after, 1000).unwrap().into_iter().map(|(number, _)| number).collect()
    }

    #[test]
    fn entries_are_there_again_in_order_after_a_start() {
        let directory = TempDir::new().unwrap();
        let mut store = Store::open(directory.path(), LARGE).unwrap();
        append(&mut store, &["a", "b"]);
        append(&mut store, &["c"]);
        store.change(std::iter::empty(), Some(1)).unwrap();
        drop(store);

        let mut store = Store::open(directory.path(), LARGE).unwrap();
        assert_eq!(store.entries(), 2);
        let entries = store.read(0, 1000).unwrap();
        assert!(entries == [(2, message("b")), (3, message("c"))]);
        append(&mut store, &["d"]);
        assert_eq!(numbers(&mut store, 3), [4]);
    }

    #[test]
    fn what_is_set_aside_stays_until_the_next_start_and_then_comes_first() {
        let directory = TempDir::new().unwrap();
        let mut store = Store::open(directory.path(), LARGE).unwrap();
        append(&mut store, &["a", "b", "c"]);
        store.set_aside(1);
        store.change(std::iter::empty(), Some(2)).unwrap();
        assert_eq!((store.entries(), numbers(&mut store, 0)), (2, vec![1, 3]));
        drop(store);

        let mut store = Store::open(directory.path(), LARGE).unwrap();
        assert_eq!((store.entries(), numbers(&mut store, 0)), (2, vec![1, 3]));
        store.change(std::iter::empty(), Some(3)).unwrap();
        assert_eq!(store.entries(), 0);
    }

    #[test]
    fn neither_bound_is_passed_and_what_is_removed_makes_room() {
        let directory = TempDir::new().unwrap();
        let size = message("a").to_bytes().len() as u64;
        for capacity in [Capacity { entries: 2, ..LARGE }, Capacity { bytes: 2 * size, ..LARGE }] {
            let directory = directory.path().join(capacity.entries.to_string());
            let mut store = Store::open(&directory, capacity).unwrap();
            assert_eq!(append(&mut store, &["a"]), [true]);
            assert!(store.has_room());
            assert_eq!(append(&mut store, &["b", "c"]), [true, false]);
            assert!(!store.has_room());
            assert_eq!(append(&mut store, &["c"]), [false]);
            // In one transaction, removed entries make room for appended ones.
            let more = ["c", "d"].iter().map(|id| message(id).to_bytes());
            assert_eq!(store.change(more, Some(1)).unwrap(), [true, false]);
            assert_eq!(numbers(&mut store, 0), [2, 3]);
        }
    }

    #[test]
    fn only_its_user_may_read_it() {
        let directory = TempDir::new().unwrap();
        let directory = directory.path().join("new/one");
        let _store = Store::open(&directory, LARGE).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join("spool.redb")), 0o600);
    }

    #[test]
    fn a_file_in_use_is_not_opened_again() {
        let directory = TempDir::new().unwrap();
        let _store = Store::open(directory.path(), LARGE).unwrap();
        assert!(matches!(Store::open(directory.path(), LARGE), Err(OpenSpoolError::InUse)));
    }

    #[test]
    fn a_disk_that_fails_is_no_damaged_file() {
        let error =
            |kind: io::ErrorKind| open_error(DatabaseError::Storage(redb::StorageError::Io(kind.into())));
        assert!(matches!(error(io::ErrorKind::StorageFull), OpenSpoolError::Io(_)));
        assert!(matches!(error(io::ErrorKind::InvalidData), OpenSpoolError::Damaged(_)));
    }

    #[test]
    fn what_is_no_message_is_no_spool() {
        let directory = TempDir::new().unwrap();
        drop(Store::open(directory.path(), LARGE).unwrap());
        let database = Database::open(directory.path().join("spool.redb")).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(ENTRIES).unwrap().insert(1, &b"7"[..]).unwrap();
        transaction.commit().unwrap();
        drop(database);
        assert!(matches!(Store::open(directory.path(), LARGE), Err(OpenSpoolError::Damaged(_))));
    }

    #[test]
    fn after_a_failure_the_file_is_not_opened_again_at_once() {
        let directory = TempDir::new().unwrap();
        let mut store = Store::open(directory.path(), LARGE).unwrap();
        store.database = None;
        // The last attempt to open the file counts as recent, however slow this test is.
        store.opened = Instant::now() + Duration::from_secs(3600);
        assert!(store.change(std::iter::empty(), None).is_err());
        store.opened = Instant::now() - RETRY;
        assert!(store.change(std::iter::empty(), None).is_ok());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Change { appended: usize, through: Option<u64> },
        Start,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let change = (0..4usize, proptest::option::of(0..30u64))
            .prop_map(|(appended, through)| Step::Change { appended, through });
        proptest::collection::vec(prop_oneof![4 => change, 1 => Just(Step::Start)], 1..20)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// The store behaves like an ordered map with a bound, after any changes and restarts.
        #[test]
        fn it_holds_what_a_map_would_hold(steps in steps()) {
            let directory = TempDir::new().unwrap();
            let capacity = Capacity { entries: 8, ..LARGE };
            let mut store = Store::open(directory.path(), capacity).unwrap();
            let (mut model, mut last) = (BTreeMap::new(), 0);
            for (step_number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Start => {
                        drop(store);
                        store = Store::open(directory.path(), capacity).unwrap();
                        last = model.keys().last().copied().unwrap_or_default();
                    }
                    Step::Change { appended, through } => {
                        let new: Vec<_> = (0..appended).map(|n| message(&format!("{step_number}.{n}"))).collect();
                        let taken = store.change(new.iter().map(Message::to_bytes), through).unwrap();
                        if let Some(through) = through {
                            model.retain(|number, _| *number > through);
                        }
                        for (message, is_taken) in new.into_iter().zip(taken) {
                            prop_assert_eq!(is_taken, model.len() < 8);
                            if is_taken {
                                last += 1;
                                model.insert(last, message);
                            }
                        }
                    }
                }
                prop_assert_eq!(store.entries(), model.len() as u64);
                let bytes: usize = model.values().map(|message| message.to_bytes().len()).sum();
                prop_assert_eq!(store.held.bytes, bytes as u64);
                let expected: Vec<_> = model.clone().into_iter().collect();
                prop_assert!(store.read(0, 1000).unwrap() == expected);
            }
        }

        /// Damage to the file causes an error or does no harm, but never causes a panic.
        #[test]
        fn a_damaged_file_is_no_panic(at in prop_oneof![0.0..1.0f64, 0.0..0.01f64], length in 1..5000usize, byte: u8) {
            let directory = TempDir::new().unwrap();
            let mut store = Store::open(directory.path(), LARGE).unwrap();
            append(&mut store, &["a", "b", "c"]);
            drop(store);
            let path = directory.path().join("spool.redb");
            let mut bytes = fs::read(&path).unwrap();
            let start = (bytes.len() as f64 * at) as usize;
            let end = (start + length).min(bytes.len());
            bytes[start..end].fill(byte);
            fs::write(&path, bytes).unwrap();
            if let Ok(mut store) = Store::open(directory.path(), LARGE) {
                prop_assert_eq!(store.entries(), 3);
                prop_assert_eq!(store.read(0, 10).unwrap().len(), 3);
            }
        }
    }
}
