//! What can go wrong in the testbed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why the testbed could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestbedError {
    /// Nothing is unpacked.
    #[error("{path:?} is missing: run testbed/setup (with the same FERRY_TESTBED_DIR) first")]
    NotSetUp {
        /// What was looked for.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU ended by itself.
    #[error("QEMU ended with {status}: {log}")]
    QemuEnded {
        /// Its exit status.
        status: String,
        /// What it wrote to standard error.
        log: String,
    },
    /// Another program that the testbed called failed.
    #[error("{program} failed: {log}")]
    Program {
        /// The program.
        program: String,
        /// What it wrote to standard error.
        log: String,
    },
    /// A condition did not come about.
    #[error("after {bound:?}, still not: {what}{context}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// For how long.
        bound: Duration,
        /// What else is known.
        context: String,
    },
    /// QMP answered a command with an error.
    #[error("QMP {command}: {answer}")]
    Qmp {
        /// The command.
        command: String,
        /// The error as QEMU put it.
        answer: String,
    },
}

impl TestbedError {
    /// For `map_err`: a failed system call or other I/O, with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
