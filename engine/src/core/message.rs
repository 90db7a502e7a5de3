//! The vocabulary of the core: what the machines are told, what they order.
//!
//! [`Input`]s are facts, [`Action`]s are orders. An action that takes time is answered by exactly one
//! fact of its own, or by [`Input::Failed`] with its [`Step`]. How it ends is [`Outcome`]'s.

use std::sync::Arc;
use std::time::Duration;

use ferry_stream::message::{LaneId, Message, Round, Run, Verdict};

use crate::core::layout::{PAGE_SIZE, PageNumber, PageRange, RegionIndex};
pub use crate::core::outcome::{Failure, GuestLeft, Notice, Outcome, Phase, Reason, Step};
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
    /// Pages left out, because the guest had written them again before their turn came.
    pub fresh_pages: u64,
    /// Bytes that pages told as deltas were shorter by.
    pub saved_bytes: u64,
    /// Bytes written to the lanes, headers included.
    pub bytes: u64,
    /// Time that lanes waited for the bandwidth that was asked for.
    pub waited: Duration,
}

impl LaneTotals {
    /// Bytes of the pages that were told with their bytes, before packing.
    ///
    /// A page told as a delta counts by its delta. It says nothing of how fast others travel, and
    /// what is predicted of the blackout must hold for pages of which nothing was kept.
    pub fn data_bytes(&self) -> u64 {
        let zeros_told = self.zero_pages.saturating_sub(self.skipped_pages);
        let whole = self.pages.saturating_sub(zeros_told) * PAGE_SIZE as u64;
        whole.saturating_sub(self.saved_bytes)
    }

    /// Pages that were looked at, told or not.
    pub fn dealt(&self) -> u64 {
        self.pages + self.skipped_pages + self.fresh_pages
    }
}

/// What a dead lane brought and did not bring, by the source's log of it.
#[derive(Debug)]
pub struct Reclaimed {
    /// The last round that the lane took part in; 0 for none.
    pub round: Round,
    /// Pages of that round which are in place.
    pub placed: u64,
    /// Those of them that came after the lane's last end of a round.
    pub since_end: u64,
    /// Pages that were taken for the lane and are not in place.
    pub found: PageSet,
}

impl Reclaimed {
    /// Of a lane that took nothing.
    pub fn nothing(found: PageSet) -> Self {
        Self {
            round: Round(0),
            placed: 0,
            since_end: 0,
            found,
        }
    }
}

/// How much has come on a page lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneSeen {
    /// The lane.
    pub lane: LaneId,
    /// Bytes that were read from it since it began.
    pub bytes: u64,
}

/// Which pages a round sends.
#[derive(Clone, Debug)]
pub enum Pages {
    /// These.
    Known(Arc<PageSet>),
    /// What a scan hands on while the round is under way: of [`Action::StartTracking`] or
    /// [`Action::Scan`], whichever was ordered last. The round ends after the scan.
    Scanned,
}

/// What a scan has handed on to its round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HandedOn {
    /// Pages, each counted once.
    pub pages: u64,
    /// How long the lanes of the round waited for pages, on average.
    pub starved: Duration,
}

/// Whether zero pages must be told to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPages {
    /// No: the target has zeros there still.
    Skip,
    /// Yes: something else may have been sent before.
    Tell,
}

/// What becomes of pages that the guest has written again before their turn comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rewritten {
    /// They may be left out: a collection follows, which reports them.
    LeaveOut,
    /// They are sent: nothing is collected for them any more, or the guest stands.
    Send,
}

/// Whether pages of a round may be told by how they differ from what was sent of them before.
///
/// Rounds are barriers: what a round has sent is in place when it is done, and may be relied on from
/// the next one on. What lanes that have died since did not bring is no such thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deltas {
    /// No. What was kept of earlier rounds is forgotten.
    Off,
    /// Not in this round: what was kept is forgotten, and what is sent now may be kept for later ones.
    Anew,
    /// From what was kept of earlier rounds.
    On,
}

/// Whether the bandwidth limit holds for a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Yes.
    Limited,
    /// No: the guest stands, and is handed over.
    Free,
}

/// What the journal of a QEMU says. The journal outlives the engine; see
/// [`crate::journal`].
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
    /// Hand the guest over now, before its pages.
    Postcopy,
}

/// A fact for a machine.
#[derive(Debug)]
#[non_exhaustive]
pub enum Input {
    /// A message came on the control lane.
    Received(Message),
    /// The control lane is gone.
    LinkLost {
        /// How that showed.
        what: String,
    },
    /// Source: the target has welcomed a page lane.
    LaneOpen(LaneId),
    /// Source: a page lane could not be opened.
    LaneUnopened {
        /// Which.
        lane: LaneId,
        /// Why.
        failure: Failure,
    },
    /// A page lane is dead.
    LaneLost {
        /// Which.
        lane: LaneId,
        /// How that showed.
        what: String,
    },
    /// Source: these pages may hold something else than zeros. Comes before [`Input::Tracking`].
    Populated(PageSet),
    /// Source: tracking is on, and every page that may hold something else than zeros was handed on.
    Tracking(HandedOn),
    /// Source: the device state can be saved.
    StateOpen,
    /// Source: what the lanes have done so far.
    Sent(LaneTotals),
    /// Source: a lane has sent its end of a round.
    LaneSent {
        /// Which.
        lane: LaneId,
        /// The round.
        round: Round,
        /// Pages that it sent in it.
        pages: u64,
        /// What all lanes have done up to that point.
        totals: LaneTotals,
    },
    /// Source: what a dead lane brought and did not bring.
    Reclaimed {
        /// Which.
        lane: LaneId,
        /// By the source's log of it.
        from: Reclaimed,
    },
    /// Source: these pages were written since they were last reported.
    Collected {
        /// The set that came with the order, filled.
        found: PageSet,
    },
    /// Source: a scan has ended, and what it found was handed on.
    Scanned(HandedOn),
    /// Source: pages of a round that was cut short, which no lane has taken.
    Left {
        /// The set that came with the order, filled.
        left: PageSet,
    },
    /// Source: the target has every page. Target: every page is in place.
    Whole,
    /// Target: every page was in place, and by now no fetch lane stands. A source that has not heard of it
    /// comes again.
    SourceLeft,
    /// Target: what was to be discarded is.
    Discarded,
    /// Target: what is missing holds nothing, and whoever wants it waits.
    Armed,
    /// Target: nobody waits for pages any more, and nothing is left of it.
    Disarmed,
    /// Source: so many pages were written since they were last reported.
    Peeked(u64),
    /// Source: disk images are flushed.
    Flushed,
    /// Source: the guest is slowed by so much of its time, in percent.
    Throttled(u8),
    /// Source: the guest is paused and its I/O has landed.
    Paused {
        /// The moment from which no vCPU ran.
        at: Moment,
        /// The moment from which all I/O had landed.
        drained: Moment,
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
    /// Target: the VMM is ready to load.
    Prepared,
    /// Target: a lane's end of a round came, with everything before it in place.
    RoundEnded {
        /// Which.
        lane: LaneId,
        /// The round.
        round: Round,
        /// Pages that came on the lane in it.
        pages: u64,
        /// Frames of the lane up to and with this end.
        frames: u64,
    },
    /// Target: a delta was not from what stands in its page, which is as it was. Told when the frame
    /// is in place, before the end of the lane's round.
    Mismatched {
        /// The lane on which it came.
        lane: LaneId,
        /// The round in which it came.
        round: Round,
        /// The page's region.
        region: RegionIndex,
        /// The page.
        page: PageNumber,
    },
    /// Target: a lane's worker has ended, and writes nothing any more.
    LaneEnded {
        /// Which.
        lane: LaneId,
        /// Whole frames that came, checked and in place.
        frames: u64,
        /// Pages of them since the lane's last end of a round.
        pages: u64,
    },
    /// Target: how much has come on each lane.
    LanesSeen(Vec<LaneSeen>),
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
    /// Target: every setting is as it was before.
    Restored,
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

/// An order to a driver.
#[derive(Debug)]
#[non_exhaustive]
pub enum Action {
    /// Send a message on the control lane.
    Send(Message),
    /// Source: open a page lane. Answered by [`Input::LaneOpen`] or [`Input::LaneUnopened`].
    OpenLane(LaneId),
    /// Source: give an open lane its part in the open round and in those that follow.
    JoinLane(LaneId),
    /// Source: close a lane, or stop opening it. Its worker ends by itself.
    CutLane(LaneId),
    /// Source: wait until a lane that was cut has ended, and find out what is not in place of what it
    /// took. Answered by [`Input::Reclaimed`].
    Reclaim {
        /// Which.
        lane: LaneId,
        /// Frames of it that are in place: those before this sequence number.
        frames: u64,
        /// An empty set to fill.
        into: PageSet,
    },
    /// Source: begin to track, part after part, and hand on what is populated in each: never before
    /// writes to it are reported. Answered by [`Input::Tracking`].
    StartTracking {
        /// An empty set to fill.
        into: PageSet,
    },
    /// Source: get ready to save. Answered by [`Input::StateOpen`].
    OpenState,
    /// Source: collect what was written, and watch it again. Answered by [`Input::Collected`].
    Collect {
        /// An empty set to fill.
        into: PageSet,
    },
    /// Source: collect what was written, and hand it on to the round that is ordered next, part after
    /// part. Answered by [`Input::Scanned`].
    Scan {
        /// Whether to watch the pages again.
        rearm: Rearm,
        /// Pages that are dirty anyway. They go as well, each with its part: what is read before its
        /// part is scanned may be written again, and a page travels once in a round.
        with: PageSet,
    },
    /// Source: send pages and end the round on every lane that has joined. Answered by an
    /// [`Input::LaneSent`] of each.
    Copy {
        /// The round.
        round: Round,
        /// What to send.
        pages: Pages,
        /// Whether zeros must be told.
        zeros: ZeroPages,
        /// Whether pages may be left out.
        rewritten: Rewritten,
        /// Whether pages may be told as deltas.
        deltas: Deltas,
        /// Whether the bandwidth limit holds.
        pace: Pace,
    },
    /// Source: look how much was written since it was last reported, while a round is under way. Answered by
    /// [`Input::Peeked`], if it can be told.
    Peek,
    /// Source: let no lane take more of the open round, which ends with what was taken.
    CutShort,
    /// Source: take back what no lane has taken of the last round. Answered by [`Input::Left`].
    TakeLeft {
        /// An empty set to fill.
        into: PageSet,
    },
    /// Source: collect what was written, with the guest standing for good. Answered by
    /// [`Input::Collected`].
    CollectLast {
        /// An empty set to fill.
        into: PageSet,
    },
    /// Source: find what may hold anything but zeros, without tracking. Answered by
    /// [`Input::Collected`].
    Survey {
        /// Pages that are known to.
        known: PageSet,
        /// An empty set to fill, with others.
        into: PageSet,
    },
    /// Source: serve these pages on the fetch lanes, for as long as it takes. [`Input::Whole`] follows
    /// when the target has them all.
    Serve {
        /// All of them.
        missing: PageSet,
        /// Those that go before the others.
        first: PageSet,
    },
    /// Source: flush disk images. Answered by [`Input::Flushed`].
    Flush,
    /// Source: leave the guest all but this much of its time, in percent; 0 gives all of it back. Ordered
    /// before a pause, too: a vCPU that waits for its time may hold up the VMM. Answered by
    /// [`Input::Throttled`].
    Throttle(u8),
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
    /// Source: whatever is sent from now on waits for no bandwidth limit: the guest stands.
    Unpace,
    /// Source: the bandwidth limit holds again: the guest runs.
    Pace,
    /// Source: end tracking. Answered by [`Input::TrackingStopped`].
    StopTracking,
    /// Close every page lane.
    CloseLanes,
    /// Target: end a lane's worker and wait for it. Answered by [`Input::LaneEnded`].
    EndLane(LaneId),
    /// Target: look how much has come on each lane. Answered by [`Input::LanesSeen`].
    LookAtLanes,
    /// Target: make room for these pages ahead of their coming, as far as nobody else wants the
    /// processors. None is named twice. Not answered.
    Allocate(Vec<(RegionIndex, PageRange)>),
    /// Target: make no more room ahead.
    EndAllocating,
    /// Target: get ready to load. Answered by [`Input::Prepared`].
    Prepare,
    /// Target: discard these pages, which no lane writes any more; nothing is loaded yet. Answered by
    /// [`Input::Discarded`].
    Discard {
        /// What will be missing.
        pages: PageSet,
    },
    /// Target: no precopy lane writes any more: discard these pages, have whoever wants one wait for it,
    /// and fetch them. Answered by [`Input::Armed`]; [`Input::Whole`] follows when all have come.
    Arm {
        /// What the guest does without.
        missing: PageSet,
    },
    /// Target: every page is there: nobody is to wait any more. Answered by [`Input::Disarmed`].
    Disarm,
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
    /// Target: the guest is ours: put back every setting. Answered by [`Input::Restored`].
    Restore,
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

/// In which state the target shall leave a guest.
pub fn run_order(state: RunState) -> Run {
    match state {
        RunState::Running => Run::Run,
        RunState::Paused => Run::StayPaused,
    }
}
