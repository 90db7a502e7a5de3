//! The page lanes as the source sees them: which stand, which are dead, and what the dead ones owe.
//!
//! ```text
//!           OpenLane            LaneOpen: JoinLane
//! Closed ─────────────► Opening ─────────────► Up
//!    ▲                     │                    │ LaneLost, from either side
//!    │                     │ LaneUnopened       │
//!    │ Reclaimed           ▼                    ▼      CutLane, Fence is sent
//!    └─────── Reclaiming ◄───────── Fencing ◄───┘
//!               Reclaim    Fenced
//! ```
//!
//! A lane that was opened in vain is fenced as well: the target may have heard its hello, and would
//! wait for its end of the round.

use std::time::Duration;

use ferry_stream::message::{LaneId, LaneIndex, Round};

use crate::core::message::{Moment, Reason, Reclaimed};
use crate::core::pageset::PageSet;

/// How often the wait before a lane is opened again doubles.
const MOST_DOUBLINGS: u32 = 5;

/// Every lane of a migration, and the sum of the open round.
#[derive(Default)]
pub(super) struct Lanes {
    slots: Vec<Slot>,
    round: Round,
    /// Pages of the open round that came on lanes that are dead by now.
    by_the_dead: u64,
    owed: Option<PageSet>,
    lost: u32,
    /// Of those, lanes that stood.
    died: u32,
    /// The most lanes that stood at one time.
    most: u16,
    /// When the loss of the last lane ends the move, and for which reason.
    last_word: Option<(Moment, Reason)>,
}

struct Slot {
    lane: LaneId,
    state: Lane,
    losses: u32,
}

enum Lane {
    /// Not open, and when it is to be opened again, if at all.
    Closed {
        again: Option<Moment>,
    },
    Opening,
    Up {
        /// The last round that it has sent its end of.
        ended: Round,
        /// Pages that it brought in the open round, once it has ended that.
        pages: u64,
    },
    /// The target is ending it.
    Fencing(Said),
    /// What it did not bring is being found out.
    Reclaiming {
        /// Pages that the target counts since the lane's last end of a round.
        counted: u64,
    },
}

/// Whether the target had been told what will be complete when a lane was fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    Nothing,
    Complete,
}

impl Lanes {
    /// None open of `most` that there may be.
    pub(super) fn none_of(most: u16) -> Self {
        let slot = |index| Slot {
            lane: LaneId::first(LaneIndex(index)),
            state: Lane::Closed { again: None },
            losses: 0,
        };
        Self {
            slots: (1..=most).map(slot).collect(),
            ..Self::default()
        }
    }

    /// One more, if there may be one.
    pub(super) fn open_another(&mut self) -> Option<LaneId> {
        let unused = |slot: &&mut Slot| {
            slot.losses == 0 && matches!(slot.state, Lane::Closed { again: None })
        };
        let slot = self.slots.iter_mut().find(unused)?;
        slot.state = Lane::Opening;
        Some(slot.lane)
    }

    /// A lane that is due to be opened again.
    pub(super) fn reopen(&mut self, now: Moment) -> Option<LaneId> {
        let due =
            |slot: &&mut Slot| matches!(slot.state, Lane::Closed { again: Some(at) } if at <= now);
        let slot = self.slots.iter_mut().find(due)?;
        slot.state = Lane::Opening;
        Some(slot.lane)
    }

    /// When the next is due.
    pub(super) fn reopens_at(&self) -> Option<Moment> {
        let due = self.slots.iter().filter_map(|slot| match slot.state {
            Lane::Closed { again } => again,
            _ => None,
        });
        due.min().filter(|_| self.last_word.is_none())
    }

    /// Lanes that stand.
    pub(super) fn up(&self) -> u16 {
        let up = self
            .slots
            .iter()
            .filter(|slot| matches!(slot.state, Lane::Up { .. }));
        u16::try_from(up.count()).unwrap_or(u16::MAX)
    }

    /// The most that stood at one time.
    pub(super) fn most(&self) -> u16 {
        self.most
    }

    /// How many died.
    pub(super) fn lost(&self) -> u32 {
        self.lost
    }

    /// Lanes that have died and stood before: they may have taken pages and not brought them.
    pub(super) fn died(&self) -> u32 {
        self.died
    }

    /// Lanes that are being opened.
    pub(super) fn opening(&self) -> Vec<LaneId> {
        let opening = self
            .slots
            .iter()
            .filter(|slot| matches!(slot.state, Lane::Opening));
        opening.map(|slot| slot.lane).collect()
    }

    /// The lane's place, while this connection is the one in it.
    fn slot(&mut self, lane: LaneId) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.lane == lane)
    }

    /// The target has welcomed a lane. False for one that is not wanted any more.
    pub(super) fn opened(&mut self, lane: LaneId) -> bool {
        let Some(slot) = self
            .slot(lane)
            .filter(|slot| matches!(slot.state, Lane::Opening))
        else {
            return false;
        };
        slot.state = Lane::Up {
            ended: Round(0),
            pages: 0,
        };
        self.last_word = None;
        self.most = self.most.max(self.up());
        true
    }

    /// A lane is dead, or was opened in vain. False when that was known.
    pub(super) fn lose(&mut self, lane: LaneId, said: Said) -> bool {
        let alive = |slot: &&mut Slot| matches!(slot.state, Lane::Opening | Lane::Up { .. });
        let Some(slot) = self.slot(lane).filter(alive) else {
            return false;
        };
        // What never stood has carried nothing.
        let stood = matches!(slot.state, Lane::Up { .. });
        slot.state = Lane::Fencing(said);
        slot.losses += 1;
        self.lost += 1;
        self.died += u32::from(stood);
        true
    }

    /// True when no lane stands and none is about to.
    pub(super) fn all_gone(&self) -> bool {
        let alive = |slot: &Slot| matches!(slot.state, Lane::Opening | Lane::Up { .. });
        !self.slots.iter().any(alive)
    }

    /// The move ends at `at` for this reason, unless the peer gives one before.
    pub(super) fn await_last_word(&mut self, at: Moment, reason: Reason) {
        self.last_word = Some((at, reason));
    }

    /// Until when the peer's reason is waited for.
    pub(super) fn last_word_at(&self) -> Option<Moment> {
        self.last_word.as_ref().map(|(at, _)| *at)
    }

    /// The reason, when the peer has given none in time.
    pub(super) fn unexplained(&mut self, now: Moment) -> Option<Reason> {
        let over = self.last_word.take_if(|(at, _)| *at <= now)?;
        Some(over.1)
    }

    /// The target has ended a lane that was to be. None for another.
    pub(super) fn fenced(&mut self, lane: LaneId, counted: u64) -> Option<Said> {
        let slot = self.slot(lane)?;
        let Lane::Fencing(said) = slot.state else {
            return None;
        };
        slot.state = Lane::Reclaiming { counted };
        Some(said)
    }

    /// What the target counts on a lane that is being reclaimed.
    pub(super) fn counted(&self, lane: LaneId) -> Option<u64> {
        let slot = self.slots.iter().find(|slot| slot.lane == lane)?;
        match slot.state {
            Lane::Reclaiming { counted } => Some(counted),
            _ => None,
        }
    }

    /// Everything is known of a dead lane. Its place is free again after `wait`, doubled with each
    /// loss.
    pub(super) fn reclaimed(&mut self, lane: LaneId, from: Reclaimed, now: Moment, wait: Duration) {
        if from.round == self.round {
            self.by_the_dead += from.placed;
        }
        self.owe(from.found);
        let Some(slot) = self.slot(lane) else { return };
        let doublings = slot.losses.saturating_sub(1).min(MOST_DOUBLINGS);
        let wait = wait * (1 << doublings);
        let next = slot.lane.successor();
        slot.state = Lane::Closed {
            again: next.map(|_| now.after(wait)),
        };
        slot.lane = next.unwrap_or(slot.lane);
    }

    /// These pages have to be sent again.
    pub(super) fn owe(&mut self, pages: PageSet) {
        match &mut self.owed {
            _ if pages.is_empty() => {}
            Some(owed) => owed.union(&pages),
            owed @ None => *owed = Some(pages),
        }
    }

    /// Takes what has to be sent again.
    pub(super) fn take_owed(&mut self) -> Option<PageSet> {
        self.owed.take()
    }

    /// A round begins.
    pub(super) fn begin(&mut self, round: Round) {
        self.round = round;
        self.by_the_dead = 0;
        for slot in &mut self.slots {
            if let Lane::Up { pages, .. } = &mut slot.state {
                *pages = 0;
            }
        }
    }

    /// A lane has sent its end of a round.
    pub(super) fn sent(&mut self, lane: LaneId, round: Round, count: u64) {
        if let Some(Slot {
            state: Lane::Up { ended, pages },
            ..
        }) = self.slot(lane)
        {
            *ended = round;
            *pages = count;
        }
    }

    /// Pages of the open round that all lanes together have sent and dead ones have brought; none
    /// as long as one is at it, or its fate is open.
    pub(super) fn sum(&self) -> Option<u64> {
        self.slots
            .iter()
            .try_fold(self.by_the_dead, |sum, slot| match slot.state {
                Lane::Up { ended, pages } if ended == self.round => Some(sum + pages),
                Lane::Closed { .. } | Lane::Opening => Some(sum),
                Lane::Up { .. } | Lane::Fencing(_) | Lane::Reclaiming { .. } => None,
            })
    }
}
