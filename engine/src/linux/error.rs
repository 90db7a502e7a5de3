//! What can go wrong between the engine and another process.

use std::io;
use std::path::PathBuf;

use nix::unistd::{Pid, Uid};

use super::pidfd::RemoteFd;
use crate::vmm::VmmError;

/// Why a process may not be traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TraceRefusal {
    /// It runs as another user.
    #[error(
        "it runs as uid {theirs} and we as uid {ours}: run as that user, or with CAP_SYS_PTRACE"
    )]
    OtherUser {
        /// Our effective user.
        ours: Uid,
        /// The process's effective user.
        theirs: Uid,
    },
    /// The Yama security module restricts tracing.
    #[error(
        "kernel.yama.ptrace_scope is {scope}: set it to 0, or run with CAP_SYS_PTRACE (not enough at 3)"
    )]
    Yama {
        /// The value of the setting.
        scope: u32,
    },
    /// Its memory is marked as not dumpable, or a security module says no.
    #[error("it is not dumpable, or a security policy forbids it: run with CAP_SYS_PTRACE")]
    Policy,
}

/// Why the time of a process's threads cannot be limited.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuotaRefusal {
    /// No hierarchy of control groups has the controller, or none is mounted.
    #[error(
        "no control groups with the cpu controller are mounted here: mount them (mount -t cgroup2 \
         cgroup2 /sys/fs/cgroup)"
    )]
    NoController,
    /// The group is not below what is mounted.
    #[error(
        "its control group {} cannot be reached here: run outside of the container, or give it the \
         host's /sys/fs/cgroup", .group.display()
    )]
    OutOfSight {
        /// The group.
        group: PathBuf,
    },
    /// The hierarchy is mounted for reading alone.
    #[error(
        "its control group {} is mounted read-only: mount it for writing (mount -o remount,rw), or run \
         outside of the container", .dir.display()
    )]
    ReadOnly {
        /// The group's folder.
        dir: PathBuf,
    },
    /// We may make no group there.
    #[error(
        "we may make no control group in {}: run as root, or have that folder and its files given to \
         our user", .dir.display()
    )]
    NotPermitted {
        /// The group's folder.
        dir: PathBuf,
    },
    /// The groups above do not hand the controller on.
    #[error(
        "control group {} has no cpu controller: write +cpu to cgroup.subtree_control of the groups \
         above it", .dir.display()
    )]
    NotEnabled {
        /// The group's folder.
        dir: PathBuf,
    },
    /// Another group below has processes: no group beside it may be of threads.
    #[error(
        "control group {} has processes, so none beside it may be for threads of {}: move QEMU into a \
         group that has none below",
        .domain.display(), .dir.display()
    )]
    NotThreaded {
        /// The group's folder.
        dir: PathBuf,
        /// That of the group below.
        domain: PathBuf,
    },
}

/// A failed operation on another process or on its memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process has ended, or its number belongs to another one now.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: Pid,
    },
    /// Tracing it is not permitted.
    #[error("process {pid} may not be traced: {why}")]
    TraceRefused {
        /// The process.
        pid: Pid,
        /// Why not, and what to do about it.
        why: TraceRefusal,
    },
    /// Somebody else traces it; a process has one tracer at most.
    #[error("process {pid} is already traced by process {tracer}: detach that debugger")]
    TracedByOther {
        /// The process.
        pid: Pid,
        /// Its tracer.
        tracer: Pid,
    },
    /// It did not come to the expected stop in time.
    #[error("process {pid} did not stop for a system call within {limit_ms} ms")]
    NotStopping {
        /// The process.
        pid: Pid,
        /// The bound, in milliseconds.
        limit_ms: u64,
    },
    /// It stopped, but not where the injected system call should have taken it.
    #[error("process {pid} stopped at an unexpected place; it was put back as it was")]
    Astray {
        /// The process.
        pid: Pid,
    },
    /// A system call that the process ran for us failed.
    #[error("{call} failed inside process {pid}")]
    Remote {
        /// The process.
        pid: Pid,
        /// The system call's name.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A descriptor of the process is not the one that was expected there.
    #[error("{fd} of process {pid} is no userfaultfd")]
    ForeignFd {
        /// The process.
        pid: Pid,
        /// The descriptor.
        fd: RemoteFd,
    },
    /// Another userfaultfd watches the same memory.
    #[error(
        "memory {start:#x}..{end:#x} is watched by another userfaultfd: is another migration of this guest under way?"
    )]
    Watched {
        /// First address.
        start: u64,
        /// Address after the last one.
        end: u64,
    },
    /// The memory's mapping was replaced while it was tracked.
    #[error("memory {start:#x}..{end:#x} is not watched any more: it was mapped anew")]
    Unwatched {
        /// First address.
        start: u64,
        /// Address after the last one.
        end: u64,
    },
    /// The time of its threads cannot be limited.
    #[error("the time of process {pid} cannot be limited: {why}")]
    NoQuota {
        /// The process.
        pid: Pid,
        /// Why not, and what to do about it.
        why: QuotaRefusal,
    },
    /// What the process has mapped is not, or not only, the file at the addresses that are given.
    #[error(
        "guest RAM {name:?} is not one shared mapping of its file at {start:#x}..{end:#x}, and no other: a page that is missing there could be read elsewhere"
    )]
    NotMappedOnce {
        /// The region.
        name: String,
        /// First address.
        start: u64,
        /// Address after the last one.
        end: u64,
    },
    /// Pages cannot be placed in a range that is watched.
    #[error("the kernel does not place pages in guest RAM {name:?}, which must be tmpfs")]
    NotFillable {
        /// The region.
        name: String,
    },
    /// Pages that are to be missing hold something that the kernel does not discard.
    #[error(
        "pages of guest RAM {name:?} at {start:#x} of its file could not be discarded within {limit_ms} ms: if they are part of a huge page that something has pinned, put the file on a tmpfs mounted with huge=never"
    )]
    NotDiscarded {
        /// The region.
        name: String,
        /// Where in the file the first of them is.
        start: u64,
        /// The bound, in milliseconds.
        limit_ms: u64,
    },
    /// A line of a file under `/proc` that we cannot read.
    #[error("cannot understand line {line:?} of {file}")]
    Proc {
        /// Which file.
        file: &'static str,
        /// The line.
        line: String,
    },
    /// No descriptor of the process leads to the file behind a mapping.
    #[error("process {pid} has no open file with device {major}:{minor} and inode {inode}")]
    NoSuchFile {
        /// The process.
        pid: Pid,
        /// Major number of the device.
        major: u64,
        /// Minor number of the device.
        minor: u64,
        /// Inode on that device.
        inode: u64,
    },
    /// A system call of our own failed.
    #[error("{what} failed")]
    Call {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// A failed system call of our own. Accepts both kinds of error that the libraries give.
    pub(super) fn call(what: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Call {
            what,
            source: source.into(),
        }
    }
}

impl From<Error> for VmmError {
    fn from(error: Error) -> Self {
        match error {
            Error::Gone { .. } => Self::Gone {
                what: error.to_string(),
            },
            Error::NotStopping { limit_ms, .. } => Self::TimedOut {
                what: "stopping the VMM for a system call".into(),
                limit_ms,
            },
            Error::TraceRefused { .. }
            | Error::TracedByOther { .. }
            | Error::NoQuota { .. }
            | Error::Watched { .. }
            | Error::Unwatched { .. }
            | Error::NotMappedOnce { .. }
            | Error::NotFillable { .. }
            | Error::NotDiscarded { .. } => Self::Unfit {
                what: error.to_string(),
            },
            Error::Call { what, source } => Self::io(what, source),
            other => Self::failed("working on the VMM's process failed", other),
        }
    }
}
