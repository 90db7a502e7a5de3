//! What must survive a crash: whose the guest is.
//!
//! Every VM has a journal at a fixed place, so that an engine that comes after a dead one finds it.
//! It is one small file, written in place: two slots, written in turn, each with a number and a
//! checksum. A crash in the middle of a write leaves the other slot, which is what was true before.
//! Only a file of zeros says nothing; one that cannot be understood may say that the guest is not
//! here any more.
//! The file is allocated when the journal is opened, so a full disk shows then and not at the
//! hand-over. Its lock keeps two engines from moving one guest at the same time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ferry_stream::message::SessionId;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use crate::core::message::Record;
use crate::vmm::RunState;

/// Bytes in a slot: one sector, which a disk writes whole or not at all.
const SLOT_BYTES: usize = 512;

const SLOTS: u64 = 2;

const MAGIC: [u8; 4] = *b"FJNL";

const VERSION: u16 = 1;

/// Longest peer address that is kept, in bytes.
const MAX_PEER: usize = 256;

/// What the journal says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which migration.
    pub session: SessionId,
    /// Whose the guest is.
    pub record: Record,
    /// Where the other engine is, for people and for a later engine that has to ask it.
    pub peer: String,
    /// In which state people want the guest, whatever the engine did with it; at the target, which
    /// is told at the end, nothing.
    pub wanted: Option<RunState>,
}

impl Entry {
    /// True when only the other side can say whose the guest is, or when it is not here any more:
    /// this VM must not be migrated.
    pub fn forbids_migration(&self) -> bool {
        matches!(self.record, Record::Given | Record::Moved)
    }
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// A file operation failed.
    #[error("the journal {}: {what}", path.display())]
    Io {
        /// The journal.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Another engine holds it.
    #[error("another engine is moving this guest at this moment (it holds {})", path.display())]
    Busy {
        /// The journal.
        path: PathBuf,
    },
    /// There is something in it, and nobody can say what.
    #[error(
        "the journal {} is damaged or of another version of ferry, and may say that the guest was \
         given away: if that version is at hand, let it say; otherwise make sure that the guest does \
         not run anywhere else, and then remove the journal", path.display()
    )]
    Unreadable {
        /// The journal.
        path: PathBuf,
    },
    /// An earlier migration was not resolved.
    #[error(
        "the guest was given away by an earlier migration, session {session} to {peer}, and must \
         not be moved or resumed from here before somebody has made sure that it does not run there: \
         then remove the journal {}", path.display()
    )]
    InDoubt {
        /// The journal.
        path: PathBuf,
        /// The migration.
        session: SessionId,
        /// Where it went.
        peer: String,
    },
}

/// The journal of one VM, open and locked.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    number: u64,
    last: Option<Entry>,
    session: SessionId,
    peer: String,
    wanted: Option<RunState>,
    /// The name may be another engine's journal by now.
    is_removed: bool,
}

impl Journal {
    /// Opens the journal `name` in `folder`, both made when they do not exist, for one side of the
    /// migration `session` with the engine at `peer`.
    ///
    /// Refused while another engine holds it, when the guest was given away before, or when what it
    /// says cannot be understood.
    pub fn open(
        folder: &Path,
        name: &str,
        session: SessionId,
        peer: &str,
    ) -> Result<Self, JournalError> {
        let path = folder.join(format!("{name}.journal"));
        let failed = |what| failure(&path, what);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(failed("making its folder"))?;
        let file = open_locked(&path)?;
        allocate(&file, folder).map_err(failed("allocating"))?;
        let slots = read(&file).map_err(failed("reading"))?;
        let Some((number, last)) = newest(slots) else {
            return Err(JournalError::Unreadable { path });
        };
        if let Some(entry) = last.as_ref().filter(|entry| entry.forbids_migration()) {
            let (session, peer) = (entry.session, entry.peer.clone());
            return Err(JournalError::InDoubt {
                path,
                session,
                peer,
            });
        }
        let peer = shorten(peer).to_owned();
        Ok(Self {
            file,
            path,
            number,
            last,
            session,
            peer,
            wanted: None,
            is_removed: false,
        })
    }

    /// What it says; nothing when it is new.
    pub fn last(&self) -> Option<&Entry> {
        self.last.as_ref()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// At the target the session is known only when a source has come.
    pub(crate) fn set_session(&mut self, session: SessionId, peer: &str) {
        self.session = session;
        shorten(peer).clone_into(&mut self.peer);
    }

    /// In which state people want the guest, from the next record on.
    pub(crate) fn set_wanted(&mut self, wanted: RunState) {
        self.wanted = Some(wanted);
    }

    /// Writes `record`, and returns when it would survive a crash.
    pub(crate) fn write(&mut self, record: Record) -> Result<(), JournalError> {
        let entry = Entry {
            session: self.session,
            record,
            peer: self.peer.clone(),
            wanted: self.wanted,
        };
        let number = self.number + 1;
        let slot = encode(number, &entry);
        let at = number % SLOTS * SLOT_BYTES as u64;
        let failed = |what| failure(&self.path, what);
        self.file
            .write_all_at(&slot, at)
            .map_err(failed("writing"))?;
        self.file.sync_data().map_err(failed("flushing"))?;
        self.number = number;
        self.last = Some(entry);
        Ok(())
    }

    /// Removes it: nothing is under way and nobody will ask.
    pub(crate) fn remove(mut self) -> Result<(), JournalError> {
        self.is_removed = true;
        fs::remove_file(&self.path).map_err(failure(&self.path, "removing"))
    }
}

impl Drop for Journal {
    /// A journal that says nothing is not left behind: it was all zeros when it was opened. The lock
    /// is still held, so it is nobody else's.
    fn drop(&mut self) {
        if self.last.is_none() && !self.is_removed {
            _ = fs::remove_file(&self.path);
        }
    }
}

fn failure(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> JournalError + use<> {
    let path = path.to_owned();
    move |source| JournalError::Io { path, what, source }
}

/// Opens and locks the file that has the name now: an engine that ends removes its journal, and a
/// lock on a removed file would keep nobody out.
fn open_locked(path: &Path) -> Result<Flock<File>, JournalError> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failure(path, "opening"))?;
        let file = lock(file, path)?;
        let locked = file.metadata().map_err(failure(path, "reading"))?;
        match fs::metadata(path) {
            Ok(named) if named.ino() == locked.ino() => return Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failure(path, "reading")(error));
            }
            _ => {}
        }
    }
}

fn lock(file: File, path: &Path) -> Result<Flock<File>, JournalError> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => JournalError::Busy {
            path: path.to_owned(),
        },
        errno => failure(path, "locking")(errno.into()),
    })
}

/// Gives the file its whole length on disk, and its name a place in the folder, before anything
/// depends on either.
fn allocate(file: &File, folder: &Path) -> io::Result<()> {
    let bytes = SLOTS * SLOT_BYTES as u64;
    if file.metadata()?.len() < bytes {
        let length = i64::try_from(bytes).expect("two sectors fit in an i64");
        fallocate(file, FallocateFlags::empty(), 0, length)?;
        file.sync_all()?;
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

fn read(file: &File) -> io::Result<Vec<Slot>> {
    let slot = |index| {
        let mut bytes = [0; SLOT_BYTES];
        file.read_exact_at(&mut bytes, index * SLOT_BYTES as u64)?;
        Ok(decode(&bytes))
    };
    (0..SLOTS).map(slot).collect()
}

/// What the slots say together; nothing when that cannot be told.
///
/// One torn slot beside a whole one is the write in which an engine died: the other holds what was
/// true until then. Alone it may have said anything.
fn newest(slots: Vec<Slot>) -> Option<(u64, Option<Entry>)> {
    let is_torn = slots.iter().any(|slot| matches!(slot, Slot::Torn));
    let mut newest = None;
    for slot in slots {
        match slot {
            Slot::Foreign => return None,
            Slot::Whole { number, entry }
                if newest.as_ref().is_none_or(|(last, _)| number > *last) =>
            {
                newest = Some((number, Some(entry)));
            }
            Slot::Whole { .. } | Slot::Blank | Slot::Torn => {}
        }
    }
    newest.or_else(|| (!is_torn).then_some((0, None)))
}

fn shorten(peer: &str) -> &str {
    let mut end = peer.len().min(MAX_PEER);
    while !peer.is_char_boundary(end) {
        end -= 1;
    }
    &peer[..end]
}

// A slot: magic (4), version u16, record u8, wanted state u8, number u64, session (16), length of the
// peer u16, the peer, zeros, and in the last four bytes the CRC32 of all before. Little-endian.
const VERSION_AT: usize = 4;
const RECORD_AT: usize = 6;
const WANTED_AT: usize = 7;
const NUMBER_AT: usize = 8;
const SESSION_AT: usize = 16;
const PEER_AT: usize = 34;
const CRC_AT: usize = SLOT_BYTES - 4;

fn encode(number: u64, entry: &Entry) -> [u8; SLOT_BYTES] {
    let mut slot = [0; SLOT_BYTES];
    let peer = entry.peer.as_bytes();
    slot[..4].copy_from_slice(&MAGIC);
    slot[VERSION_AT..RECORD_AT].copy_from_slice(&VERSION.to_le_bytes());
    slot[RECORD_AT] = record_number(entry.record);
    slot[WANTED_AT] = wanted_number(entry.wanted);
    slot[NUMBER_AT..NUMBER_AT + 8].copy_from_slice(&number.to_le_bytes());
    slot[SESSION_AT..SESSION_AT + 16].copy_from_slice(&entry.session.0);
    let length = u16::try_from(peer.len()).expect("a peer is shortened to MAX_PEER");
    slot[PEER_AT - 2..PEER_AT].copy_from_slice(&length.to_le_bytes());
    slot[PEER_AT..PEER_AT + peer.len()].copy_from_slice(peer);
    let crc = crc32fast::hash(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// What is in a slot.
enum Slot {
    /// It was never written.
    Blank,
    /// It was not written to its end, or is damaged.
    Torn,
    /// It was written by another version.
    Foreign,
    Whole {
        number: u64,
        entry: Entry,
    },
}

fn decode(slot: &[u8; SLOT_BYTES]) -> Slot {
    if slot.iter().all(|byte| *byte == 0) {
        return Slot::Blank;
    }
    if slot[..VERSION_AT] != MAGIC {
        return Slot::Torn;
    }
    if slot[VERSION_AT..RECORD_AT] != VERSION.to_le_bytes() {
        return Slot::Foreign;
    }
    if slot[CRC_AT..] != crc32fast::hash(&slot[..CRC_AT]).to_le_bytes() {
        return Slot::Torn;
    }
    // It is as somebody meant it.
    match parse(slot) {
        Some((number, entry)) => Slot::Whole { number, entry },
        None => Slot::Foreign,
    }
}

fn parse(slot: &[u8; SLOT_BYTES]) -> Option<(u64, Entry)> {
    let number = u64::from_le_bytes(slot[NUMBER_AT..NUMBER_AT + 8].try_into().ok()?);
    let session = SessionId(slot[SESSION_AT..SESSION_AT + 16].try_into().ok()?);
    let length = u16::from_le_bytes(slot[PEER_AT - 2..PEER_AT].try_into().ok()?);
    let peer = slot[..CRC_AT].get(PEER_AT..PEER_AT + usize::from(length))?;
    let wanted = |wanted: &Option<RunState>| wanted_number(*wanted) == slot[WANTED_AT];
    let entry = Entry {
        session,
        record: parse_record(slot[RECORD_AT])?,
        peer: String::from_utf8(peer.to_vec()).ok()?,
        wanted: WANTED.into_iter().find(wanted)?,
    };
    Some((number, entry))
}

const fn wanted_number(wanted: Option<RunState>) -> u8 {
    match wanted {
        None => 0,
        Some(RunState::Running) => 1,
        Some(RunState::Paused) => 2,
    }
}

const WANTED: [Option<RunState>; 3] = [None, Some(RunState::Running), Some(RunState::Paused)];

const RECORDS: [Record; 8] = [
    Record::Migrating,
    Record::Given,
    Record::Moved,
    Record::Kept,
    Record::Receiving,
    Record::Taken,
    Record::Refused,
    Record::Returned,
];

/// Records are numbered from 1, so that a slot of zeros is none.
fn record_number(record: Record) -> u8 {
    match record {
        Record::Migrating => 1,
        Record::Given => 2,
        Record::Moved => 3,
        Record::Kept => 4,
        Record::Receiving => 5,
        Record::Taken => 6,
        Record::Refused => 7,
        Record::Returned => 8,
    }
}

fn parse_record(number: u8) -> Option<Record> {
    RECORDS
        .into_iter()
        .find(|record| record_number(*record) == number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId([7; 16]);

    fn open(folder: &Path) -> Result<Journal, JournalError> {
        Journal::open(folder, "qemu-1-2", SESSION, "127.0.0.1:4444")
    }

    #[test]
    fn says_after_reopening_what_was_written_last() {
        let folder = tempfile::tempdir().unwrap();
        for record in RECORDS
            .into_iter()
            .filter(|record| *record != Record::Moved)
        {
            let mut journal = match open(folder.path()) {
                Err(JournalError::InDoubt { path, .. }) => {
                    fs::remove_file(path).unwrap();
                    open(folder.path()).unwrap()
                }
                journal => journal.unwrap(),
            };
            journal.set_wanted(RunState::Paused);
            journal.write(record).unwrap();
            let path = journal.path().to_owned();
            drop(journal);
            let slots = read(&File::open(path).unwrap()).unwrap();
            let (_, entry) = newest(slots).unwrap();
            let peer = "127.0.0.1:4444".to_owned();
            assert_eq!(
                entry,
                Some(Entry {
                    session: SESSION,
                    record,
                    peer,
                    wanted: Some(RunState::Paused),
                })
            );
        }
    }

    #[test]
    fn a_torn_write_leaves_what_was_true_before() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        journal.write(Record::Migrating).unwrap();
        journal.write(Record::Given).unwrap();
        let path = journal.path().to_owned();
        let at = journal.number % SLOTS * SLOT_BYTES as u64;
        drop(journal);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0xff; 100], at + 20).unwrap();
        let journal = open(folder.path()).unwrap();
        assert_eq!(journal.last().unwrap().record, Record::Migrating);
    }

    /// Overwrites part of every slot that was written.
    fn spoil(path: &Path, at: usize, with: &[u8]) {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        for slot in 0..SLOTS {
            let mut bytes = [0; SLOT_BYTES];
            let start = slot * SLOT_BYTES as u64;
            file.read_exact_at(&mut bytes, start).unwrap();
            if bytes != [0; SLOT_BYTES] {
                file.write_all_at(with, start + at as u64).unwrap();
            }
        }
    }

    fn assert_unreadable(folder: &Path) {
        let refusal = open(folder).unwrap_err();
        let JournalError::Unreadable { path } = &refusal else {
            panic!("{refusal}");
        };
        assert!(path.exists(), "it is somebody's to look at");
    }

    #[test]
    fn what_cannot_be_understood_is_not_taken_for_nothing() {
        for records in [&[Record::Given][..], &[Record::Migrating, Record::Given]] {
            for (at, with) in [(0, 0xff), (VERSION_AT, 2), (PEER_AT, 0), (CRC_AT, 0)] {
                let folder = tempfile::tempdir().unwrap();
                let mut journal = open(folder.path()).unwrap();
                for record in records {
                    journal.write(*record).unwrap();
                }
                let path = journal.path().to_owned();
                drop(journal);
                spoil(&path, at, &[with, with]);
                assert_unreadable(folder.path());
            }
        }
    }

    #[test]
    fn another_version_in_either_slot_is_not_passed_over() {
        for index in 0..SLOTS {
            let folder = tempfile::tempdir().unwrap();
            let mut journal = open(folder.path()).unwrap();
            journal.write(Record::Migrating).unwrap();
            journal.write(Record::Migrating).unwrap();
            let at = index * SLOT_BYTES as u64 + VERSION_AT as u64;
            journal.file.write_all_at(&[9], at).unwrap();
            drop(journal);
            assert_unreadable(folder.path());
        }
    }

    #[test]
    fn an_unknown_record_is_of_another_version() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        journal.write(Record::Migrating).unwrap();
        let entry = journal.last.clone().unwrap();
        let mut slot = encode(2, &entry);
        slot[RECORD_AT] = 99;
        let crc = crc32fast::hash(&slot[..CRC_AT]);
        slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        journal.file.write_all_at(&slot, 0).unwrap();
        drop(journal);
        assert_unreadable(folder.path());
    }

    #[test]
    fn a_journal_of_zeros_says_nothing_and_is_not_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qemu-1-2.journal");
        fs::write(&path, [0; 2 * SLOT_BYTES]).unwrap();
        let journal = open(folder.path()).unwrap();
        assert_eq!(journal.last(), None);
        drop(journal);
        assert!(!path.exists());
    }

    #[test]
    fn refuses_a_guest_that_was_given_away() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        journal.write(Record::Given).unwrap();
        drop(journal);
        let refusal = open(folder.path()).unwrap_err();
        assert!(
            matches!(
                refusal,
                JournalError::InDoubt {
                    session: SESSION,
                    ..
                }
            ),
            "{refusal}"
        );
    }

    #[test]
    fn refuses_a_second_engine() {
        let folder = tempfile::tempdir().unwrap();
        let first = open(folder.path()).unwrap();
        assert!(matches!(
            open(folder.path()),
            Err(JournalError::Busy { .. })
        ));
        drop(first);
        open(folder.path()).unwrap();
    }

    #[test]
    fn a_long_peer_is_cut_at_a_character() {
        assert_eq!(shorten(&"ü".repeat(200)).len(), MAX_PEER);
        let odd = format!("x{}", "ü".repeat(200));
        assert_eq!(shorten(&odd).len(), MAX_PEER - 1);
    }
}
