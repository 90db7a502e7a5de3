//! A userfaultfd within the process that made it.

use std::io::ErrorKind;
use std::sync::Arc;

use super::uffd::{Features, Uffd};
use super::{Error, Process, RemoteFd, inject};

/// What the kernel calls a userfaultfd under `/proc/PID/fd`.
const LINK: &str = "anon_inode:[userfaultfd]";

/// Every userfaultfd of `process` on which exactly `features` were agreed.
pub(super) fn find(process: &Process, features: Features) -> Result<Vec<RemoteFd>, Error> {
    let mut found = Vec::new();
    for fd in process.fds()? {
        // Descriptors come and go while we look.
        if !process.fd_link(fd).is_ok_and(|link| link == LINK) {
            continue;
        }
        let info = process.read_proc(&format!("fdinfo/{}", fd.0))?;
        let agreed = Uffd::features_in_fdinfo(&String::from_utf8_lossy(&info));
        if agreed.is_some_and(|agreed| agreed.are_exactly(features)) {
            found.push(fd);
        }
    }
    Ok(found)
}

/// A userfaultfd that a process made for us and does not know of. Dropping it closes it there, unless
/// it was left to the process.
#[derive(Debug)]
pub(super) struct RemoteUffd {
    process: Arc<Process>,
    fd: RemoteFd,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Open until this is dropped.
    Ours,
    /// Open until it is closed, whatever becomes of us.
    Left,
    Closed,
}

impl RemoteUffd {
    /// Has the process make one.
    pub(super) fn new(process: Arc<Process>) -> Result<Self, Error> {
        let fd = inject::userfaultfd(&process)?;
        Ok(Self {
            process,
            fd,
            state: State::Ours,
        })
    }

    /// One that was found there, and stays there.
    pub(super) fn left(process: Arc<Process>, fd: RemoteFd) -> Self {
        Self {
            process,
            fd,
            state: State::Left,
        }
    }

    /// From now on it outlives us.
    pub(super) fn leave(&mut self) {
        if self.state == State::Ours {
            self.state = State::Left;
        }
    }

    /// Its number in the process.
    pub(super) fn fd(&self) -> RemoteFd {
        self.fd
    }

    /// Closes it in the process. A process that has ended has closed it itself.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        if self.state == State::Closed {
            return Ok(());
        }
        match self.close_in_process() {
            Err(Error::Gone { .. }) => {}
            outcome => outcome?,
        }
        self.state = State::Closed;
        Ok(())
    }

    fn close_in_process(&self) -> Result<(), Error> {
        let pid = self.process.pid();
        // Nobody else knows this descriptor. But to close one of the guest's disks is not to be undone.
        match self.process.fd_link(self.fd) {
            Ok(link) if link == LINK => inject::close(&self.process, self.fd),
            Ok(_) => Err(Error::ForeignFd { pid, fd: self.fd }),
            Err(Error::Call { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for RemoteUffd {
    fn drop(&mut self) {
        if self.state == State::Ours
            && let Err(error) = self.close()
        {
            tracing::warn!(pid = %self.process.pid(), fd = %self.fd, %error,
                "a userfaultfd was left open in a process");
        }
    }
}
