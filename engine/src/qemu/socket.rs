//! A private folder for the local socket on which QEMU's device state travels.
//!
//! A descriptor passed with `getfd` would need no path, but it has to travel with the very bytes of a
//! QMP command. A path needs care in three things, all met here. QEMU may see another file system
//! than we do (a chroot, a mount namespace): the folder is made in QEMU's own, through
//! `/proc/PID/root`, and held by descriptor, so that it can be removed also when QEMU has died. QEMU
//! may run as another user: the folder is given to that user, mode 0700. And somebody else might
//! connect: whoever uses the socket checks the peer's process.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use crate::vmm::VmmError;

/// Longest path of a Unix socket: `sun_path` has 108 bytes, the last is zero.
const SOCKET_PATH_MAX: usize = 107;

/// Name of the one socket in the folder.
const SOCKET: &str = "state";

/// A folder that only we and one QEMU can enter. Removed when dropped.
#[derive(Debug)]
pub(super) struct PrivateSocket {
    /// The folder above, as QEMU sees it, held open.
    base: File,
    name: String,
    theirs: PathBuf,
    owner: (u32, u32),
}

impl PrivateSocket {
    /// Makes the folder below `base`, a path in the file system of process `pid`.
    pub(super) fn create(pid: Pid, base: &Path) -> Result<Self, VmmError> {
        let name = random_name(pid);
        let theirs = base.join(&name).join(SOCKET);
        if !base.is_absolute() || theirs.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(VmmError::Unfit {
                what: format!(
                    "no socket can be made in {}: name a folder with a short, absolute path",
                    base.display()
                ),
            });
        }
        Self::create_in(pid, base, name, theirs).map_err(|source| {
            let what = format!(
                "cannot make a private folder for QEMU in {}",
                base.display()
            );
            VmmError::io(what, source)
        })
    }

    fn create_in(pid: Pid, base: &Path, name: String, theirs: PathBuf) -> io::Result<Self> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read_to_string(process.join("status"))?;
        let owner = file_ids(&status).ok_or(io::ErrorKind::InvalidData)?;
        let root = process.join("root");
        let base = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_DIRECTORY)
            .open(root.join(base.strip_prefix("/").unwrap_or(base)))?;
        let socket = Self {
            base,
            name,
            theirs,
            owner,
        };
        DirBuilder::new().mode(0o700).create(socket.folder())?;
        socket.give(&socket.folder())?;
        Ok(socket)
    }

    /// The socket's path for this process.
    pub(super) fn ours(&self) -> PathBuf {
        self.folder().join(SOCKET)
    }

    /// The socket's URI for QEMU.
    pub(super) fn uri(&self) -> String {
        format!("unix:{}", self.theirs.display())
    }

    /// Lets QEMU use a socket that we have bound.
    pub(super) fn admit(&self) -> Result<(), VmmError> {
        self.give(&self.ours())
            .map_err(|source| VmmError::io("cannot give the state socket to QEMU's user", source))
    }

    fn folder(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.base.as_raw_fd())).join(&self.name)
    }

    fn give(&self, path: &Path) -> io::Result<()> {
        let (uid, gid) = self.owner;
        let found = fs::symlink_metadata(path)?;
        if found.uid() == uid {
            return Ok(());
        }
        chown(path, Some(uid), Some(gid))
    }
}

/// A name that nobody else has. It need not be secret: the folder lets nobody in.
/// Whose it is can be seen, should one ever be left behind.
fn random_name(pid: Pid) -> String {
    let number = getrandom::u64().unwrap_or_else(|_| std::process::id().into());
    format!("ferry-{pid}-{number:016x}")
}

/// The user and group as which a process acts on files, from its `status`. The owner of `/proc/PID`
/// will not do: it is root for a process that has changed its user.
fn file_ids(status: &str) -> Option<(u32, u32)> {
    let last = |key| {
        let ids = status
            .lines()
            .find_map(|line: &str| line.strip_prefix(key))?;
        ids.split_whitespace().next_back()?.parse().ok()
    };
    Some((last("Uid:")?, last("Gid:")?))
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(self.folder()) {
            tracing::warn!(%error, folder = %self.theirs.display(), "cannot remove a private folder");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn is_private_and_leaves_nothing_behind() {
        let base = tempfile::tempdir().unwrap();
        let socket = PrivateSocket::create(Pid::this(), base.path()).unwrap();
        let folder = socket.theirs.parent().unwrap().to_owned();
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        let _listener = UnixListener::bind(socket.ours()).unwrap();
        socket.admit().unwrap();
        assert!(socket.theirs.exists());
        drop(socket);
        assert!(!folder.exists());
    }

    #[test]
    fn knows_as_whom_a_process_acts_on_files() {
        let status = "Name:\tqemu\nUid:\t0\t0\t0\t107\nGid:\t0\t0\t0\t36\n";
        assert_eq!(file_ids(status), Some((107, 36)));
        assert_eq!(file_ids("Name:\tqemu\n"), None);
    }

    #[test]
    fn refuses_what_cannot_be_a_socket() {
        let long = PathBuf::from("/").join("x".repeat(SOCKET_PATH_MAX));
        for base in [Path::new("relative"), &long] {
            let refused = PrivateSocket::create(Pid::this(), base);
            assert!(
                matches!(refused, Err(VmmError::Unfit { .. })),
                "{refused:?}"
            );
        }
    }
}
