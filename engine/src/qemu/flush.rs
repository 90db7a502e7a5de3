//! Writing out the host's caches of the disk images before the guest is paused.
//!
//! `stop` flushes every disk, inside the blackout. QEMU must not be asked to flush earlier: that
//! would hold its main loop. But whoever syncs an image file writes its pages out, for QEMU as well,
//! and then the flush inside the blackout finds next to nothing to do.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc::{O_ACCMODE, O_NONBLOCK, O_RDONLY};
use nix::unistd::fdatasync;

use crate::linux::Process;
use crate::vmm::VmmError;

/// Syncs what a process writes to.
pub(super) struct Flusher {
    process: Arc<Process>,
}

impl Flusher {
    pub(super) fn new(process: Arc<Process>) -> Self {
        Self { process }
    }

    /// Syncs every file that QEMU writes to.
    pub(super) fn flush(&self) -> Result<(), VmmError> {
        for path in self.written_files()? {
            match sync(&path) {
                Ok(()) => {}
                // Closed meanwhile: not an image in use.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    let what = format!("cannot flush {} of QEMU", path.display());
                    return Err(VmmError::io(what, source));
                }
            }
        }
        Ok(())
    }

    /// Every regular file and block device that the process has open for writing. Images handed over
    /// as descriptors have no name: so all of them, whatever they are called.
    fn written_files(&self) -> Result<Vec<PathBuf>, VmmError> {
        let process = PathBuf::from(format!("/proc/{}", self.process.pid()));
        let mut files = Vec::new();
        for fd in self.process.fds()? {
            let path = process.join(format!("fd/{}", fd.0));
            let info = fs::read_to_string(process.join(format!("fdinfo/{}", fd.0)));
            let writes = info.is_ok_and(|info| open_for_writing(&info));
            let kind = fs::metadata(&path).map(|metadata| metadata.file_type());
            if writes && kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device()) {
                files.push(path);
            }
        }
        Ok(files)
    }
}

fn sync(path: &Path) -> io::Result<()> {
    // Opened anew: a duplicate would share QEMU's locks on the image and keep them alive.
    let file = File::options()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)?;
    match fdatasync(&file) {
        // Not every file can be synced; what cannot has nothing to write.
        Err(Errno::EINVAL | Errno::EROFS) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Reads the access mode from a file under `/proc/PID/fdinfo`.
fn open_for_writing(info: &str) -> bool {
    info.lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & O_ACCMODE != O_RDONLY)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn finds_what_is_written_to() {
        let flusher = Flusher::new(Arc::new(Process::open(Pid::this()).unwrap()));
        let written = tempfile::NamedTempFile::new().unwrap();
        let only_read = File::open(written.path()).unwrap();
        let path = |fd: i32| PathBuf::from(format!("/proc/{}/fd/{fd}", Pid::this()));
        let files = flusher.written_files().unwrap();
        assert!(files.contains(&path(written.as_raw_fd())));
        assert!(!files.contains(&path(only_read.as_raw_fd())));
        sync(&path(written.as_raw_fd())).unwrap();
    }

    #[test]
    fn tells_writers_from_readers() {
        assert!(open_for_writing("pos:\t0\nflags:\t0100002\nmnt_id:\t27\n"));
        assert!(open_for_writing("pos:\t0\nflags:\t0100001\n"));
        assert!(!open_for_writing("pos:\t0\nflags:\t0100000\n"));
        assert!(!open_for_writing("pos:\t0\n"));
    }
}
