//! Deliberate defects. A checker that cannot fail proves nothing, so each of these must be noticed.

/// A defect of the world around the machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The tracker forgets a page that was written.
    ForgottenPage,
    /// Some writes bypass the page tables that the tracker watches.
    UnseenWrite,
    /// The last collection is from before the device state was saved.
    EarlyLastCollection,
    /// The target's RAM is full of somebody else's past.
    TargetNotBlank,
    /// Zeros are never told, as if every round were the first.
    ZerosSkipped,
    /// A lane tells its end of a round before its pages are in place.
    EndBeforePages,
    /// A pause says that the guest stands, and it runs.
    PauseInName,
    /// The source's journal says "given" before it is durable.
    GivenInName,
    /// The target's journal says "taken" before it is durable.
    TakenInName,
    /// The target resumes the guest as soon as it is loaded.
    RunUntold,
    /// The target believes to have heard Go.
    ImaginedGo,
    /// The source resumes the guest when the link is lost after Go.
    RunAgain,
    /// A fact never reaches its machine.
    LostFact,
    /// The source leaves its page lanes and its tracking as they are.
    LeftBehind,
    /// The target says that a lane is fenced, and its worker is still at it.
    FencedInName,
    /// What a dead lane took first and did not bring is forgotten.
    ForgottenChunk,
    /// A page that is left out because it was written again is not collected again.
    LeftOutForGood,
    /// The target claims a frame of a dead lane that it did not place.
    FramesClaimed,
    /// What was sent over a lane that died is still relied on.
    BasesKept,
    /// The target leaves a page as it is whose delta does not fit, and says nothing.
    MismatchUntold,
    /// A lane that finds nothing ends the round, though the scan goes on.
    EndBeforeScan,
    /// Pages are read before writes to them are reported.
    ReadBeforeWatched,
    /// The guest is said to have all of its time, and has not.
    LiftInName,
    /// A guest that is slow is left so where everything else is put back.
    LeftSlow,
    /// Pages are read before the scan gets to them, with those that are dirty anyway.
    ReadBeforeScanned,
}

impl Flaw {
    /// Every flaw.
    pub const ALL: [Self; 25] = [
        Self::ForgottenPage,
        Self::UnseenWrite,
        Self::EarlyLastCollection,
        Self::TargetNotBlank,
        Self::ZerosSkipped,
        Self::EndBeforePages,
        Self::PauseInName,
        Self::GivenInName,
        Self::TakenInName,
        Self::RunUntold,
        Self::ImaginedGo,
        Self::RunAgain,
        Self::LostFact,
        Self::LeftBehind,
        Self::FencedInName,
        Self::ForgottenChunk,
        Self::LeftOutForGood,
        Self::FramesClaimed,
        Self::BasesKept,
        Self::MismatchUntold,
        Self::EndBeforeScan,
        Self::ReadBeforeWatched,
        Self::ReadBeforeScanned,
        Self::LiftInName,
        Self::LeftSlow,
    ];
}
