//! Pages told by how they differ from what was sent of them before: in which rounds, and what becomes
//! of one that does not fit.
//!
//! A base is what a round sent that is done: the target has said that all of it is in place. Once a
//! lane has died that is not so of what it took, and which of the kept pages those are nobody notes:
//! all are forgotten. There is no base in the first round, and none is kept of it: a page that is sent
//! once says nothing of being sent again.
//!
//! A delta that does not fit never happens, unless something is wrong with what was kept. The page is
//! owed then, and no delta is told any more. So the last round must have none: nothing follows it.

use std::mem;

use ferry_stream::message::{Features, LaneId, Message, Round};

use super::{Shared, State};
use crate::core::layout::{PageNumber, PageRange, RegionIndex};
use crate::core::message::{Deltas, Input, Notice};

/// The first round of which something is kept.
const FIRST_KEPT: u32 = 2;

/// What may be relied on to be in place.
pub(super) struct Bases {
    /// How the round at work was ordered.
    ordered: Deltas,
    /// Lanes that had died by then.
    died: u32,
    trust: Trust,
}

#[derive(PartialEq, Eq)]
enum Trust {
    Whole,
    /// A delta did not fit.
    Broken,
}

impl Default for Bases {
    fn default() -> Self {
        Self {
            ordered: Deltas::Off,
            died: 0,
            trust: Trust::Whole,
        }
    }
}

impl Shared {
    /// For the round that comes next, which is not the last.
    pub(super) fn next_deltas(&mut self) -> Deltas {
        let died = self.lanes.died();
        let has_died = mem::replace(&mut self.bases.died, died) != died;
        let is_agreed = self.features.contains(Features::DELTA);
        let is_kept = self.round.0 + 1 >= FIRST_KEPT;
        self.bases.ordered = if !is_agreed || !is_kept || self.bases.trust == Trust::Broken {
            Deltas::Off
        } else if has_died {
            Deltas::Anew
        } else {
            Deltas::On
        };
        self.bases.ordered
    }

    /// For the last round.
    pub(super) fn no_deltas(&mut self) -> Deltas {
        self.bases.ordered = Deltas::Off;
        self.bases.ordered
    }

    /// The target says that a delta does not fit. It can say so only of the open round, before that is
    /// done, and only where deltas were told.
    pub(super) fn mismatched(
        &mut self,
        state: State,
        lane: LaneId,
        round: Round,
        (region, page): (RegionIndex, PageNumber),
    ) -> State {
        let is_due =
            state.awaits_round() && round == self.round && self.bases.ordered == Deltas::On;
        let mut owed = self.lanes.take_owed().unwrap_or_else(|| self.blank_set());
        let is_ours = is_due && owed.insert(region, PageRange::new(page.0, 1)).is_ok();
        self.lanes.owe(owed);
        if !is_ours {
            let message = Message::Mismatch {
                lane,
                round,
                region: region.0,
                page: page.0,
            };
            return self.unexpected(state, &Input::Received(message));
        }
        if mem::replace(&mut self.bases.trust, Trust::Broken) == Trust::Whole {
            self.tell(Notice::Mismatch { lane, region, page });
        }
        state
    }
}

impl State {
    /// True while pages are on their way that the target has not acknowledged.
    fn awaits_round(&self) -> bool {
        match self {
            Self::Copying(copying) => copying.awaits_round(),
            Self::Draining(draining) => draining.awaits_round(),
            _ => false,
        }
    }
}
