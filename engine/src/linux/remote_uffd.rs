//! Userfaultfds that a process has and does not know of: made in it for us, and left there by the dead.

use std::io::ErrorKind;
use std::sync::Arc;

use super::uffd::{Features, Uffd};
use super::{Error, Process, RemoteFd, inject};

/// What the kernel calls a userfaultfd under `/proc/PID/fd`.
const USERFAULTFD_LINK: &str = "anon_inode:[userfaultfd]";

/// Closes what an engine that died has left in the process: it would keep us from tracking.
///
/// No other user of userfaultfd agrees on these very features for a VMM. Should an engine be alive
/// and at work on this guest, its own duplicate keeps its watch, and ours is refused.
pub(super) fn close_leftovers(process: &Process) -> Result<(), Error> {
    for fd in made_with(process, Features::TRACK_WRITES)? {
        tracing::warn!(pid = %process.pid(), %fd, "closing what an earlier migration left");
        inject::close(process, fd)?;
    }
    Ok(())
}

/// The userfaultfds of a process that have agreed on these features.
pub(super) fn made_with(process: &Process, features: Features) -> Result<Vec<RemoteFd>, Error> {
    let mut made = Vec::new();
    for fd in process.fds()? {
        // Descriptors come and go while we look.
        let is_userfaultfd = process
            .fd_link(fd)
            .is_ok_and(|link| link == USERFAULTFD_LINK);
        if !is_userfaultfd {
            continue;
        }
        let info = process.read_proc(&format!("fdinfo/{}", fd.0))?;
        let agreed = Uffd::features_in_fdinfo(&String::from_utf8_lossy(&info));
        if agreed.is_some_and(|agreed| agreed.contains(features)) {
            made.push(fd);
        }
    }
    Ok(made)
}

/// A userfaultfd that the process made for us and does not know of. Dropping it closes it there.
#[derive(Debug)]
pub(super) struct RemoteUffd {
    process: Arc<Process>,
    fd: RemoteFd,
    open: bool,
}

impl RemoteUffd {
    pub(super) fn new(process: Arc<Process>) -> Result<Self, Error> {
        let fd = inject::userfaultfd(&process)?;
        Ok(Self::of(process, fd))
    }

    /// One that was left in the process.
    pub(super) fn of(process: Arc<Process>, fd: RemoteFd) -> Self {
        Self {
            process,
            fd,
            open: true,
        }
    }

    /// Its number there.
    pub(super) fn fd(&self) -> RemoteFd {
        self.fd
    }

    /// Leaves it open there, whatever becomes of this value.
    pub(super) fn leave(&mut self) {
        self.open = false;
    }

    /// Closes it in the process. A process that has ended has closed it itself.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        if !self.open {
            return Ok(());
        }
        match self.close_in_process() {
            Err(Error::Gone { .. }) => {}
            outcome => outcome?,
        }
        self.open = false;
        Ok(())
    }

    fn close_in_process(&self) -> Result<(), Error> {
        let pid = self.process.pid();
        // Nobody else knows this descriptor. But to close one of the guest's disks is not to be undone.
        match self.process.fd_link(self.fd) {
            Ok(link) if link == USERFAULTFD_LINK => inject::close(&self.process, self.fd),
            Ok(_) => Err(Error::ForeignFd { pid, fd: self.fd }),
            Err(Error::Call { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for RemoteUffd {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(pid = %self.process.pid(), fd = %self.fd, %error,
                "a userfaultfd was left open in a process");
        }
    }
}
