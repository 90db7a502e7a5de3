//! What must survive a crash: whose the guest is.
//!
//! Every VM has a journal at a fixed place, so that an engine that comes after a dead one finds it.
//! It is one small file, written in place: two slots, written in turn, each with a number and a
//! checksum. A crash in the middle of a write leaves the other slot, which is what was true before.
//! The file is allocated when the journal is opened, so a full disk shows then and not at the
//! hand-over. Its lock keeps two engines from moving one guest at the same time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ferry_stream::message::SessionId;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use crate::core::message::Record;

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
    /// The name may be another engine's journal by now.
    is_removed: bool,
}

impl Journal {
    /// Opens the journal `name` in `folder`, both made when they do not exist, for one side of the
    /// migration `session` with the engine at `peer`.
    ///
    /// Refused while another engine holds it, or when the guest was given away before.
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
        let (number, last) = newest(&file).map_err(failed("reading"))?;
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

    /// Writes `record`, and returns when it would survive a crash.
    pub(crate) fn write(&mut self, record: Record) -> Result<(), JournalError> {
        let entry = Entry {
            session: self.session,
            record,
            peer: self.peer.clone(),
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
    /// A journal that says nothing is not left behind. The lock is still held, so it is nobody
    /// else's.
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

/// The newest slot whose checksum fits.
fn newest(file: &File) -> io::Result<(u64, Option<Entry>)> {
    let mut newest = (0, None);
    for slot in 0..SLOTS {
        let mut bytes = [0; SLOT_BYTES];
        file.read_exact_at(&mut bytes, slot * SLOT_BYTES as u64)?;
        match decode(&bytes) {
            Some((number, entry)) if number > newest.0 => newest = (number, Some(entry)),
            _ => {}
        }
    }
    Ok(newest)
}

fn shorten(peer: &str) -> &str {
    let mut end = peer.len().min(MAX_PEER);
    while !peer.is_char_boundary(end) {
        end -= 1;
    }
    &peer[..end]
}

// A slot: magic (4), version u16, record u8, 0, number u64, session (16), length of the peer u16, the
// peer, zeros, and in the last four bytes the CRC32 of all before. Little-endian.
const NUMBER_AT: usize = 8;
const SESSION_AT: usize = 16;
const PEER_AT: usize = 34;
const CRC_AT: usize = SLOT_BYTES - 4;

fn encode(number: u64, entry: &Entry) -> [u8; SLOT_BYTES] {
    let mut slot = [0; SLOT_BYTES];
    let peer = entry.peer.as_bytes();
    slot[..4].copy_from_slice(&MAGIC);
    slot[4..6].copy_from_slice(&VERSION.to_le_bytes());
    slot[6] = record_number(entry.record);
    slot[NUMBER_AT..NUMBER_AT + 8].copy_from_slice(&number.to_le_bytes());
    slot[SESSION_AT..SESSION_AT + 16].copy_from_slice(&entry.session.0);
    let length = u16::try_from(peer.len()).expect("a peer is shortened to MAX_PEER");
    slot[PEER_AT - 2..PEER_AT].copy_from_slice(&length.to_le_bytes());
    slot[PEER_AT..PEER_AT + peer.len()].copy_from_slice(peer);
    let crc = crc32fast::hash(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// The entry of a slot; nothing when it was never written, or not to its end.
fn decode(slot: &[u8; SLOT_BYTES]) -> Option<(u64, Entry)> {
    let crc = u32::from_le_bytes(slot[CRC_AT..].try_into().ok()?);
    let version = u16::from_le_bytes(slot[4..6].try_into().ok()?);
    if slot[..4] != MAGIC || version != VERSION || crc != crc32fast::hash(&slot[..CRC_AT]) {
        return None;
    }
    let number = u64::from_le_bytes(slot[NUMBER_AT..NUMBER_AT + 8].try_into().ok()?);
    let session = SessionId(slot[SESSION_AT..SESSION_AT + 16].try_into().ok()?);
    let length = u16::from_le_bytes(slot[PEER_AT - 2..PEER_AT].try_into().ok()?);
    let peer = slot.get(PEER_AT..PEER_AT + usize::from(length))?;
    let peer = String::from_utf8(peer.to_vec()).ok()?;
    Some((
        number,
        Entry {
            session,
            record: parse_record(slot[6])?,
            peer,
        },
    ))
}

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
            journal.write(record).unwrap();
            let path = journal.path().to_owned();
            drop(journal);
            let (_, entry) = newest(&File::open(path).unwrap()).unwrap();
            let peer = "127.0.0.1:4444".to_owned();
            assert_eq!(
                entry,
                Some(Entry {
                    session: SESSION,
                    record,
                    peer
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
