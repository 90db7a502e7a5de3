//! The vocabulary of the core: what the machines are told, what they order, and how it ends.
//!
//! [`Input`]s are facts, [`Action`]s are orders. An action that takes time is answered by exactly one
//! fact of its own, or by [`Input::Failed`] with its [`Step`].

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ferry_stream::message::{AbortCode, Message, Round, Run, Verdict};

use crate::core::layout::LayoutDifference;
use crate::core::pageset::PageSet;
use crate::vmm::{GuestEvent, Inventory, PauseFor, Rearm, RunState};

/// A moment, as the time since the migration began. The core has no clock: it is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub Duration);

impl Moment {
    /// The time that went by from `earlier` to this moment; zero when it is not earlier.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The moment `span` later.
    #[must_use]
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }
}

/// What the page lanes have done, of all lanes together since the migration began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneTotals {
    /// Pages told to the target, with their bytes or as zero.
    pub pages: u64,
    /// Pages found to be zero, told or, where the target has zeros anyway, not told.
    pub zero_pages: u64,
    /// Pages looked at and not told, because the target has them as zeros.
    pub skipped_pages: u64,
    /// Bytes written to the lanes, headers included.
    pub bytes: u64,
}

/// Whether zero pages must be told to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPages {
    /// No: the target has zeros there still.
    Skip,
    /// Yes: something else may have been sent before.
    Tell,
}

/// What the journal of a QEMU says. The journal outlives the engine; see
/// [`crate::journal`](crate::journal).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Source: a migration is under way; the guest is here.
    Migrating,
    /// Source: the guest is given away. Only the target can say whose it is.
    Given,
    /// Source: the target has it.
    Moved,
    /// Source: the guest is here, and nothing is under way.
    Kept,
    /// Target: a migration is under way; the guest is at the source.
    Receiving,
    /// Target: the guest is here.
    Taken,
    /// Target: the guest is not here and never was; a Go that still comes is void.
    Refused,
    /// Target: the guest was taken, could not be resumed, and is the source's again.
    Returned,
}

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
        })
    }
}

/// What a person may order while a migration runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// Give up; the guest stays where it is. Too late once it was given away.
    Cancel,
    /// Another downtime limit.
    SetDowntimeLimit(Duration),
    /// Pause the guest now and finish without it running.
    Suspend,
}

/// A fact for a machine.
#[derive(Debug)]
#[non_exhaustive]
pub enum Input {
    /// A message came on the control lane.
    Received(Message),
    /// The control lane, or every page lane, is gone.
    LinkLost {
        /// How that showed.
        what: String,
    },
    /// All page lanes stand.
    LanesOpen,
    /// Source: tracking is on, and these pages may hold something else than zeros.
    Tracking {
        /// Read after tracking began.
        populated: PageSet,
    },
    /// Source: the device state can be saved.
    StateOpen,
    /// Source: what the lanes have done so far.
    Sent(LaneTotals),
    /// Source: every lane has sent its end of the round.
    RoundSent {
        /// The round.
        round: Round,
        /// What the lanes have done up to that point.
        totals: LaneTotals,
    },
    /// Source: these pages were written since they were last reported.
    Collected {
        /// The set that came with the order, filled.
        found: PageSet,
    },
    /// Source: disk images are flushed.
    Flushed,
    /// Source: the guest is paused and its I/O has landed.
    Paused {
        /// The moment from which no vCPU ran.
        at: Moment,
    },
    /// Source: the inventory, read again.
    Inventoried(Box<Inventory>),
    /// Source: the device state is saved and on the control lane.
    Saved {
        /// Its length in bytes.
        bytes: u64,
        /// Its CRC32.
        crc: u32,
    },
    /// Source: everything is as it was before, or as near as it could be brought.
    Undone(Result<RunState, Failure>),
    /// Source: the VMM has ended, or is left stopped as ordered.
    Retired,
    /// Source: tracking is off.
    TrackingStopped,
    /// Source: the target's answer to who owns the guest; `None` when it could not be asked.
    Answered(Option<Verdict>),
    /// Target: RAM is blank and the VMM is ready to load.
    Prepared,
    /// Target: a lane's end of a round came, with everything before it in place.
    RoundEnded {
        /// The round.
        round: Round,
        /// Pages that came on the lane in it.
        pages: u64,
    },
    /// Target: the device state is loaded, the guest complete and paused.
    Loaded,
    /// Target: the guest runs.
    Resumed,
    /// Target: the guest could not be resumed.
    NotResumed {
        /// Whether it may have run all the same.
        ran: MayHaveRun,
        /// Why.
        failure: Failure,
    },
    /// Target: the VMM has ended.
    Quit,
    /// Target: somebody asks who owns the guest.
    Inquired(Inquirer),
    /// The journal says so, and will after a crash.
    Journaled(Record),
    /// Something happened to the guest.
    Guest(GuestEvent),
    /// A person's order.
    Command(Command),
    /// An action failed.
    Failed(Failure),
}

/// Whether a guest may have executed an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayHaveRun {
    /// Certainly not.
    No,
    /// It cannot be told.
    Perhaps,
}

/// A connection on which somebody asked who owns the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Inquirer(pub u64);

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

/// An order to a driver.
#[derive(Debug)]
#[non_exhaustive]
pub enum Action {
    /// Send a message on the control lane.
    Send(Message),
    /// Source: open page lanes. Answered by [`Input::LanesOpen`].
    OpenLanes {
        /// How many.
        lanes: u16,
    },
    /// Source: begin to track, then list what is populated. Answered by [`Input::Tracking`].
    StartTracking {
        /// An empty set to fill.
        into: PageSet,
    },
    /// Source: get ready to save. Answered by [`Input::StateOpen`].
    OpenState,
    /// Source: collect what was written. Answered by [`Input::Collected`].
    Collect {
        /// Whether to watch the pages again.
        rearm: Rearm,
        /// An empty set to fill.
        into: PageSet,
    },
    /// Source: send these pages and end the round on every lane. Answered by [`Input::RoundSent`].
    Copy {
        /// The round.
        round: Round,
        /// What to send.
        pages: Arc<PageSet>,
        /// Whether zeros must be told.
        zeros: ZeroPages,
    },
    /// Source: flush disk images. Answered by [`Input::Flushed`].
    Flush,
    /// Source: pause the guest. Answered by [`Input::Paused`].
    Pause(PauseFor),
    /// Source: read the inventory again. Answered by [`Input::Inventoried`].
    Inventory,
    /// Source: save the device state onto the control lane. Answered by [`Input::Saved`].
    Save,
    /// Source: connect anew and ask who owns the guest. Answered by [`Input::Answered`].
    Ask,
    /// Source: undo save and open, resume the guest if so ordered, restore every setting. Answered by
    /// [`Input::Undone`].
    Undo {
        /// In which state the guest shall be.
        guest: RunState,
    },
    /// Source: the guest has moved: end the VMM, or leave it stopped. Answered by
    /// [`Input::Retired`].
    Retire,
    /// Source: end tracking. Answered by [`Input::TrackingStopped`].
    StopTracking,
    /// Close every page lane.
    CloseLanes,
    /// Target: blank RAM and get ready to load. Answered by [`Input::Prepared`].
    Prepare,
    /// Target: begin to load what comes early, and hold the rest back. Answered by
    /// [`Input::Loaded`], after [`Action::ReleaseLoad`].
    BeginLoad,
    /// Target: RAM is complete: load the rest.
    ReleaseLoad {
        /// Length of the whole device state in bytes.
        bytes: u64,
        /// Its CRC32.
        crc: u32,
    },
    /// Target: resume the guest. Answered by [`Input::Resumed`] or [`Input::NotResumed`].
    Resume,
    /// Target: end the VMM, which does not own the guest. Answered by [`Input::Quit`].
    Quit,
    /// Target: answer an inquirer.
    Answer {
        /// Whom.
        to: Inquirer,
        /// What.
        verdict: Verdict,
    },
    /// Write the journal, durably. Answered by [`Input::Journaled`].
    Journal(Record),
    /// Tell the user.
    Tell(Notice),
    /// It is over.
    Finish(Outcome),
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

/// Why a migration ended otherwise than as moved.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// Somebody asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The link is gone.
    #[error("the link to the peer was lost: {what}")]
    LinkLost {
        /// How that showed.
        what: String,
    },
    /// The peer gave up.
    #[error("the peer gave up ({code:?}): {text}")]
    PeerAborted {
        /// Its code.
        code: AbortCode,
        /// Its words.
        text: String,
    },
    /// The peer said something that must not come now.
    #[error("the peer sent {what}, which must not come while {phase}")]
    Protocol {
        /// What it sent.
        what: &'static str,
        /// What was going on.
        phase: Phase,
    },
    /// The peer's count of pages is not ours.
    #[error("{round}: {ours} pages by our count, {theirs} by the peer's")]
    Miscounted {
        /// The round.
        round: Round,
        /// Our count.
        ours: u64,
        /// Theirs.
        theirs: u64,
    },
    /// No wire version in common.
    #[error("the peer speaks wire versions {lowest} to {highest}, we speak other ones")]
    Version {
        /// Its lowest.
        lowest: u16,
        /// Its highest.
        highest: u16,
    },
    /// Architecture or machine type differ.
    #[error(
        "the source has {ours_or_source}, the target {theirs_or_target}: start the target with the same machine type"
    )]
    Machine {
        /// At the source.
        ours_or_source: String,
        /// At the target.
        theirs_or_target: String,
    },
    /// The RAM layouts differ.
    #[error("RAM differs: {}", list(.0))]
    Layout(Vec<LayoutDifference>),
    /// A region list that is no layout.
    #[error("the peer's RAM layout is impossible")]
    BadLayout(#[source] crate::core::layout::LayoutError),
    /// A device, or RAM, was plugged or unplugged during the move.
    #[error("the guest's hardware changed during the move: {what}")]
    InventoryChanged {
        /// What is different.
        what: String,
    },
    /// The guest is gone, or its VMM.
    #[error("the guest is gone: {what}")]
    GuestGone {
        /// How that showed.
        what: String,
    },
    /// The guest turned itself off.
    #[error("the guest shut down during the move")]
    GuestShutDown,
    /// The guest panicked.
    #[error("the guest panicked during the move")]
    GuestPanicked,
    /// The VMM paused the guest because of an I/O error.
    #[error("an I/O error of {device:?} paused the guest: mend the disk and resume it")]
    GuestIoError {
        /// The device.
        device: String,
    },
    /// Somebody resumed the guest while it was being handed over.
    #[error("somebody else resumed the guest during the switchover")]
    ForeignResume,
    /// The rounds do not shrink.
    #[error(
        "not converging: stopping now would take {predicted_ms} ms, the limit is {limit_ms} ms \
         (dirty {dirty_bytes_per_s} B/s, link {link_bytes_per_s} B/s): raise --max-downtime, \
         use --timeout, or move it without --live"
    )]
    NotConverging {
        /// The blackout that stopping now would cost, in ms.
        predicted_ms: u64,
        /// The limit in ms.
        limit_ms: u64,
        /// What the guest dirties, in bytes a second.
        dirty_bytes_per_s: u64,
        /// What the link carries, in bytes a second.
        link_bytes_per_s: u64,
    },
    /// Something took too long.
    #[error("{phase} took longer than {limit_ms} ms")]
    TimedOut {
        /// What.
        phase: Phase,
        /// The bound in milliseconds.
        limit_ms: u64,
    },
    /// Target: the source asked whose the guest is, and so gave up this attempt.
    #[error("the source asked who owns the guest before it was taken")]
    Asked,
    /// The target, asked, said that it never took the guest.
    #[error("the target did not take the guest")]
    Refused,
    /// The target took the guest and could not resume it.
    #[error("the target could not resume the guest and gave it back: {text}")]
    Returned {
        /// Its words.
        text: String,
    },
    /// An action failed.
    #[error(transparent)]
    Failed(Failure),
}

fn list(differences: &[LayoutDifference]) -> String {
    let lines: Vec<String> = differences.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

impl Reason {
    /// The code that tells a peer.
    pub fn abort_code(&self) -> AbortCode {
        match self {
            Self::Cancelled => AbortCode::Cancelled,
            Self::Protocol { .. } | Self::Miscounted { .. } | Self::BadLayout(_) => {
                AbortCode::Protocol
            }
            Self::Version { .. } => AbortCode::Version,
            Self::Machine { .. } => AbortCode::Machine,
            Self::Layout(_) | Self::InventoryChanged { .. } => AbortCode::Layout,
            Self::GuestGone { .. } | Self::GuestShutDown | Self::GuestPanicked => {
                AbortCode::GuestGone
            }
            Self::TimedOut { .. } => AbortCode::Timeout,
            Self::LinkLost { .. } | Self::PeerAborted { .. } => AbortCode::Internal,
            _ => AbortCode::Vmm,
        }
    }
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

/// In which state the target shall leave a guest.
pub fn run_order(state: RunState) -> Run {
    match state {
        RunState::Running => Run::Run,
        RunState::Paused => Run::StayPaused,
    }
}
