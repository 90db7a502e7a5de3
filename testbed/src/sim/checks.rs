//! What must hold, at every step and at the end.

use std::time::Duration;

use ferry_engine::core::layout::{PageRange, RegionIndex};
use ferry_engine::core::message::{Outcome, Phase, Reason, Record};
use ferry_engine::vmm::RunState;
use ferry_stream::message::Verdict;

use super::guest::Memory;
use super::plan::Side;

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// Both guests run.
    #[error("both guests run")]
    TwoRun,
    /// The source's guest runs after Go, without the target's word that it is the source's again.
    #[error("the source let its guest run after it had given it away")]
    SourceRanAfterGo,
    /// The target's guest runs and nobody said Go.
    #[error("the target let the guest run without being told Go")]
    RanWithoutGo,
    /// The target's guest runs and the journal does not say taken.
    #[error("the target let the guest run with {journal:?} in its journal")]
    RanBeforeTaken {
        /// What it says.
        journal: Option<Record>,
    },
    /// Go was said and the journal does not say given.
    #[error("Go was said with {journal:?} in the source's journal")]
    GoBeforeGiven {
        /// What it says.
        journal: Option<Record>,
    },
    /// A word about the owner that the target's journal does not say.
    #[error("the target said {said} with {journal:?} in its journal")]
    SaidBeforeWritten {
        /// What was said.
        said: &'static str,
        /// What the journal says.
        journal: Option<Record>,
    },
    /// An entry of a journal that must not follow the one before.
    #[error("the journal of the {side:?} was told {next:?} after {before:?}")]
    JournalOrder {
        /// Whose.
        side: Side,
        /// The entry before.
        before: Option<Record>,
        /// The entry.
        next: Record,
    },
    /// An order after the end.
    #[error("the {side:?} ordered {action} after its end")]
    OrderAfterEnd {
        /// Whose machine.
        side: Side,
        /// The order.
        action: String,
    },
    /// An end while something that it depends on is still being done.
    #[error("the {side:?} ended while it still had to finish {job}")]
    EndedEarly {
        /// Whose machine.
        side: Side,
        /// The job.
        job: String,
    },
    /// Nothing will ever happen again, or not within any bound.
    #[error("stuck: source {source_phase:?}, target {target_phase:?}")]
    Stuck {
        /// What the source is doing.
        source_phase: Phase,
        /// What the target is doing.
        target_phase: Phase,
    },
    /// RAM at the target is not what it was at the source.
    #[error("{count} pages differ when the guest is {when}, among them page {page} of {region}")]
    Pages {
        /// At which point.
        when: &'static str,
        /// How many.
        count: usize,
        /// The first one's region.
        region: RegionIndex,
        /// The first one.
        page: u64,
    },
    /// The device state at the target is not what it was at the source.
    #[error("device state {target} at the target, {source_state} at the source")]
    Device {
        /// What was last at the source.
        source_state: u64,
        /// What is at the target.
        target: u64,
    },
    /// A page was told by how it differs from something that the target does not have, and nothing had
    /// gone wrong.
    #[error("page {page} of {region} was told by how it differs from what is not there")]
    UnfitDelta {
        /// Its region.
        region: RegionIndex,
        /// Which.
        page: u64,
    },
    /// Pages of the last round may be told as deltas.
    #[error("there may be deltas in the last round")]
    DeltasInTheLastRound,
    /// Room was ordered for what is no guest RAM, or has room, or too late.
    #[error("room was ordered for {range} of {region}")]
    WildRoom {
        /// The region.
        region: RegionIndex,
        /// The pages.
        range: PageRange,
    },
    /// The guest is loaded while room for its pages is still being made.
    #[error("the load began while room for pages was being made")]
    RoomInLoad,
    /// A page was written into a guest that runs.
    #[error("a page was placed after the guest had run")]
    PlacedAfterRun,
    /// The two ends contradict each other.
    #[error("the source says {source_end}, the target {target_end}")]
    Contradiction {
        /// The source's outcome.
        source_end: String,
        /// The target's outcome.
        target_end: String,
    },
    /// In doubt, and yet the target could have been asked.
    #[error("in doubt, though the target could have been asked")]
    NeedlessDoubt,
    /// The guest was kept, and is not as it should be.
    #[error("the guest was kept and left {left}, wanted was {wanted}")]
    NotAsWanted {
        /// How it is.
        left: String,
        /// How it should be.
        wanted: String,
    },
    /// The guest was paused while it was slowed.
    #[error("the guest was paused while it lacked time")]
    PausedSlow,
    /// The guest was kept, and is slowed still.
    #[error("the guest was kept and lacks {percent} % of its time")]
    LeftSlow {
        /// How much of its time it lacks, in percent.
        percent: u8,
    },
    /// An order of a person's was not followed.
    #[error("a downtime limit of {wanted:?} was ordered, {holds:?} holds")]
    Disobeyed {
        /// What was ordered last.
        wanted: Duration,
        /// What holds.
        holds: Duration,
    },
    /// The source says of the guest that it was given away, or not, and that is not so.
    #[error("whether the guest was given away is told wrongly at the end: {told}")]
    GivenAwayWrongly {
        /// What is told.
        told: bool,
    },
    /// Something is left behind.
    #[error("left behind: {what}")]
    LeftBehind {
        /// What.
        what: &'static str,
    },
}

/// What the world knows and neither machine does: the oracle of the checks.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Default)]
pub(super) struct Truth {
    /// The guest as it was when Go was said.
    pub(super) given: Option<(Memory, u64)>,
    /// The target heard Go.
    pub(super) go_heard: bool,
    /// The source heard that the guest is its own again.
    pub(super) given_back: bool,
    /// A stranger changed the paused guest when nobody could know in time.
    pub(super) spoilt: bool,
    /// Something kept the two from talking, or the target from answering.
    pub(super) silenced: bool,
    /// The downtime limit that people want, as far as the source has heard.
    pub(super) downtime_limit: Option<Duration>,
    /// How people want the guest, as far as the source has heard.
    pub(super) wanted: Option<RunState>,
    /// Something happened to the source's guest that came too late for its machine.
    pub(super) late_fate: bool,
    /// The source has begun to put things back.
    pub(super) undoing: bool,
    /// The engine paused the guest while it was slow, and had not been told that it may be.
    pub(super) paused_slow: bool,
    /// The guest's time could not be given back, the last time that this was tried.
    pub(super) lift_failed: bool,
    /// Tracking could not be ended, or the VMM not: said aloud by the engine.
    pub(super) excused: bool,
}

/// The entries that may follow an entry: law 1, in a table.
pub(super) fn journal_may_follow(side: Side, before: Option<Record>, next: Record) -> bool {
    match side {
        Side::Source => matches!(
            (before, next),
            (None, Record::Migrating)
                | (Some(Record::Migrating), Record::Given | Record::Kept)
                | (Some(Record::Given), Record::Moved | Record::Kept)
        ),
        Side::Target => matches!(
            (before, next),
            (None, Record::Receiving)
                | (
                    Some(Record::Receiving),
                    Record::Taken | Record::Refused | Record::Returned
                )
                | (Some(Record::Taken), Record::Returned)
        ),
    }
}

/// The record that must be durable before a verdict is given.
pub(super) fn record_of(verdict: Verdict) -> Record {
    match verdict {
        Verdict::Taken => Record::Taken,
        Verdict::Refused => Record::Refused,
        Verdict::Returned => Record::Returned,
    }
}

/// Compares RAM page for page.
pub(super) fn same_pages(
    when: &'static str,
    source: &Memory,
    target: &Memory,
) -> Result<(), Violation> {
    let differing = source.differing(target);
    differing.first().map_or(Ok(()), |(region, page)| {
        Err(Violation::Pages {
            when,
            count: differing.len(),
            region: *region,
            page: *page,
        })
    })
}

/// How a side ended, without the reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ending {
    /// The guest has moved.
    Moved,
    /// It was kept.
    Kept,
    /// Nobody can say.
    InDoubt,
}

impl Ending {
    /// The ending of an outcome.
    pub fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Moved => Self::Moved,
            Outcome::Kept { .. } => Self::Kept,
            _ => Self::InDoubt,
        }
    }
}

/// True when the two outcomes can both be true.
pub(super) fn agree(source: Ending, target: Ending) -> bool {
    match source {
        Ending::Moved => target == Ending::Moved,
        Ending::Kept => target == Ending::Kept,
        Ending::InDoubt => true,
    }
}

/// Why a guest did not move, as one word.
pub(super) fn reason(outcome: &Outcome) -> Option<&'static str> {
    let (Outcome::Kept { reason, .. } | Outcome::InDoubt { reason }) = outcome else {
        return None;
    };
    Some(match reason {
        Reason::Cancelled => "cancelled",
        Reason::LinkLost { .. } => "link lost",
        Reason::PeerAborted { .. } => "peer aborted",
        Reason::Protocol { .. } => "protocol",
        Reason::Miscounted { .. } => "miscounted",
        Reason::InventoryChanged { .. } => "inventory changed",
        Reason::GuestGone { .. } => "guest gone",
        Reason::GuestShutDown => "guest shut down",
        Reason::GuestPanicked => "guest panicked",
        Reason::GuestIoError { .. } => "guest I/O error",
        Reason::ForeignResume => "foreign resume",
        Reason::NotConverging { .. } => "not converging",
        Reason::TimedOut { .. } => "timed out",
        Reason::Refused => "refused",
        Reason::Returned { .. } => "returned",
        Reason::Failed(_) => "failed",
        _ => "another",
    })
}
