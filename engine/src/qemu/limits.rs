//! How long each step may take, and why that long.
//!
//! A bound is there so that a hung QEMU ends a migration instead of holding it; none of them is a
//! wait that an ordinary migration reaches.

use std::time::Duration;

/// An ordinary QMP command: QEMU answers in less than a millisecond unless its main loop is held up,
/// by a slow disk for instance.
pub(super) const COMMAND: Duration = Duration::from_secs(10);

/// `stop`: QEMU drains and flushes every disk before it answers.
pub(super) const STOP: Duration = Duration::from_secs(60);

/// `cont`: QEMU opens its images for writing again.
pub(super) const CONT: Duration = Duration::from_secs(30);

/// From `migrate` to `pre-switchover`: what QEMU itself has to send while the guest runs, video
/// memory above all, over the link of the migration; and then the drain of the disks.
pub(super) const SWITCHOVER: Duration = Duration::from_secs(60);

/// From `migrate-continue` until the last byte of device state has been taken by the sink.
pub(super) const SAVE: Duration = Duration::from_secs(30);

/// From `migrate_cancel`, or `completed`, until the run state is settled.
pub(super) const SETTLE: Duration = Duration::from_secs(10);

/// From the last byte of device state until QEMU says that it is loaded. In post-copy a load waits
/// for pages from the other host.
pub(super) const LOAD: Duration = Duration::from_secs(60);

/// How long QEMU may leave bytes of the device state unread before the load is given up.
pub(super) const LOAD_STALL: Duration = Duration::from_secs(60);

/// The answer to `quit`. A QEMU that is too busy for it, with a load that will never end for
/// instance, has nothing to lose.
pub(super) const QUIT_ANSWER: Duration = Duration::from_secs(3);

/// From `quit` to the end of the process: QEMU flushes its disks on the way.
pub(super) const QUIT: Duration = Duration::from_secs(10);

/// From a kill to the end of the process.
pub(super) const KILLED: Duration = Duration::from_secs(10);
