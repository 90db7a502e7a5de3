//! RAM and device state come in. Nothing is owned here, and everything can still be refused.

use ferry_stream::limits::MAX_BASES;
use ferry_stream::message::{LaneId, Message, Round};

use super::ending::Parting;
use super::lanes::Fence;
use super::{Shared, State};
use crate::core::message::{Action, Input, LaneSeen, Moment, Phase, Reason, Record};

#[derive(Default)]
pub(super) struct Preparing {
    journaled: bool,
    prepared: bool,
}

impl Preparing {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Journaled(Record::Receiving) => self.journaled = true,
            Input::Prepared => self.prepared = true,
            input => return shared.unexpected(State::Preparing(self), &input),
        }
        if !(self.journaled && self.prepared) {
            return State::Preparing(self);
        }
        shared.deadline = None;
        shared.actions.push_back(Action::BeginLoad);
        shared.send(Message::Prepared);
        State::Receiving(Receiving { complete: None })
    }
}

/// RAM comes, round by round.
pub(super) struct Receiving {
    /// What the source said of the end.
    complete: Option<Complete>,
}

#[derive(Clone, Copy)]
pub(super) struct Complete {
    round: Round,
    pages: u64,
    pub(super) state_bytes: u64,
    pub(super) state_crc: u32,
}

impl Receiving {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::RoundEnded {
                lane,
                round,
                pages,
                frames,
            } => {
                if let Err(reason) = shared.lanes.end_round(lane, round, pages, frames) {
                    return shared.refuse(reason, Parting::Done);
                }
            }
            Input::Received(Message::Complete {
                round,
                pages,
                state_bytes,
                state_crc,
            }) if self.complete.is_none() => {
                self.complete = Some(Complete {
                    round,
                    pages,
                    state_bytes,
                    state_crc,
                });
            }
            Input::Received(Message::Absent(absence)) if self.complete.is_none() => {
                return shared.absent(self, &absence);
            }
            Input::Received(Message::Discard) if self.complete.is_none() => {
                return shared.discard(self);
            }
            Input::Discarded => {
                shared.send(Message::Discarded);
                return State::Receiving(self);
            }
            Input::Received(Message::Paused) => {}
            Input::Loaded => {
                let what = "device state that ends before it was complete";
                let phase = Phase::Receiving;
                return shared.refuse(Reason::Protocol { what, phase }, Parting::Done);
            }
            input => return shared.unexpected(State::Receiving(self), &input),
        }
        self.advance(shared)
    }

    /// What was said of the end was said before a lane died.
    fn void(&mut self) {
        self.complete = None;
    }

    fn advance(self, shared: &mut Shared) -> State {
        if let Some((round, pages)) = shared.lanes.finish_round() {
            shared.send(Message::RoundDone { round, pages });
            shared.end_allocating();
        }
        shared.watch_lanes();
        self.load_when_complete(shared)
    }

    fn load_when_complete(self, shared: &mut Shared) -> State {
        let (done, ours) = shared.lanes.total();
        let Some(complete) = self.complete.filter(|complete| complete.round <= done) else {
            return State::Receiving(self);
        };
        if shared.mismatches.count > 0 && shared.mismatches.latest >= complete.round {
            let what = "a last round in which a delta does not fit";
            let phase = Phase::Receiving;
            return shared.refuse(Reason::Protocol { what, phase }, Parting::Done);
        }
        if complete.round != done || complete.pages != ours {
            let reason = Reason::Miscounted {
                round: done,
                ours,
                theirs: complete.pages,
            };
            return shared.refuse(reason, Parting::Done);
        }
        shared.arm_or_load(complete)
    }
}

/// Deltas that did not fit.
#[derive(Default)]
pub(super) struct Mismatches {
    count: u32,
    /// The last round with one. Its pages are whole only after a later one.
    latest: Round,
}

impl Shared {
    /// A delta does not fit: its page is to be sent again. What a source can make us say is bounded.
    pub(super) fn mismatched(&mut self, state: State, round: Round, message: Message) -> State {
        if !state.takes_pages() {
            return state;
        }
        self.mismatches.count += 1;
        if self.mismatches.count > MAX_BASES {
            let what = "more deltas that do not fit than it has pages to tell them from";
            let phase = state.phase();
            return state.trouble(self, Reason::Protocol { what, phase });
        }
        self.mismatches.latest = self.mismatches.latest.max(round);
        self.send(message);
        state
    }
}

impl Shared {
    pub(super) fn offer(&mut self, loading: Moment) -> State {
        let load_us = self.since_us(loading);
        self.send(Message::Ready { load_us });
        self.bound(self.config.limits.offered);
        State::Offered
    }

    fn watch_lanes(&mut self) {
        self.lanes.watch(self.now, self.config.limits.lane_silence);
    }

    /// A lane is dead here. The source may not see that, and it is the one to act.
    pub(super) fn lane_lost(&mut self, state: State, lane: LaneId, what: String) -> State {
        if state.takes_pages() && self.lanes.lose(lane) {
            self.send(Message::LaneLost { lane, text: what });
        }
        state
    }

    pub(super) fn fence(&mut self, mut state: State, lane: LaneId) -> State {
        let found = match &mut state {
            State::Preparing(_) => self.lanes.fence(lane),
            State::Receiving(receiving) => {
                receiving.void();
                self.lanes.fence(lane)
            }
            State::Arming(_) | State::Loading(_) | State::Offered => self.lanes.fence_late(lane),
            _ => return self.unexpected(state, &Input::Received(Message::Fence(lane))),
        };
        match found {
            Some(Fence::Worker) => self.actions.push_back(Action::EndLane(lane)),
            Some(Fence::Answer { frames }) => self.fenced(lane, frames, 0),
            None => return self.unexpected(state, &Input::Received(Message::Fence(lane))),
        }
        state
    }

    /// A lane's worker has ended. Its word comes before that of the round, which it may have held up.
    pub(super) fn lane_ended(
        &mut self,
        state: State,
        lane: LaneId,
        frames: u64,
        pages: u64,
    ) -> State {
        if !state.takes_pages() || !self.lanes.ended(lane, pages) {
            return state;
        }
        self.fenced(lane, frames, pages);
        match state {
            State::Receiving(receiving) => receiving.advance(self),
            state => state,
        }
    }

    fn fenced(&mut self, lane: LaneId, frames: u64, pages: u64) {
        self.send(Message::Fenced {
            lane,
            frames,
            pages,
        });
    }

    /// Tells the source of lanes on which nothing comes, though the others have ended the round.
    pub(super) fn lanes_seen(&mut self, state: State, looked: &[LaneSeen]) -> State {
        if !matches!(state, State::Receiving(_)) {
            return state;
        }
        let silence = self.config.limits.lane_silence;
        for lane in self.lanes.silent(self.now, silence, looked) {
            if self.lanes.lose(lane) {
                let ms = silence.as_millis();
                let text = format!("nothing came for {ms} ms after other lanes ended the round");
                self.send(Message::LaneLost { lane, text });
            }
        }
        self.watch_lanes();
        state
    }
}

impl State {
    /// True as long as pages may come.
    pub(super) fn takes_pages(&self) -> bool {
        matches!(self, Self::Preparing(_) | Self::Receiving(_))
    }
}
