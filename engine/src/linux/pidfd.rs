//! A process that cannot be mistaken for another one.
//!
//! Process numbers are used again. A [`Process`] therefore holds two descriptors that stay with the
//! process for which they were opened: a pidfd, and its folder under `/proc`. After the process has
//! ended both give errors, whoever has its number by then. What must outlive us, in a journal, is a
//! [`ProcessId`]: the number with the time at which the process started.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant};
use std::{fmt, io};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{FileStat, Mode, fstatat};
use nix::unistd::Pid;

use super::Error;

/// Fields of `/proc/PID/stat` between the process's name and its start time (field 22).
const FIELDS_TO_START_TIME: usize = 19;

/// Which process, in words that can be written down. Valid until the machine boots again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// Its number.
    pub pid: Pid,
    /// When it started, in clock ticks since boot.
    pub start_time_ticks: u64,
}

/// A descriptor as another process numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteFd(pub RawFd);

impl fmt::Display for RemoteFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "descriptor {}", self.0)
    }
}

/// A process, held for as long as this value lives. The process itself may end at any time.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: OwnedFd,
    proc_dir: OwnedFd,
}

impl Process {
    /// Takes hold of the process that has the number `pid` now.
    ///
    /// Fails with [`Error::Gone`] when there is none.
    pub fn open(pid: Pid) -> Result<Self, Error> {
        let pidfd = pidfd_open(pid).map_err(|error| gone_or(pid, "pidfd_open", error))?;
        let folder = format!("/proc/{pid}");
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let proc_dir = nix::fcntl::open(folder.as_str(), flags, Mode::empty())
            .map_err(|error| gone_or(pid, "open of a process's folder", error))?;
        let mut process = Self {
            id: ProcessId {
                pid,
                start_time_ticks: 0,
            },
            pidfd,
            proc_dir,
        };
        process.id.start_time_ticks = parse_start_time(&process.read_proc("stat")?)?;
        // The folder was opened by number: it is this process's only if this process, which the
        // pidfd pins, had not ended by then.
        process.check_alive()?;
        Ok(process)
    }

    /// Takes hold of a process that was written down earlier.
    ///
    /// Fails with [`Error::Gone`] when it has ended, also when another one has its number now.
    pub fn reopen(id: ProcessId) -> Result<Self, Error> {
        let process = Self::open(id.pid)?;
        if process.same_as(id) {
            Ok(process)
        } else {
            Err(Error::Gone { pid: id.pid })
        }
    }

    /// Which process this is.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.id.pid
    }

    /// True when `id` names this very process and not merely one of the same number.
    pub fn same_as(&self, id: ProcessId) -> bool {
        self.id == id
    }

    /// False once the process has ended, also while it waits to be reaped.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                // A pidfd becomes readable when its process ends; nothing else makes it ready.
                outcome => return outcome == Ok(0),
            }
        }
    }

    /// A descriptor that becomes readable when the process ends.
    pub(super) fn end(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// True when the process numbers its threads as we do: it is in the pid namespace whose numbers
    /// `/proc` shows.
    pub(super) fn shares_our_numbers(&self) -> Result<bool, Error> {
        let status = self.read_proc("status")?;
        let status = String::from_utf8_lossy(&status);
        // One number for each namespace, from that of `/proc` to its own.
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        Ok(numbers.is_some_and(|numbers| numbers.split_whitespace().count() == 1))
    }

    /// Fails with [`Error::Gone`] once the process has ended.
    pub fn check_alive(&self) -> Result<(), Error> {
        if self.is_alive() {
            Ok(())
        } else {
            Err(Error::Gone { pid: self.pid() })
        }
    }

    /// Waits until the process has ended, at most for `limit`; false when it has not.
    pub fn wait_end(&self, limit: Duration) -> Result<bool, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, left) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(Error::call("poll of a pidfd", error)),
                Ok(0) if Instant::now() < deadline => {}
                Ok(ready) => return Ok(ready > 0),
            }
        }
    }

    /// Kills the process, and never another one. One that has ended already is no error.
    pub fn kill(&self) -> Result<(), Error> {
        match pidfd_kill(&self.pidfd) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(Error::call("pidfd_send_signal", error)),
        }
    }

    /// The name that the process gives itself, at most 15 bytes.
    pub fn name(&self) -> Result<OsString, Error> {
        let mut name = self.read_proc("comm")?;
        name.pop_if(|last| *last == b'\n');
        Ok(OsString::from_vec(name))
    }

    /// Duplicates a descriptor of the process into ours: both share one open file.
    pub fn take_fd(&self, fd: RemoteFd) -> Result<OwnedFd, Error> {
        pidfd_getfd(&self.pidfd, fd).map_err(|error| self.failure("pidfd_getfd", error))
    }

    /// Every descriptor that the process has open now, in order.
    pub fn fds(&self) -> Result<Vec<RemoteFd>, Error> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mut folder = Dir::openat(&self.proc_dir, "fd", flags, Mode::empty())
            .map_err(|error| self.failure("open of a process's list of descriptors", error))?;
        let mut found = Vec::new();
        for entry in folder.iter() {
            let entry =
                entry.map_err(|error| self.failure("reading a list of descriptors", error))?;
            let number = entry
                .file_name()
                .to_str()
                .ok()
                .and_then(|name| name.parse().ok());
            found.extend(number.map(RemoteFd));
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Every thread that the process has now, by its number in our own pid namespace.
    pub fn threads(&self) -> Result<Vec<Pid>, Error> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mut folder = Dir::openat(&self.proc_dir, "task", flags, Mode::empty())
            .map_err(|error| self.failure("open of a process's list of threads", error))?;
        let mut found = Vec::new();
        for entry in folder.iter() {
            let entry = entry.map_err(|error| self.failure("reading a list of threads", error))?;
            let number = entry.file_name().to_str().ok();
            found.extend(number.and_then(|name| name.parse().ok()).map(Pid::from_raw));
        }
        Ok(found)
    }

    /// Where a descriptor of the process leads, as the kernel words it.
    pub fn fd_link(&self, fd: RemoteFd) -> Result<OsString, Error> {
        let path = format!("fd/{}", fd.0);
        nix::fcntl::readlinkat(&self.proc_dir, path.as_str())
            .map_err(|error| self.failure("reading where a descriptor leads", error))
    }

    /// What `path`, below the process's folder in `/proc`, leads to.
    pub(super) fn stat_proc(&self, path: &str) -> Result<FileStat, Error> {
        fstatat(&self.proc_dir, path, nix::fcntl::AtFlags::empty())
            .map_err(|error| self.failure("stat below a process's folder", error))
    }

    /// Opens `path`, below the process's folder in `/proc`.
    pub(super) fn open_proc(&self, path: &str, access: OFlag) -> Result<File, Error> {
        openat(
            &self.proc_dir,
            path,
            access | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map(File::from)
        .map_err(|error| self.failure("open below a process's folder", error))
    }

    /// Reads `path`, below the process's folder in `/proc`, to its end.
    pub(super) fn read_proc(&self, path: &str) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.open_proc(path, OFlag::O_RDONLY)?
            .read_to_end(&mut bytes)
            .map_err(|error| self.failure("reading below a process's folder", error))?;
        Ok(bytes)
    }

    /// A failed call about this process: that it is gone explains every error.
    pub(super) fn failure(&self, what: &'static str, source: impl Into<io::Error>) -> Error {
        if self.is_alive() {
            Error::call(what, source)
        } else {
            Error::Gone { pid: self.pid() }
        }
    }
}

fn gone_or(pid: Pid, what: &'static str, error: Errno) -> Error {
    match error {
        Errno::ESRCH | Errno::ENOENT => Error::Gone { pid },
        other => Error::call(what, other),
    }
}

fn parse_start_time(stat: &[u8]) -> Result<u64, Error> {
    let text = String::from_utf8_lossy(stat);
    // The second field is the process's name in parentheses, and may hold spaces and parentheses:
    // count from the last one.
    text.rsplit_once(") ")
        .and_then(|(_, fields)| fields.split(' ').nth(FIELDS_TO_START_TIME))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| Error::Proc {
            file: "stat",
            line: text.trim_end().to_owned(),
        })
}

fn pidfd_open(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    owned_fd(result)
}

fn pidfd_getfd(pidfd: &OwnedFd, fd: RemoteFd) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_getfd takes three integers and touches no memory of ours; `pidfd` is open for
    // as long as it is borrowed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd.0, 0) };
    owned_fd(result)
}

fn pidfd_kill(pidfd: &OwnedFd) -> Result<(), Errno> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: pidfd_send_signal takes a null pointer for its information; the rest are integers, and
    // `pidfd` is open for as long as it is borrowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            no_info,
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// The descriptor that a system call made, which nobody else owns yet.
fn owned_fd(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let number = Errno::result(result)?;
    let number = RawFd::try_from(number).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat_line(name: &str, start_time: u64) -> Vec<u8> {
        let before = "4 ".repeat(FIELDS_TO_START_TIME - 1);
        format!("17 ({name}) S {before}{start_time} 23 24\n").into_bytes()
    }

    #[test]
    fn finds_the_start_time_behind_any_name() {
        for name in ["qemu", "a b", ") S 1 2", "((", ""] {
            assert_eq!(parse_start_time(&stat_line(name, 4711)).unwrap(), 4711);
        }
        assert!(parse_start_time(b"17 (short) S 1").is_err());
    }

    #[test]
    fn knows_itself() {
        let us = Process::open(Pid::this()).unwrap();
        assert!(us.is_alive());
        assert!(us.same_as(Process::reopen(us.id()).unwrap().id()));
        let earlier = ProcessId {
            start_time_ticks: us.id().start_time_ticks - 1,
            ..us.id()
        };
        assert!(matches!(Process::reopen(earlier), Err(Error::Gone { .. })));
    }

    #[test]
    fn tells_a_process_that_is_not_there() {
        let never = Pid::from_raw(i32::MAX);
        assert!(matches!(Process::open(never), Err(Error::Gone { pid }) if pid == never));
    }
}
