//! Tests what a power cut leaves of the spool. The store runs on a simulated disk that records its
//! operations. A power cut keeps all operations before the last sync, and keeps, tears or drops each later
//! operation.

use super::*;
use std::{
    iter,
    ops::RangeInclusive,
    sync::{Arc, Mutex},
};

#[derive(Debug, Clone)]
enum Operation {
    Write {
        at: usize,
        bytes: Vec<u8>,
    },
    SetLength(usize),
    Sync,
    /// The store has answered that it holds the entries with these numbers.
    Answered(RangeInclusive<u64>),
}

#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<Operation>,
    syncs_fail: bool,
}

/// Applies an operation to `bytes`, as if the power failed during the operation. Of a write, only the first
/// `kept`/255 of the data reach the disk. A change of length reaches the disk if `kept` is above 127.
fn apply(operation: &Operation, kept: u8, bytes: &mut Vec<u8>) {
    match operation {
        Operation::Write { at, bytes: written } => {
            let written = &written[..written.len() * usize::from(kept) / 255];
            bytes.resize(bytes.len().max(at + written.len()), 0);
            bytes[*at..at + written.len()].copy_from_slice(written);
        }
        Operation::SetLength(length) if kept > 127 => bytes.resize(*length, 0),
        Operation::SetLength(_) | Operation::Sync | Operation::Answered(_) => {}
    }
}

impl Disk {
    fn carry_out(&self, operation: Operation) {
        let State { bytes, log, .. } = &mut *self.0.lock().unwrap();
        apply(&operation, 255, bytes);
        log.push(operation);
    }

    /// Opens the store on this disk. The store checks that its file exists, so the folder stands in for the
    /// file.
    fn store(&self, folder: &TempDir) -> Store {
        let database = open_in(self.clone()).unwrap();
        let (held, last) = count(&database).unwrap();
        let metadata = fs::metadata(folder.path()).unwrap();
        Store {
            path: folder.path().to_owned(),
            capacity: LARGE,
            database: Some(database),
            file: (metadata.dev(), metadata.ino()),
            opened: Instant::now(),
            held,
            last,
            set_aside: BTreeSet::new(),
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        out.copy_from_slice(&self.0.lock().unwrap().bytes[at..at + out.len()]);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.carry_out(Operation::SetLength(length as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.0.lock().unwrap().syncs_fail {
            return Err(io::Error::other("the disk is gone"));
        }
        self.carry_out(Operation::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.carry_out(Operation::Write { at: offset as usize, bytes: data.to_vec() });
        Ok(())
    }
}

#[test]
fn a_sync_that_fails_is_an_error() {
    let (disk, folder) = (Disk::default(), TempDir::new().unwrap());
    let mut store = disk.store(&folder);
    append(&mut store, &["a"]);
    disk.0.lock().unwrap().syncs_fail = true;
    assert!(store.change(iter::once(message("b").to_bytes()), None).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    /// Whenever the power is cut, the spool has the entries of the last change that was answered, or those of
    /// the change in progress.
    #[test]
    fn a_power_cut_costs_no_entry_that_was_answered(fates in proptest::collection::vec(
        prop_oneof![Just(0), Just(255), any::<u8>()], 1..40,
    )) {
        let (disk, folder) = (Disk::default(), TempDir::new().unwrap());
        let mut store = disk.store(&folder);
        let (mut removed, mut last) = (0, 0);
        disk.carry_out(Operation::Answered(removed + 1..=last));
        for (appended, through) in [(1, 0), (3, 0), (2, 2), (0, 4), (30, 0), (1, 20)] {
            let messages = (0..appended).map(|n| message(&n.to_string()).to_bytes());
            prop_assert!(!store.change(messages, Some(through)).unwrap().contains(&false));
            (removed, last) = (through.max(removed), last + appended);
            disk.carry_out(Operation::Answered(removed + 1..=last));
        }
        let log = disk.0.lock().unwrap().log.clone();
        let answered = |operation: &Operation| match operation {
            Operation::Answered(entries) => Some(entries.clone().collect::<Vec<_>>()),
            _ => None,
        };
        let (mut synced, mut unsynced, mut before) = (Vec::new(), Vec::new(), None);
        for (cut, operation) in log.iter().enumerate() {
            unsynced.push(operation);
            if matches!(operation, Operation::Sync) {
                unsynced.drain(..).for_each(|operation| apply(operation, 255, &mut synced));
            }
            before = answered(operation).or(before);
            // From here on, the spool's file exists.
            if before.is_some() {
                let mut bytes = synced.clone();
                let torn = unsynced.iter().zip(fates.iter().cycle());
                torn.for_each(|(operation, kept)| apply(operation, *kept, &mut bytes));
                let disk = Disk(Arc::new(Mutex::new(State { bytes, ..Default::default() })));
                let found = Some(numbers(&mut disk.store(&folder), 0));
                let after = log[cut..].iter().skip(1).find_map(answered);
                prop_assert!(
                    found == before || found == after,
                    "{found:?} after operation {cut}, not {before:?} or {after:?}"
                );
            }
        }
    }
}
