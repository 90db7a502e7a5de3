//! From Go to the end: taken for good, refused, or given back. What is answered is in the journal
//! first.

use std::mem;

use ferry_stream::message::{AbortCode, Message, Run, Verdict};

use super::{MAX_INQUIRERS, Shared, State};
use crate::core::message::{
    Action, Failure, GuestLeft, Input, Inquirer, MayHaveRun, Notice, Outcome, Reason, Record, Step,
};

/// "Taken" is being written.
pub(super) struct Taking {
    pub(super) run: Run,
}

impl Taking {
    pub(super) fn taken(self, shared: &mut Shared) -> State {
        match self.run {
            Run::Run => {
                shared.actions.push_back(Action::Resume);
                State::Resuming
            }
            Run::StayPaused => shared.runs(),
        }
    }

    /// The source has said Go, so a lost link is no reason to refuse. A journal that cannot be
    /// written, or a VMM that died before it ever ran the guest, is one to give it back.
    pub(super) fn trouble(self, shared: &mut Shared, reason: Reason) -> State {
        match &reason {
            Reason::Failed(Failure {
                step: Step::Journal,
                ..
            })
            | Reason::GuestGone { .. }
            | Reason::ForeignResume => shared.give_back(reason),
            _ => State::Taking(self),
        }
    }
}

impl Shared {
    pub(super) fn runs(&mut self) -> State {
        self.send(Message::Running);
        self.answer_all(Verdict::Taken);
        self.actions.push_back(Action::Restore);
        self.bound(self.config.limits.linger);
        State::Taken(Parting::Expected)
    }

    pub(super) fn not_resumed(&mut self, ran: MayHaveRun, failure: Failure) -> State {
        let reason = Reason::Failed(failure);
        match ran {
            MayHaveRun::No => self.give_back(reason),
            // Nobody may answer for a guest that perhaps ran: a person looks.
            MayHaveRun::Perhaps => {
                self.send(Message::Abort {
                    code: AbortCode::Vmm,
                    text: reason.to_string(),
                });
                self.finish(Outcome::InDoubt { reason })
            }
        }
    }

    pub(super) fn inquired(&mut self, state: State, inquirer: Inquirer) -> State {
        if self.inquirers.len() < MAX_INQUIRERS {
            self.inquirers.push(inquirer);
        }
        match state {
            State::Taken(_) => {
                self.answer_all(Verdict::Taken);
                state
            }
            State::Refusing(Refusing {
                journaled: true, ..
            }) => {
                self.answer_all(Verdict::Refused);
                state
            }
            State::Returning(Returning {
                journaled: true, ..
            }) => {
                self.answer_all(Verdict::Returned);
                state
            }
            State::Preparing(_) | State::Receiving(_) | State::Loading | State::Offered => {
                self.refuse(Reason::Asked, Parting::Lingering)
            }
            state => state,
        }
    }

    /// Answers everybody who asked. One answer may be lost on its way, so the target stays a little.
    fn answer_all(&mut self, verdict: Verdict) {
        if self.inquirers.is_empty() {
            return;
        }
        for to in mem::take(&mut self.inquirers) {
            self.actions.push_back(Action::Answer { to, verdict });
        }
        self.bound(self.config.limits.parting);
    }

    pub(super) fn refuse(&mut self, reason: Reason, parting: Parting) -> State {
        self.deadline = None;
        self.actions.push_back(Action::Journal(Record::Refused));
        self.actions.push_back(Action::CloseLanes);
        self.actions.push_back(Action::Quit);
        State::Refusing(Refusing {
            reason,
            journaled: false,
            quit: false,
            parting,
        })
    }

    fn give_back(&mut self, reason: Reason) -> State {
        self.deadline = None;
        self.actions.push_back(Action::CloseLanes);
        self.actions.push_back(Action::Quit);
        State::Returning(Returning {
            reason,
            quit: false,
            journaled: false,
        })
    }
}

/// Whether the peer knows how it ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Parting {
    /// It will say so on the control lane.
    Expected,
    /// The link was lost: it may ask.
    Lingering,
}

impl Parting {
    pub(super) fn trouble(self, shared: &mut Shared, reason: &Reason) -> State {
        match reason {
            Reason::LinkLost { .. } | Reason::PeerAborted { .. } => State::Taken(Self::Lingering),
            // The guest is here all the same; what went wrong is told.
            Reason::GuestGone { .. } | Reason::Failed(_) => {
                shared.tell(Notice::Leftover(reason.to_string()));
                State::Taken(self)
            }
            _ => State::Taken(self),
        }
    }
}

/// "Refused" is being written, and the VMM ended.
pub(super) struct Refusing {
    reason: Reason,
    journaled: bool,
    quit: bool,
    parting: Parting,
}

impl Refusing {
    pub(super) fn handle(mut self, shared: &mut Shared, input: &Input) -> State {
        match input {
            Input::Journaled(Record::Refused) => {
                self.journaled = true;
                shared.send(Message::Abort {
                    code: self.reason.abort_code(),
                    text: self.reason.to_string(),
                });
            }
            Input::Quit => self.quit = true,
            // Go is void, and so is everything else that was on its way.
            _ => return State::Refusing(self),
        }
        self.advance(shared)
    }

    pub(super) fn trouble(mut self, shared: &mut Shared, reason: &Reason) -> State {
        match reason {
            Reason::Failed(failure) if failure.step == Step::Retire => {
                shared.tell(Notice::Leftover(format!("{failure}: {}", failure.source)));
                self.quit = true;
            }
            // Without the journal nobody may be answered: an engine started later would not know.
            Reason::Failed(failure) if failure.step == Step::Journal => {
                shared.tell(Notice::Leftover(format!("{failure}: {}", failure.source)));
                return self.finish(shared);
            }
            _ => return State::Refusing(self),
        }
        self.advance(shared)
    }

    fn advance(self, shared: &mut Shared) -> State {
        if !(self.journaled && self.quit) {
            return State::Refusing(self);
        }
        let asked = !shared.inquirers.is_empty();
        shared.answer_all(Verdict::Refused);
        match self.parting {
            Parting::Expected if !asked => self.finish(shared),
            Parting::Lingering if !asked && shared.deadline.is_none() => {
                shared.bound(shared.config.limits.linger);
                State::Refusing(self)
            }
            _ => State::Refusing(self),
        }
    }

    pub(super) fn finish(self, shared: &mut Shared) -> State {
        shared.finish(Outcome::Kept {
            reason: self.reason,
            guest: GuestLeft::Ended,
        })
    }
}

/// The guest could not be resumed: the VMM is ended, then "returned" written, then the source told.
pub(super) struct Returning {
    reason: Reason,
    quit: bool,
    journaled: bool,
}

impl Returning {
    pub(super) fn handle(mut self, shared: &mut Shared, input: &Input) -> State {
        match input {
            Input::Quit => {
                self.quit = true;
                shared.actions.push_back(Action::Journal(Record::Returned));
            }
            Input::Journaled(Record::Returned) => self.told(shared),
            _ => {}
        }
        State::Returning(self)
    }

    /// The VMM has ended without having run the guest, and the journal says so.
    fn told(&mut self, shared: &mut Shared) {
        self.journaled = true;
        shared.bound(shared.config.limits.linger);
        shared.send(Message::Returned {
            reason: self.reason.to_string(),
        });
        shared.answer_all(Verdict::Returned);
    }

    pub(super) fn trouble(mut self, shared: &mut Shared, reason: &Reason) -> State {
        match reason {
            // A VMM that may live must not be answered for: the source stays in doubt.
            Reason::Failed(failure) if failure.step == Step::Retire => {
                shared.finish(Outcome::InDoubt {
                    reason: self.reason,
                })
            }
            Reason::Failed(failure) if failure.step == Step::Journal && self.quit => {
                self.told(shared);
                State::Returning(self)
            }
            _ => State::Returning(self),
        }
    }

    pub(super) fn finish(self, shared: &mut Shared) -> State {
        shared.finish(Outcome::Kept {
            reason: self.reason,
            guest: GuestLeft::Ended,
        })
    }
}
