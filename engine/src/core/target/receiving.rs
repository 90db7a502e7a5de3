//! RAM and device state come in. Nothing is owned here, and everything can still be refused.

use std::mem;

use ferry_stream::message::{Message, Round};

use super::ending::Parting;
use super::{Shared, State};
use crate::core::message::{Action, Input, Moment, Phase, Reason, Record};

#[derive(Default)]
pub(super) struct Preparing {
    journaled: bool,
    lanes_open: bool,
    prepared: bool,
}

impl Preparing {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Journaled(Record::Receiving) => self.journaled = true,
            Input::LanesOpen => self.lanes_open = true,
            Input::Prepared => self.prepared = true,
            input => return shared.unexpected(State::Preparing(self), &input),
        }
        if !(self.journaled && self.lanes_open && self.prepared) {
            return State::Preparing(self);
        }
        shared.deadline = None;
        shared.actions.push_back(Action::BeginLoad);
        shared.send(Message::Prepared);
        State::Receiving(Receiving {
            done: Round(0),
            ended_lanes: 0,
            pages: 0,
            total_pages: 0,
            complete: None,
        })
    }
}

/// RAM comes, round by round.
pub(super) struct Receiving {
    /// The round that is over.
    done: Round,
    /// Lanes whose end of the next round came.
    ended_lanes: u16,
    /// Pages of the next round on those lanes.
    pages: u64,
    /// Pages of all rounds that are over.
    total_pages: u64,
    /// What the source said of the end.
    complete: Option<Complete>,
}

#[derive(Clone, Copy)]
struct Complete {
    round: Round,
    pages: u64,
    state_bytes: u64,
    state_crc: u32,
}

impl Receiving {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::RoundEnded { round, pages } if round.0 == self.done.0 + 1 => {
                self.end_lane(shared, round, pages);
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
            Input::Received(Message::Paused) => {}
            Input::RoundEnded { .. } => {
                let what = "the end of another round";
                return shared.refuse(
                    Reason::Protocol {
                        what,
                        phase: Phase::Receiving,
                    },
                    Parting::Done,
                );
            }
            Input::Loaded => {
                let what = "device state that ends before it was complete";
                return shared.refuse(
                    Reason::Protocol {
                        what,
                        phase: Phase::Receiving,
                    },
                    Parting::Done,
                );
            }
            input => return shared.unexpected(State::Receiving(self), &input),
        }
        self.load_when_complete(shared)
    }

    fn end_lane(&mut self, shared: &mut Shared, round: Round, pages: u64) {
        self.ended_lanes += 1;
        self.pages = self.pages.saturating_add(pages);
        if self.ended_lanes < shared.lanes {
            return;
        }
        let pages = mem::take(&mut self.pages);
        self.ended_lanes = 0;
        self.done = round;
        self.total_pages = self.total_pages.saturating_add(pages);
        shared.send(Message::RoundDone { round, pages });
    }

    fn load_when_complete(self, shared: &mut Shared) -> State {
        let Some(complete) = self.complete.filter(|complete| complete.round <= self.done) else {
            return State::Receiving(self);
        };
        if complete.round != self.done || complete.pages != self.total_pages {
            let (ours, theirs) = (self.total_pages, complete.pages);
            let reason = Reason::Miscounted {
                round: self.done,
                ours,
                theirs,
            };
            return shared.refuse(reason, Parting::Done);
        }
        let (bytes, crc) = (complete.state_bytes, complete.state_crc);
        shared.actions.push_back(Action::ReleaseLoad { bytes, crc });
        State::Loading(shared.now)
    }
}

impl Shared {
    pub(super) fn offer(&mut self, loading: Moment) -> State {
        let load_us = self.since_us(loading);
        self.send(Message::Ready { load_us });
        self.bound(self.config.limits.offered);
        State::Offered
    }
}
