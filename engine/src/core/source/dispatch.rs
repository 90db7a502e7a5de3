//! Which state hears of what: facts that mean the same in every state are taken here, the others are
//! the state's own.

use ferry_stream::message::Message;

use super::{Flush, Link, Shared, State};
use crate::core::layout::{PageNumber, RegionIndex};
use crate::core::message::{Failure, Input, Reason, Record, Step};

impl Shared {
    pub(super) fn dispatch(&mut self, state: State, input: Input) -> State {
        match input {
            Input::Received(Message::Ping) => state,
            Input::Received(Message::Abort { code, text }) => {
                self.link = Link::Down;
                state.trouble(self, Reason::PeerAborted { code, text })
            }
            Input::LinkLost { what } => {
                self.link = Link::Down;
                state.trouble(self, Reason::LinkLost { what })
            }
            Input::Received(Message::LaneLost { lane, text }) => self.lane_lost(state, lane, text),
            Input::LaneLost { lane, what } => self.lane_lost(state, lane, what),
            Input::LaneOpen(lane) => self.lane_open(state, lane),
            Input::LaneUnopened { lane, failure } => self.lane_unopened(state, lane, failure),
            Input::Received(Message::Fenced {
                lane,
                frames,
                pages,
            }) if state.needs_lanes() => self.lane_fenced(state, lane, frames, pages),
            Input::Reclaimed { lane, from } => self.lane_reclaimed(state, lane, from),
            Input::Received(Message::Mismatch {
                lane,
                round,
                region,
                page,
            }) => {
                let place = (RegionIndex(region), PageNumber(page));
                self.mismatched(state, lane, round, place)
            }
            Input::Populated(pages) => {
                self.tell_ahead(&pages);
                state
            }
            Input::LaneSent {
                lane,
                round,
                pages,
                totals,
            } => {
                self.meter.sent(totals);
                self.lanes.sent(lane, round, pages);
                state.moved(self)
            }
            Input::Failed(failure) if failure.step == Step::Journal => {
                self.unwritten(state, failure)
            }
            Input::Throttled(percent) => {
                self.throttled(percent);
                state
            }
            Input::Failed(failure) if failure.step == Step::Throttle => {
                self.not_throttled(state, &failure)
            }
            Input::Failed(failure) => state.trouble(self, Reason::Failed(failure)),
            Input::Guest(event) => self.guest_event(state, event),
            Input::Command(command) => self.command(state, command),
            Input::Sent(totals) => {
                let before = (self.meter.bytes_wire(), self.meter.open_pages());
                self.meter.sent(totals);
                // What lanes carry that wait for a scan says nothing about the link.
                if matches!(&state, State::Copying(copying) if copying.is_known()) {
                    self.grow();
                    self.peek();
                }
                // Pages that move are no standstill, however slow the link. A live copy that stands
                // still is bounded as well: it may be a suspended one a moment later.
                let moves = (self.meter.bytes_wire(), self.meter.open_pages()) != before;
                let is_sending = match &state {
                    State::Copying(_) | State::Draining(_) => true,
                    State::Offering(offering) => offering.is_sending(),
                    _ => false,
                };
                if let (true, true, Some((_, limit))) = (moves, is_sending, self.deadline) {
                    self.bound(limit);
                }
                state
            }
            Input::Whole => self.whole(state),
            Input::Peeked(pages) => {
                self.peeked(&state, pages);
                state
            }
            Input::Flushed => {
                self.flush = Flush::None;
                state.go_on(self)
            }
            Input::Paused { at, .. } if state.is_copying() => {
                self.hold(at);
                state.go_on(self)
            }
            Input::Journaled(record) => {
                if self.journaling.front() == Some(&record) {
                    self.journaling.pop_front();
                }
                self.step(state, Input::Journaled(record))
            }
            input => self.step(state, input),
        }
    }

    /// A record could not be written. One that was ordered before the state changed means nothing any
    /// more.
    fn unwritten(&mut self, state: State, failure: Failure) -> State {
        let record = self.journaling.pop_front();
        match (state, record) {
            (State::Leaving(leaving), Some(Record::Moved)) => leaving.unwritten(self, &failure),
            (State::Undoing(undoing), Some(Record::Kept)) => undoing.unwritten(self, &failure),
            (state @ (State::Leaving(_) | State::Undoing(_)), _) => state,
            (state, _) => state.trouble(self, Reason::Failed(failure)),
        }
    }

    fn step(&mut self, state: State, input: Input) -> State {
        match state {
            State::Greeting => self.greeted(input),
            State::Preparing(preparing) => preparing.handle(self, input),
            State::Holding(holding) => holding.handle(self, input),
            State::Copying(copying) => copying.handle(self, input),
            State::Collecting(collecting) => collecting.handle(self, input),
            State::CutShort => self.cut_short(input),
            State::Surveying => self.surveyed(input),
            State::Announcing(missing) => self.announced(missing, input),
            State::Switching(switching) => switching.handle(self, input),
            State::Stopping(stopping) => stopping.handle(self, input),
            State::Draining(draining) => draining.handle(self, input),
            State::Offering(offering) => offering.handle(self, input),
            State::Giving(giving) => giving.handle(self, &input),
            State::Given(given) => given.handle(self, input),
            State::Asking(asking) => asking.handle(self, input),
            State::Serving => self.unexpected(State::Serving, &input),
            State::Leaving(leaving) => leaving.handle(self, &input),
            State::Undoing(undoing) => undoing.handle(self, input),
            State::Ended => State::Ended,
        }
    }

    /// What an unexpected input means: a message at the wrong time is the peer's fault, a fact that
    /// comes late (its order was given before the state changed) means nothing.
    pub(super) fn unexpected(&mut self, state: State, input: &Input) -> State {
        match input {
            Input::Received(message) => {
                let reason = Reason::Protocol {
                    what: message.name(),
                    phase: state.phase(),
                };
                state.trouble(self, reason)
            }
            _ => state,
        }
    }
}
