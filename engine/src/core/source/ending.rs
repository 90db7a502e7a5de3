//! The two ways out: the guest has moved, or everything is put back.

use ferry_stream::message::Message;

use super::{Hardware, Link, Shared, State};
use crate::core::message::{
    Action, Failure, GuestLeft, Input, Notice, Outcome, Reason, Record, Step,
};

/// The guest runs at the target. What is left here is cleaned up.
#[derive(Default)]
pub(super) struct Leaving {
    journaled: bool,
    retired: bool,
    tracking_stopped: bool,
}

impl Shared {
    /// The guest runs at the target and has all of its pages.
    pub(super) fn depart(&mut self) -> State {
        self.send(Message::Finished);
        self.journal(Record::Moved);
        self.bound(self.config.limits.settling);
        State::Leaving(Leaving::default())
    }

    /// The guest has had its first moments at the target to itself.
    pub(super) fn clear_away(&mut self) {
        self.actions.push_back(Action::CloseLanes);
        self.actions.push_back(Action::StopTracking);
    }
}

impl Leaving {
    pub(super) fn handle(mut self, shared: &mut Shared, input: &Input) -> State {
        match input {
            Input::Journaled(Record::Moved) => self.journaled = true,
            Input::Retired => self.retired = true,
            Input::TrackingStopped => self.tracking_stopped(shared),
            // Nothing that comes late can change where the guest is.
            _ => {}
        }
        self.advance(shared)
    }

    /// Whatever fails now is left over, and told; the guest has moved.
    pub(super) fn trouble(mut self, shared: &mut Shared, reason: &Reason) -> State {
        let Reason::Failed(failure) = reason else {
            return State::Leaving(self);
        };
        match failure.step {
            Step::Retire => self.retired = true,
            Step::StopTracking => self.tracking_stopped(shared),
            _ => return State::Leaving(self),
        }
        shared.tell_leftover(failure);
        self.advance(shared)
    }

    /// Only then may the VMM end: tracking is taken down inside its process.
    fn tracking_stopped(&mut self, shared: &mut Shared) {
        if !self.tracking_stopped {
            self.tracking_stopped = true;
            shared.actions.push_back(Action::Retire);
        }
    }

    pub(super) fn unwritten(mut self, shared: &mut Shared, failure: &Failure) -> State {
        shared.tell_leftover(failure);
        self.journaled = true;
        self.advance(shared)
    }

    fn advance(self, shared: &mut Shared) -> State {
        if self.journaled && self.retired && self.tracking_stopped {
            return shared.finish(Outcome::Moved);
        }
        State::Leaving(self)
    }
}

/// The guest stays. The VMM is put back as it was.
pub(super) struct Undoing {
    reason: Reason,
    undone: Option<GuestLeft>,
    tracking_stopped: bool,
    why: Why,
    keeping: bool,
}

/// Whether the reason is known in full.
#[derive(PartialEq, Eq)]
enum Why {
    Known,
    /// A device that was plugged makes the target's load fail, and the target's word for that explains
    /// nothing: the hardware is being read, once the guest runs again.
    HardwareRead,
}

/// A target that gave up may have closed the link before its word was read.
fn blames_the_peer(reason: &Reason) -> bool {
    matches!(reason, Reason::PeerAborted { .. } | Reason::LinkLost { .. })
}

impl Shared {
    pub(super) fn undo(&mut self, reason: Reason) -> State {
        let reason = reason.or_death();
        self.given_away = false;
        self.unbound();
        self.timeout = None;
        self.send(reason.abort());
        self.link = Link::Down;
        self.lift_throttle();
        self.actions.push_back(Action::Undo { guest: self.wanted });
        let why = if self.hardware == Hardware::Due && blames_the_peer(&reason) {
            self.read_hardware();
            Why::HardwareRead
        } else {
            Why::Known
        };
        self.actions.push_back(Action::CloseLanes);
        self.actions.push_back(Action::StopTracking);
        State::Undoing(Undoing {
            reason,
            undone: None,
            tracking_stopped: false,
            why,
            keeping: false,
        })
    }

    fn tell_leftover(&mut self, failure: &Failure) {
        self.tell(Notice::Leftover(format!("{failure}: {}", failure.source)));
    }
}

impl Undoing {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Undone(result) => {
                self.undone = Some(result.map_or_else(GuestLeft::Damaged, GuestLeft::As));
            }
            Input::TrackingStopped => self.tracking_stopped = true,
            Input::Inventoried(now) => {
                self.why = Why::Known;
                let changed = shared.compare(&now);
                self.reason = match changed {
                    Some(changed) if blames_the_peer(&self.reason) => changed,
                    _ => self.reason,
                };
            }
            Input::Journaled(Record::Kept) if self.keeping => return self.finish(shared),
            // Late facts of orders given before.
            _ => return State::Undoing(self),
        }
        self.advance(shared)
    }

    pub(super) fn trouble(mut self, shared: &mut Shared, reason: &Reason) -> State {
        let Reason::Failed(failure) = reason else {
            return State::Undoing(self);
        };
        match failure.step {
            Step::StopTracking => {
                shared.tell_leftover(failure);
                self.tracking_stopped = true;
                self.advance(shared)
            }
            Step::Undo => {
                self.undone = Some(GuestLeft::Damaged(failure.clone()));
                self.advance(shared)
            }
            Step::Inventory => {
                self.why = Why::Known;
                self.advance(shared)
            }
            // Orders given before that fail because everything is being taken down.
            _ => State::Undoing(self),
        }
    }

    pub(super) fn unwritten(self, shared: &mut Shared, failure: &Failure) -> State {
        shared.tell_leftover(failure);
        self.finish(shared)
    }

    fn advance(mut self, shared: &mut Shared) -> State {
        let is_put_back = self.undone.is_some() && self.tracking_stopped;
        if is_put_back && self.why == Why::Known && !self.keeping {
            self.keeping = true;
            shared.journal(Record::Kept);
        }
        State::Undoing(self)
    }

    fn finish(self, shared: &mut Shared) -> State {
        let guest = self.undone.unwrap_or(GuestLeft::Untouched);
        shared.finish(Outcome::Kept {
            reason: self.reason,
            guest,
        })
    }
}
