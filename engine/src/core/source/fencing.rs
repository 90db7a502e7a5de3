//! What becomes of a lane's fate: opened, lost, fenced, reclaimed, and opened again.
//!
//! None of it is trouble as long as one lane stands. The round goes on over the others; what a dead
//! lane owes goes with the next one.

use ferry_stream::message::{LaneId, Message};

use super::lanes::Said;
use super::{Shared, State};
use crate::core::growth::Advice;
use crate::core::message::{Action, Failure, Moment, Notice, Reason, Reclaimed};
use crate::core::outcome::in_full;
use crate::core::pageset::PageSet;

impl Shared {
    /// Opens as many lanes as the plan begins with.
    pub(super) fn open_first_lanes(&mut self) {
        for _ in 0..self.config.lanes.first().get() {
            self.open_another_lane();
        }
    }

    fn open_another_lane(&mut self) {
        let lane = self.lanes.open_another();
        self.actions.extend(lane.map(Action::OpenLane));
    }

    /// Opens one more when the last one has paid.
    pub(super) fn grow(&mut self) {
        let (now, lanes, totals) = (self.now, self.lanes.up(), self.meter.totals());
        let growth = self.growth.as_mut();
        let advice = growth.map(|growth| growth.sent(now, totals, lanes));
        if advice == Some(Advice::Grow) {
            self.open_another_lane();
        }
    }

    /// Opens again what is due.
    pub(super) fn reopen_lanes(&mut self) {
        while let Some(lane) = self.lanes.reopen(self.now) {
            self.actions.push_back(Action::OpenLane(lane));
        }
    }

    /// Gives up lanes that are still being opened: a hello that hangs must not hold up a guest that
    /// stands.
    pub(super) fn abandon_opening_lanes(&mut self) {
        for lane in self.lanes.opening() {
            self.fence(lane, Said::Nothing);
        }
        if self.lanes.all_gone() && self.lanes.last_word_at().is_none() {
            let what = "no page lane stands".to_owned();
            let at = self.now.after(self.config.limits.last_word);
            self.lanes.await_last_word(at, Reason::LinkLost { what });
        }
    }

    pub(super) fn lane_open(&mut self, state: State, lane: LaneId) -> State {
        if !state.needs_lanes() || !self.lanes.opened(lane) {
            return state;
        }
        self.actions.push_back(Action::JoinLane(lane));
        state.moved(self)
    }

    pub(super) fn lane_unopened(&mut self, state: State, lane: LaneId, failure: Failure) -> State {
        if !state.needs_lanes() || !self.fence(lane, state.said()) {
            return state;
        }
        let what = in_full(&failure);
        self.missing(lane, what, Reason::Failed(failure));
        state.moved(self)
    }

    /// A lane is dead, as one side has noticed; the other may say so as well.
    pub(super) fn lane_lost(&mut self, state: State, lane: LaneId, what: String) -> State {
        if !state.needs_lanes() || !self.fence(lane, state.said()) {
            return state;
        }
        let reason = Reason::LinkLost {
            what: format!("page {lane}: {what}"),
        };
        self.missing(lane, what, reason);
        state.moved(self)
    }

    /// A lane is missing; with the last one the move ends for this reason. A peer that gives up says
    /// why on the control lane, and the two race.
    fn missing(&mut self, lane: LaneId, what: String, reason: Reason) {
        if self.lanes.all_gone() {
            let at = self.now.after(self.config.limits.last_word);
            self.lanes.await_last_word(at, reason);
        } else {
            self.tell(Notice::LaneLost { lane, what });
        }
    }

    /// Ends a lane at both sides. False when it is being ended.
    fn fence(&mut self, lane: LaneId, said: Said) -> bool {
        let alive = self.lanes.lose(lane, said);
        if alive {
            self.actions.push_back(Action::CutLane(lane));
            self.send(Message::Fence(lane));
        }
        alive
    }

    pub(super) fn lane_fenced(
        &mut self,
        mut state: State,
        lane: LaneId,
        frames: u64,
        pages: u64,
    ) -> State {
        let Some(said) = self.lanes.fenced(lane, pages) else {
            let reason = Reason::Protocol {
                what: "Fenced",
                phase: state.phase(),
            };
            return state.trouble(self, reason);
        };
        if let (Said::Complete, State::Offering(offering)) = (said, &mut state) {
            offering.fenced();
        }
        let into = self.blank_set();
        self.actions
            .push_back(Action::Reclaim { lane, frames, into });
        state
    }

    pub(super) fn lane_reclaimed(&mut self, state: State, lane: LaneId, from: Reclaimed) -> State {
        let Some(theirs) = self.lanes.counted(lane).filter(|_| state.needs_lanes()) else {
            return state;
        };
        if from.since_end != theirs {
            let (round, ours) = (from.round, from.since_end);
            let reason = Reason::Miscounted {
                round,
                ours,
                theirs,
            };
            return state.trouble(self, reason);
        }
        let wait = self.config.limits.redial;
        self.lanes.reclaimed(lane, from, self.now, wait);
        state.moved(self)
    }

    /// Adds what dead lanes owe to pages that go next.
    pub(super) fn add_owed(&mut self, pages: &mut PageSet) {
        if let Some(owed) = self.lanes.take_owed() {
            pages.union(&owed);
        }
    }
}

impl State {
    /// When the lanes want to be looked after, if nothing happens before.
    pub(super) fn lanes_due(&self, shared: &Shared) -> Option<Moment> {
        let reopens = shared.lanes.reopens_at().filter(|_| self.is_copying());
        let last_word = shared.lanes.last_word_at().filter(|_| self.needs_lanes());
        [reopens, last_word].into_iter().flatten().min()
    }

    /// Time has passed for the lanes.
    pub(super) fn look_after_lanes(self, shared: &mut Shared) -> Self {
        if self.is_copying() && shared.lanes.last_word_at().is_none() {
            shared.reopen_lanes();
        }
        match shared.lanes.unexplained(shared.now) {
            Some(reason) if self.needs_lanes() => self.trouble(shared, reason),
            _ => self,
        }
    }

    /// True as long as pages are to be sent, or may be on their way. The death of a lane is no news
    /// afterwards.
    pub(super) fn needs_lanes(&self) -> bool {
        match self {
            Self::Preparing(_)
            | Self::Holding(_)
            | Self::Copying(_)
            | Self::Collecting(_)
            | Self::CutShort
            | Self::Surveying
            | Self::Announcing(_)
            | Self::Stopping(_)
            | Self::Draining(_)
            | Self::Switching(_) => true,
            Self::Offering(offering) => offering.is_sending(),
            _ => false,
        }
    }

    fn said(&self) -> Said {
        match self {
            Self::Offering(_) => Said::Complete,
            _ => Said::Nothing,
        }
    }

    /// A lane has moved on, and perhaps the round with it.
    pub(super) fn moved(self, shared: &mut Shared) -> Self {
        match self {
            Self::Preparing(preparing) => preparing.advance(shared),
            Self::Copying(copying) => copying.advance(shared),
            Self::Draining(draining) => draining.moved(shared),
            Self::Switching(switching) => switching.advance(shared),
            Self::Offering(offering) => offering.moved(shared),
            state => state,
        }
    }
}
