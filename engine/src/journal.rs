//! What must survive a crash: whose the guest is.
//!
//! Every VM has a journal at a fixed place, so that an engine that comes after a dead one finds it.
//! It is one small file, written in place: two slots, written in turn, each with a number and a
//! checksum. A crash in the middle of a write leaves the other slot, which is what was true before.
//! Only a file of zeros says nothing; one that cannot be understood may say that the guest is not
//! here any more.
//! The file is allocated when the journal is opened, so a full disk shows then and not at the
//! hand-over. Its lock keeps two engines from moving one guest at the same time.

mod slot;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ferry_stream::message::SessionId;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use self::slot::{SLOT_BYTES, Slot, decode, encode, newest, shorten};
use crate::core::message::Record;
use crate::vmm::RunState;

const SLOTS: u64 = 2;

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
        let mut journal = Self::open_any(folder, name)?;
        if let Some(entry) = journal.last.as_ref().filter(|it| it.forbids_migration()) {
            return Err(JournalError::InDoubt {
                session: entry.session,
                peer: entry.peer.clone(),
                path: journal.path.clone(),
            });
        }
        journal.session = session;
        shorten(peer).clone_into(&mut journal.peer);
        Ok(journal)
    }

    /// Opens a journal to go on with the migration that it tells of.
    ///
    /// Refused while another engine holds it, and when what it says cannot be understood.
    pub fn reopen(folder: &Path, name: &str) -> Result<Self, JournalError> {
        let mut journal = Self::open_any(folder, name)?;
        if let Some(entry) = &journal.last {
            journal.session = entry.session;
            journal.peer = entry.peer.clone();
            journal.wanted = entry.wanted;
        }
        Ok(journal)
    }

    fn open_any(folder: &Path, name: &str) -> Result<Self, JournalError> {
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
        Ok(Self {
            file,
            path,
            number,
            last,
            session: SessionId([0; 16]),
            peer: String::new(),
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

#[cfg(test)]
mod tests;
