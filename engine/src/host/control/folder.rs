//! Where control sockets are: a folder of one user alone, with a socket for each migration.
//!
//! The folder is held open and sockets are named through its descriptor. So what was found to be the
//! user's alone is what is used, and a path of any length will do: a Unix socket's may have no more
//! than 107 bytes.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
    PermissionsExt as _,
};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Uid, geteuid};
use tokio::net::{UnixListener, UnixStream};

/// The folder's name, in the folder of journals.
const FOLDER: &str = "jobs";

/// How a socket's name ends.
const ENDING: &str = ".sock";

/// Longest name of a migration: with what stands around it, it fits into a socket's path.
const MAX_NAME_BYTES: usize = 64;

/// The mode of a folder of one user alone.
const FOLDER_MODE: u32 = 0o700;

/// The mode of a socket of one user alone.
const SOCKET_MODE: u32 = 0o600;

/// What group and others may do.
const OTHERS: u32 = 0o077;

/// A migration's name: letters, digits, dots, dashes and underlines, the first no dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobName(String);

/// A text that names no migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a job's name is at most {MAX_NAME_BYTES} letters, digits, dots, dashes and underlines")]
pub struct BadName;

impl FromStr for JobName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        let fits = (1..=MAX_NAME_BYTES).contains(&text.len()) && !text.starts_with('.');
        if fits && text.bytes().all(plain) {
            return Ok(Self(text.to_owned()));
        }
        Err(BadName)
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Why control sockets cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// A file operation failed.
    #[error("the control socket in {}: {what}", folder.display())]
    Io {
        /// The folder.
        folder: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody else could put sockets there.
    #[error(
        "{} is not a folder of its user alone (mode 0700), and whoever else can write there could pass \
         for a migration: remove it, or give another folder with --state-dir", folder.display()
    )]
    Exposed {
        /// The folder.
        folder: PathBuf,
    },
}

/// The folder of control sockets.
#[derive(Debug)]
pub struct Folder {
    file: File,
    path: PathBuf,
}

impl Folder {
    /// The one in `state`, the folder of journals; made when it does not exist.
    pub fn make(state: &Path) -> Result<Self, FolderError> {
        let path = state.join(FOLDER);
        let made = DirBuilder::new()
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(&path);
        made.map_err(failure(&path, "making the folder"))?;
        Self::open_at(path)
    }

    /// The one in `state`; none where no migration ever ran.
    pub fn open(state: &Path) -> Result<Option<Self>, FolderError> {
        match Self::open_at(state.join(FOLDER)) {
            Err(FolderError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            opened => opened.map(Some),
        }
    }

    fn open_at(path: PathBuf) -> Result<Self, FolderError> {
        // Not followed: a link that somebody else made leads anywhere.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW)
            .open(&path)
            .map_err(failure(&path, "opening the folder"))?;
        let found = file
            .metadata()
            .map_err(failure(&path, "reading the folder"))?;
        if found.mode() & OTHERS != 0 || !trusts(Uid::from_raw(found.uid())) {
            return Err(FolderError::Exposed { folder: path });
        }
        Ok(Self { file, path })
    }

    /// Listens under `name`, which is the caller's alone at this moment: whoever moves a guest holds
    /// the journal of that name. A socket that is there is a dead engine's, or that of one which is
    /// just ending and does not need it any more.
    pub(super) fn listen(self, name: &JobName) -> Result<(UnixListener, Socket), FolderError> {
        let bound = self.bind(name);
        let (listener, id) = bound.map_err(failure(&self.path, "opening it"))?;
        let socket = Socket {
            folder: self,
            name: name.clone(),
            id,
        };
        Ok((listener, socket))
    }

    fn bind(&self, name: &JobName) -> io::Result<(UnixListener, (u64, u64))> {
        let path = self.at(name);
        let _lock = self.lock()?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = StdListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(SOCKET_MODE))?;
        listener.set_nonblocking(true)?;
        let found = fs::symlink_metadata(&path)?;
        let listener = UnixListener::from_std(listener)?;
        Ok((listener, (found.dev(), found.ino())))
    }

    /// Connects to the socket `name`.
    pub(super) async fn connect(&self, name: &JobName) -> io::Result<UnixStream> {
        UnixStream::connect(self.at(name)).await
    }

    /// The names of all sockets, in order, those of dead engines among them.
    pub fn names(&self) -> Result<Vec<JobName>, FolderError> {
        let entries = fs::read_dir(self.own_path());
        let entries = entries.map_err(failure(&self.path, "listing the folder"))?;
        let mut names: Vec<JobName> = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_suffix(ENDING)?.parse().ok()
            })
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    fn own_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    fn at(&self, name: &JobName) -> PathBuf {
        self.own_path().join(format!("{name}{ENDING}"))
    }

    /// Nobody else makes, replaces or removes a socket while it is held: no engine removes what another
    /// has just put in the place of its own.
    fn lock(&self) -> io::Result<Flock<File>> {
        // Opened anew: a lock belongs to an open file, and the sockets of one process keep each other
        // out as well.
        let file = File::open(self.own_path())?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno): (_, Errno)| errno.into())
    }
}

/// The name of a socket that is listened on. It is given up when dropped.
#[derive(Debug)]
pub(super) struct Socket {
    folder: Folder,
    name: JobName,
    /// Device and inode: the name may be another engine's by now.
    id: (u64, u64),
}

impl Drop for Socket {
    fn drop(&mut self) {
        let path = self.folder.at(&self.name);
        let lock = self.folder.lock();
        let is_ours = fs::symlink_metadata(&path)
            .is_ok_and(|found| lock.is_ok() && (found.dev(), found.ino()) == self.id);
        if is_ours && let Err(error) = fs::remove_file(&path) {
            tracing::warn!(%error, name = %self.name, "cannot remove a control socket");
        }
    }
}

fn failure(folder: &Path, what: &'static str) -> impl FnOnce(io::Error) -> FolderError + use<> {
    let folder = folder.to_owned();
    move |source| FolderError::Io {
        folder,
        what,
        source,
    }
}

/// Whether this process has nothing to fear from `other`'s: they are the same user's, or the other's is
/// root, or this one's, which can do everything anyway.
pub(super) fn trusts(other: Uid) -> bool {
    let own = geteuid();
    other == own || other.is_root() || own.is_root()
}

/// Whether a client of user `other` may steer what runs as `own`.
pub(super) fn may_steer(other: Uid, own: Uid) -> bool {
    other == own || other.is_root()
}
