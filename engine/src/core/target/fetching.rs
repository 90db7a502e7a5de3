//! Post-copy at the target: the guest is taken without all of its pages, and they are fetched.
//!
//! ```text
//!  Receiving ─Absent, Complete─► Arming ─► Loading ─► … ─► Taken ─Whole─► Disarm ─► the end
//! ```
//!
//! Armed before anything is loaded: from then on whoever wants a missing page waits for it, and is
//! never given another one. The target stays until every page is there, whatever becomes of the link.

use ferry_stream::message::{Absence, Features, Message};

use super::ending::Parting;
use super::receiving::{Complete, Receiving};
use super::{Shared, State};
use crate::core::message::{Action, Input, Phase, Reason};
use crate::core::pageset::PageSet;
use crate::core::postcopy::absence;

/// How far the pages are that the guest is taken without.
#[derive(Debug, Default)]
pub(super) enum Fetch {
    /// There are none.
    #[default]
    Nothing,
    /// They are being told.
    Told {
        /// All of them.
        missing: PageSet,
        /// Those that are to be discarded next.
        due: PageSet,
    },
    /// They are fetched.
    UnderWay,
    /// All are there, and whether that is known to whoever waits.
    Whole(Disarm),
}

/// How far the end of waiting is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disarm {
    Due,
    Ordered,
    Done,
}

impl Fetch {
    /// True when nothing is left to do.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Nothing | Self::Whole(Disarm::Done))
    }

    /// True as long as pages are missing.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self, Self::UnderWay)
    }
}

/// Faults are being armed.
pub(super) struct Arming {
    complete: Complete,
}

impl Shared {
    /// Pages that the guest is to be taken without.
    pub(super) fn absent(&mut self, receiving: Receiving, absence: &Absence) -> State {
        let state = State::Receiving(receiving);
        if !self.features.contains(Features::POSTCOPY) {
            let message = Message::Absent(absence.clone());
            return self.unexpected(state, &Input::Received(message));
        }
        let layout = &self.inventory.layout;
        if let Fetch::Nothing = self.fetch {
            let (missing, due) = (PageSet::empty(layout), PageSet::empty(layout));
            self.fetch = Fetch::Told { missing, due };
        }
        let Fetch::Told { missing, due } = &mut self.fetch else {
            return state;
        };
        let noted = absence::insert(missing, absence).and_then(|()| absence::insert(due, absence));
        if noted.is_ok() {
            return state;
        }
        let what = "pages outside guest RAM as absent";
        let phase = Phase::Receiving;
        self.refuse(Reason::Protocol { what, phase }, Parting::Done)
    }

    /// What is known to be missing is discarded before the guest stands.
    pub(super) fn discard(&mut self, receiving: Receiving) -> State {
        let state = State::Receiving(receiving);
        let Fetch::Told { due, .. } = &mut self.fetch else {
            return self.unexpected(state, &Input::Received(Message::Discard));
        };
        let nothing = PageSet::empty(&self.inventory.layout);
        let pages = std::mem::replace(due, nothing);
        self.actions.push_back(Action::Discard { pages });
        state
    }

    /// Everything came that comes before the load.
    pub(super) fn arm_or_load(&mut self, complete: Complete) -> State {
        match std::mem::take(&mut self.fetch) {
            Fetch::Told { missing, .. } if !missing.is_empty() => {
                self.fetch = Fetch::UnderWay;
                self.end_allocating();
                self.actions.push_back(Action::Arm { missing });
                State::Arming(Arming { complete })
            }
            _ => self.load(complete),
        }
    }

    fn load(&mut self, complete: Complete) -> State {
        let (bytes, crc) = (complete.state_bytes, complete.state_crc);
        self.actions.push_back(Action::ReleaseLoad { bytes, crc });
        State::Loading(self.now)
    }

    /// Every page is there: perhaps before the guest is ours.
    pub(super) fn whole(&mut self, state: State) -> State {
        if self.fetch.is_under_way() {
            self.fetch = Fetch::Whole(Disarm::Due);
            // So long the source has to hear of it: its lanes may be dead at this moment.
            if self.deadline.is_some() {
                self.bound(self.config.limits.linger);
            }
        }
        match state {
            State::Taken(taken) => taken.advance(self),
            state => state,
        }
    }

    /// Most likely the source knows; else it is here again in no time.
    pub(super) fn source_left(&mut self, state: State) -> State {
        if matches!(state, State::Taken(_)) && self.deadline.is_some() {
            self.bound(self.config.limits.parting);
        }
        state
    }

    /// Ends the waiting, once.
    pub(super) fn disarm_when_whole(&mut self) {
        if matches!(self.fetch, Fetch::Whole(Disarm::Due)) {
            self.fetch = Fetch::Whole(Disarm::Ordered);
            self.actions.push_back(Action::Disarm);
        }
    }

    pub(super) fn disarmed(&mut self, state: State) -> State {
        if matches!(self.fetch, Fetch::Whole(_)) {
            self.fetch = Fetch::Whole(Disarm::Done);
        }
        match state {
            State::Taken(taken) => taken.advance(self),
            state => state,
        }
    }
}

impl Arming {
    pub(super) fn handle(self, shared: &mut Shared, input: &Input) -> State {
        match input {
            Input::Armed => shared.load(self.complete),
            input => shared.unexpected(State::Arming(self), input),
        }
    }
}
