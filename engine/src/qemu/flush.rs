//! Writing out the host's caches of the disk images before the guest is paused.
//!
//! `stop` flushes every disk, inside the blackout. QEMU must not be asked to flush earlier: that
//! would hold its main loop. But whoever syncs an image file writes its pages out, for QEMU as well,
//! and then the flush inside the blackout finds next to nothing to do.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
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

    /// Syncs every regular file and block device that QEMU has open for writing. Images handed over
    /// as descriptors have no name: so all of them, whatever they are called.
    pub(super) fn flush(&self) -> Result<(), VmmError> {
        for fd in self.process.fds()? {
            match self.flush_one(fd.0) {
                Ok(()) => {}
                // Closed meanwhile: not an image in use.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    let what = format!("cannot flush descriptor {} of QEMU", fd.0);
                    return Err(VmmError::io(what, source));
                }
            }
        }
        Ok(())
    }

    fn flush_one(&self, fd: i32) -> io::Result<()> {
        let process = PathBuf::from(format!("/proc/{}", self.process.pid()));
        let path = process.join(format!("fd/{fd}"));
        let kind = std::fs::metadata(&path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Ok(());
        }
        let info = std::fs::read_to_string(process.join(format!("fdinfo/{fd}")))?;
        if !open_for_writing(&info) {
            return Ok(());
        }
        // Opened anew: a duplicate would share QEMU's locks on the image and keep them alive.
        let file = File::options()
            .read(true)
            .custom_flags(O_NONBLOCK)
            .open(path)?;
        match fdatasync(file.as_fd()) {
            // Not every file can be synced; what cannot has nothing to write.
            Err(Errno::EINVAL | Errno::EROFS) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
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
    use super::*;

    #[test]
    fn tells_writers_from_readers() {
        assert!(open_for_writing("pos:\t0\nflags:\t0100002\nmnt_id:\t27\n"));
        assert!(open_for_writing("pos:\t0\nflags:\t0100001\n"));
        assert!(!open_for_writing("pos:\t0\nflags:\t0100000\n"));
        assert!(!open_for_writing("pos:\t0\n"));
    }
}
