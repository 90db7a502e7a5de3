//! Run state: what the guest is doing, and telling it to.

use serde::Deserialize;

use super::{Done, plain_commands};

plain_commands! {
    /// Whether the guest runs, and if not, why.
    QueryStatus = "query-status" -> Status;
    /// Pauses the guest. Answered when its disks are drained and flushed; the `STOP` event comes
    /// before that.
    Stop = "stop" -> Done;
    /// Lets the guest run. While it is in [`RunState::Inmigrate`] this only sets that it will run
    /// when the load has ended.
    Cont = "cont" -> Done;
    /// Ends QEMU. The connection closes after the answer, or instead of it.
    Quit = "quit" -> Done;
}

open_enum! {
    /// What QEMU calls the state of a guest.
    RunState {
        /// Paused by the debugger.
        Debug = "debug",
        /// Paused while a migration out is being finished.
        FinishMigrate = "finish-migrate",
        /// Waits for a migration in.
        Inmigrate = "inmigrate",
        /// Paused by an error inside QEMU.
        InternalError = "internal-error",
        /// Paused by a disk's I/O error.
        IoError = "io-error",
        /// Paused by `stop`.
        Paused = "paused",
        /// Paused after a migration out.
        Postmigrate = "postmigrate",
        /// Not started yet.
        Prelaunch = "prelaunch",
        /// Paused while a snapshot is loaded.
        RestoreVm = "restore-vm",
        /// Running.
        Running = "running",
        /// Paused while a snapshot is saved.
        SaveVm = "save-vm",
        /// Shut down, with QEMU told to stay.
        Shutdown = "shutdown",
        /// Suspended to RAM.
        Suspended = "suspended",
        /// Paused by a watchdog.
        Watchdog = "watchdog",
        /// Paused by a panic.
        GuestPanicked = "guest-panicked",
        /// Paused by COLO.
        Colo = "colo",
    }
}

/// Whether the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// The state.
    pub status: RunState,
    /// True when its vCPUs run.
    pub running: bool,
}
