//! How a migration ends, what went wrong, and what a user is told on the way.

mod reason;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ferry_stream::message::LaneId;

pub use self::reason::{Reason, in_full};
use crate::core::layout::{PageNumber, RegionIndex};
use crate::vmm::RunState;

/// The steps that can fail, as people would name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Opening page lanes.
    OpenLanes,
    /// Beginning to track.
    StartTracking,
    /// Collecting dirty pages.
    Collect,
    /// Reading, sending, receiving or placing pages.
    Pages,
    /// Flushing disk images.
    Flush,
    /// Opening the device state.
    OpenState,
    /// Slowing the guest, or giving it all of its time back.
    Throttle,
    /// Pausing the guest.
    Pause,
    /// Reading the inventory again.
    Inventory,
    /// Saving the device state.
    Save,
    /// Writing the journal.
    Journal,
    /// Blanking RAM and getting ready to load.
    Prepare,
    /// Loading the device state.
    Load,
    /// Resuming the guest.
    Resume,
    /// Putting the source back as it was.
    Undo,
    /// Ending the VMM, or leaving it stopped.
    Retire,
    /// Ending dirty tracking.
    StopTracking,
    /// Having a guest wait for the pages that it lacks.
    Arm,
    /// Ending that.
    Disarm,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenLanes => "opening the page lanes",
            Self::StartTracking => "starting dirty tracking",
            Self::Collect => "collecting dirty pages",
            Self::Pages => "moving pages",
            Self::Flush => "flushing disk images",
            Self::OpenState => "opening the device state",
            Self::Throttle => "slowing the guest",
            Self::Pause => "pausing the guest",
            Self::Inventory => "reading the inventory",
            Self::Save => "saving the device state",
            Self::Journal => "writing the journal",
            Self::Prepare => "preparing the target",
            Self::Load => "loading the device state",
            Self::Resume => "resuming the guest",
            Self::Undo => "putting the source back",
            Self::Retire => "ending the VMM",
            Self::StopTracking => "ending dirty tracking",
            Self::Arm => "arming page faults",
            Self::Disarm => "disarming page faults",
        })
    }
}

/// An action that failed, and why.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{step} failed")]
pub struct Failure {
    /// What was being done.
    pub step: Step,
    /// Why it failed.
    pub source: Arc<dyn StdError + Send + Sync>,
}

impl Failure {
    /// The failure of `step` because of `source`.
    pub fn new(step: Step, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            step,
            source: Arc::from(source.into()),
        }
    }
}

/// What a user should be told while the migration goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The downtime limit is below what an empty switchover takes; this counts instead.
    LimitBelowFloor {
        /// The limit asked for.
        limit: Duration,
        /// What counts.
        floor: Duration,
    },
    /// Rounds do not shrink: the guest is slowed by so much of its time, in percent.
    Throttled(u8),
    /// The guest cannot be slowed; the move goes on without. Told once.
    NotThrottled {
        /// Why.
        what: String,
    },
    /// The time-out has passed: the guest is paused and the move finishes.
    TimeoutSuspends,
    /// Somebody paused or resumed the guest; it will be left in that state.
    GuestStateChanged(RunState),
    /// The guest was reset; the move goes on.
    GuestReset,
    /// It is too late to cancel: the guest was given away.
    TooLateToCancel,
    /// Somebody resumed the guest here after it was given away; it was paused again.
    ResumedAfterGiven,
    /// The link was lost after the guest was given away; the target is asked whose it is.
    AskingTarget,
    /// A page lane died; the move goes on over the others.
    LaneLost {
        /// Which.
        lane: LaneId,
        /// How that showed.
        what: String,
    },
    /// A delta did not fit what the target has of its page. It is sent again, and no delta any more.
    Mismatch {
        /// The lane on which it came.
        lane: LaneId,
        /// The page's region.
        region: RegionIndex,
        /// The page.
        page: PageNumber,
    },
    /// Post-copy was allowed, or ordered, and cannot be had: the move goes on without it.
    NoPostcopy,
    /// Precopy cannot meet the downtime limit: the guest is handed over before its pages.
    HandsOverBefore,
    /// Something that does not change the outcome went wrong.
    Leftover(String),
}

/// Where the guest is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// At the target.
    Moved,
    /// At the source, or nowhere when it died of its own.
    Kept {
        /// Why it did not move.
        reason: Reason,
        /// How it was left.
        guest: GuestLeft,
    },
    /// Only the target can say, and cannot be asked: neither side was touched.
    InDoubt {
        /// What cut the two apart.
        reason: Reason,
    },
}

/// How the guest was left at the source.
#[derive(Clone, Debug)]
pub enum GuestLeft {
    /// Nothing had been changed.
    Untouched,
    /// Target: its VMM, which never owned the guest, was ended.
    Ended,
    /// In this state, with everything put back.
    As(RunState),
    /// Something could not be put back.
    Damaged(Failure),
}

/// What a machine is doing, for people and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Agreeing with the peer.
    Greeting,
    /// Getting both sides ready.
    Preparing,
    /// Copying RAM, or collecting what is dirty.
    Copying,
    /// Stopping the guest.
    Stopping,
    /// Sending the last pages and the device state.
    Draining,
    /// Waiting for the target to have loaded.
    Offering,
    /// Handing over.
    Giving,
    /// Handed over, waiting for the target's word.
    Given,
    /// Asking the target whose the guest is.
    Asking,
    /// Sending a guest that was handed over its pages.
    Serving,
    /// Cleaning up after the move.
    Leaving,
    /// Putting everything back.
    Undoing,
    /// Target: waiting for a source.
    Waiting,
    /// Target: receiving RAM.
    Receiving,
    /// Target: loading the device state.
    Loading,
    /// Target: loaded, waiting for Go.
    Offered,
    /// Target: taking the guest over.
    Taking,
    /// Target: has taken it.
    Taken,
    /// Target: refusing it.
    Refusing,
    /// Over.
    Ended,
}

impl Phase {
    /// Its name for programs: one word that never changes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Greeting => "greeting",
            Self::Preparing => "preparing",
            Self::Copying => "copying",
            Self::Stopping => "stopping",
            Self::Draining => "draining",
            Self::Offering => "offering",
            Self::Giving => "giving",
            Self::Given => "given",
            Self::Asking => "asking",
            Self::Serving => "serving",
            Self::Leaving => "leaving",
            Self::Undoing => "undoing",
            Self::Waiting => "waiting",
            Self::Receiving => "receiving",
            Self::Loading => "loading",
            Self::Offered => "offered",
            Self::Taking => "taking",
            Self::Taken => "taken",
            Self::Refusing => "refusing",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Greeting => "greeting",
            Self::Preparing => "preparing",
            Self::Copying => "copying RAM",
            Self::Stopping => "stopping the guest",
            Self::Draining => "sending the last pages",
            Self::Offering => "waiting for the target to load",
            Self::Giving => "handing over",
            Self::Given => "waiting for the target to run",
            Self::Asking => "asking the target who owns the guest",
            Self::Serving => "sending pages after the guest",
            Self::Leaving => "cleaning up",
            Self::Undoing => "putting everything back",
            Self::Waiting => "waiting for a source",
            Self::Receiving => "receiving RAM",
            Self::Loading => "loading the device state",
            Self::Offered => "waiting for the guest to be given",
            Self::Taking => "taking the guest",
            Self::Taken => "having taken the guest",
            Self::Refusing => "refusing the guest",
            Self::Ended => "being over",
        })
    }
}
