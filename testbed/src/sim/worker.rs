//! The threads of a driver: each does its jobs in order, and tells what came of them.

use std::collections::VecDeque;
use std::time::Duration;

use ferry_engine::core::message::{Record, Step};
use ferry_engine::core::pageset::PageSet;
use ferry_engine::vmm::{Rearm, RunState};

/// A thread of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thread {
    /// Everything about the VM but its RAM.
    Vm,
    /// Dirty tracking.
    Tracker,
    /// The journal.
    Journal,
    /// Disk flushes.
    Flusher,
    /// Connections being opened.
    Opener,
    /// Page lanes, which have workers of their own; only their facts are in this order.
    Lanes,
    /// The reader of the control lane and of the VMM's events.
    Reader,
}

/// Threads a side has.
pub(super) const THREADS: usize = 7;

/// An order that takes time.
#[derive(Debug)]
pub(super) enum Job {
    /// Source.
    OpenState,
    /// Source: to so much less time, in percent.
    Throttle(u8),
    /// Source.
    Pause,
    /// Source.
    Inventory,
    /// Source.
    Save,
    /// Source.
    Undo(RunState),
    /// Source.
    Retire,
    /// Source.
    StartTracking,
    /// Source.
    Collect(Option<PageSet>),
    /// Source, with what is dirty anyway.
    Scan(Rearm, PageSet),
    /// Source.
    StopTracking,
    /// Source.
    Flush,
    /// Either.
    Journal(Record),
    /// Target.
    Prepare,
    /// Target.
    Load,
    /// Target.
    Resume,
    /// Target.
    Restore,
    /// Target.
    Quit,
}

impl Job {
    /// Who does it.
    pub(super) fn thread(&self) -> Thread {
        match self {
            Self::StartTracking | Self::Collect(_) | Self::Scan(..) | Self::StopTracking => {
                Thread::Tracker
            }
            Self::Journal(_) => Thread::Journal,
            Self::Flush => Thread::Flusher,
            _ => Thread::Vm,
        }
    }

    /// What has failed when it fails.
    pub(super) fn step(&self) -> Step {
        match self {
            Self::OpenState => Step::OpenState,
            Self::Throttle(_) => Step::Throttle,
            Self::Pause => Step::Pause,
            Self::Inventory => Step::Inventory,
            Self::Save => Step::Save,
            Self::Undo(_) | Self::Restore => Step::Undo,
            Self::Retire | Self::Quit => Step::Retire,
            Self::StartTracking => Step::StartTracking,
            Self::Collect(_) | Self::Scan(..) => Step::Collect,
            Self::StopTracking => Step::StopTracking,
            Self::Flush => Step::Flush,
            Self::Journal(_) => Step::Journal,
            Self::Prepare => Step::Prepare,
            Self::Load => Step::Load,
            Self::Resume => Step::Resume,
        }
    }

    /// True when the outcome claims what only this job brings about: nothing may end before it.
    pub(super) fn binds_the_end(&self) -> bool {
        matches!(
            self,
            Self::Undo(_) | Self::Retire | Self::Journal(_) | Self::Resume | Self::Quit
        )
    }
}

/// The work of one thread.
#[derive(Debug, Default)]
pub(super) struct Worker {
    /// In order; the first is being done.
    pub(super) queue: VecDeque<Job>,
    /// Whether the first has begun.
    pub(super) busy: bool,
    /// A load that waits for RAM to be complete.
    pub(super) parked: bool,
    /// When the last fact of this thread is told: facts of one thread never overtake each other.
    pub(super) told: Duration,
}
