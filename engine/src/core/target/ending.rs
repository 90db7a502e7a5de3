//! From Go to the end: taken for good, refused, or given back. What is answered is in the journal
//! first.

use std::mem;
use std::time::Duration;

use ferry_stream::message::{Message, Run, Verdict};

use super::{MAX_INQUIRERS, Peer, Shared, State};
use crate::core::message::{
    Action, Failure, GuestLeft, Input, Inquirer, MayHaveRun, Moment, Notice, Outcome, Reason,
    Record, Step,
};
use crate::core::outcome::in_full;

/// "Taken" is being written.
pub(super) struct Taking {
    run: Run,
    /// Somebody has let the guest run already: it can no longer be given back.
    ran: MayHaveRun,
}

impl Taking {
    pub(super) fn taken(self, shared: &mut Shared) -> State {
        match self.run {
            Run::Run => {
                shared.actions.push_back(Action::Resume);
                State::Resuming(shared.now)
            }
            Run::StayPaused => shared.keep(Run::StayPaused, 0),
        }
    }

    /// The source has said Go, so a lost link is no reason to refuse. A VMM that died before it ever
    /// ran the guest is one to give it back.
    pub(super) fn trouble(self, shared: &mut Shared, reason: Reason) -> State {
        match (&reason, self.ran) {
            (Reason::TargetGone { .. }, MayHaveRun::No) => shared.give_back(reason),
            (Reason::ForeignResume, _) => State::Taking(Self {
                ran: MayHaveRun::Perhaps,
                ..self
            }),
            _ => State::Taking(self),
        }
    }

    pub(super) fn unwritten(self, shared: &mut Shared, failure: Failure) -> State {
        shared.not_resumed(self.ran, failure)
    }
}

impl Shared {
    pub(super) fn take(&mut self, run: Run) -> State {
        self.deadline = None;
        self.journal(Record::Taken);
        let ran = MayHaveRun::No;
        State::Taking(Taking { run, ran })
    }

    /// The guest is in the state that was ordered, which took so long.
    pub(super) fn keep(&mut self, run: Run, resume_us: u32) -> State {
        self.send(Message::Running { resume_us });
        self.bound(self.config.limits.linger);
        self.answer_all(Verdict::Taken);
        let settling = match run {
            Run::Run => self.config.limits.settling,
            Run::StayPaused => Duration::ZERO,
        };
        let taken = Taken {
            settles: Some(self.now.after(settling)),
            source: Knows::Perhaps,
        };
        taken.settle(self)
    }

    pub(super) fn not_resumed(&mut self, ran: MayHaveRun, failure: Failure) -> State {
        let reason = Reason::Failed(failure);
        match ran {
            MayHaveRun::No => self.give_back(reason),
            // Nobody may answer for a guest that perhaps ran: a person looks.
            MayHaveRun::Perhaps => {
                self.send(reason.abort());
                self.finish(Outcome::InDoubt { reason })
            }
        }
    }

    pub(super) fn inquired(&mut self, state: State, inquirer: Inquirer) -> State {
        if self.inquirers.len() < MAX_INQUIRERS {
            self.inquirers.push(inquirer);
        }
        match state {
            State::Preparing(_)
            | State::Receiving(_)
            | State::Arming(_)
            | State::Loading(_)
            | State::Offered => self.refuse(Reason::Asked, Parting::Lingering),
            state => {
                if let Some(verdict) = state.verdict() {
                    self.answer_all(verdict);
                }
                state
            }
        }
    }

    /// Answers everybody who asked. One answer may be lost on its way, so the target stays a little;
    /// as long as the link stands it is not the answer that the source waits for.
    fn answer_all(&mut self, verdict: Verdict) {
        if self.inquirers.is_empty() {
            return;
        }
        for to in mem::take(&mut self.inquirers) {
            self.actions.push_back(Action::Answer { to, verdict });
        }
        if self.peer == Peer::Lost || self.deadline.is_none() {
            self.bound(self.config.limits.parting);
        }
    }

    pub(super) fn refuse(&mut self, reason: Reason, parting: Parting) -> State {
        self.deadline = None;
        self.journal(Record::Refused);
        self.actions.push_back(Action::Quit);
        State::Refusing(Refusing {
            reason,
            record: Written::Pending,
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
            lives: false,
            record: None,
        })
    }

    pub(super) fn tell_leftover(&mut self, failure: &Failure) {
        self.tell(Notice::Leftover(format!("{failure}: {}", failure.source)));
    }
}

impl State {
    /// What may be answered: what the journal says.
    fn verdict(&self) -> Option<Verdict> {
        match self {
            Self::Taken(_) => Some(Verdict::Taken),
            Self::Refusing(refusing) if refusing.record == Written::Durably => {
                Some(Verdict::Refused)
            }
            Self::Returning(returning) if returning.record == Some(Written::Durably) => {
                Some(Verdict::Returned)
            }
            _ => None,
        }
    }
}

/// The guest is this side's for good.
pub(super) struct Taken {
    /// When the VMM's settings are put back, unless they are already.
    settles: Option<Moment>,
    source: Knows,
}

/// Whether the source is known to know whose the guest is.
#[derive(PartialEq, Eq)]
enum Knows {
    Perhaps,
    Yes,
}

impl Taken {
    pub(super) fn settles(&self) -> Option<Moment> {
        self.settles
    }

    /// Puts the VMM's settings back, once the guest has had its first moments to itself.
    pub(super) fn settle(mut self, shared: &mut Shared) -> State {
        if self.settles.take_if(|at| *at <= shared.now).is_some() {
            shared.actions.push_back(Action::Restore);
        }
        self.advance(shared)
    }

    pub(super) fn advance(self, shared: &mut Shared) -> State {
        if self.settles.is_none() {
            shared.disarm_when_whole();
        }
        self.end_if_due(shared)
    }

    /// Nobody has asked for so long. A source whose pages are missing here has yet to hear that they are
    /// all there.
    pub(super) fn nobody_asked(self, shared: &mut Shared) -> State {
        if shared.fetch.is_over() {
            return self.known(shared);
        }
        shared.bound(shared.config.limits.linger);
        State::Taken(self)
    }

    /// The source knows, and will not ask.
    pub(super) fn known(mut self, shared: &mut Shared) -> State {
        self.source = Knows::Yes;
        self.end_if_due(shared)
    }

    fn end_if_due(self, shared: &mut Shared) -> State {
        if self.settles.is_none() && self.source == Knows::Yes && shared.fetch.is_over() {
            return shared.finish(Outcome::Moved);
        }
        State::Taken(self)
    }

    /// Once the guest runs here, nothing can end that; what happens to it is its own affair.
    pub(super) fn trouble(self, shared: &mut Shared, reason: &Reason) -> State {
        match reason {
            Reason::TargetGone { what } if !shared.fetch.is_over() => {
                let reason = Reason::DiedWithoutPages { what: what.clone() };
                shared.send(reason.abort());
                return shared.in_doubt(reason);
            }
            Reason::TargetGone { .. } => shared.tell(Notice::Leftover(reason.to_string())),
            Reason::Failed(failure) => shared.tell_leftover(failure),
            _ => {}
        }
        State::Taken(self)
    }
}

/// How a record of the journal fares.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    /// It is being written.
    Pending,
    /// It will be read after a crash.
    Durably,
    /// It could not be written, or perhaps it was.
    Not,
}

/// Whether somebody may still ask.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Parting {
    /// No: the source cannot have given the guest away, or knows.
    Done,
    /// It may: whether it has said Go is not known here.
    Lingering,
}

/// "Refused" is being written, and the VMM ended.
pub(super) struct Refusing {
    reason: Reason,
    record: Written,
    quit: bool,
    parting: Parting,
}

impl Refusing {
    pub(super) fn handle(mut self, shared: &mut Shared, input: &Input) -> State {
        match input {
            Input::Journaled(Record::Refused) if self.record == Written::Pending => {
                self.record = Written::Durably;
                // In this order, or the source would see its lanes close and not read why.
                shared.send(self.reason.abort());
                shared.actions.push_back(Action::CloseLanes);
                shared.answer_all(Verdict::Refused);
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
                shared.tell_leftover(failure);
                self.quit = true;
            }
            // The source has given up by itself: it will not ask.
            Reason::PeerAborted { .. } => {
                shared.deadline = None;
                self.parting = Parting::Done;
            }
            _ => return State::Refusing(self),
        }
        self.advance(shared)
    }

    /// Without the journal nobody may be answered: an engine started later would not know.
    pub(super) fn unwritten(mut self, shared: &mut Shared, failure: &Failure) -> State {
        shared.tell_leftover(failure);
        self.record = Written::Not;
        self.parting = Parting::Done;
        shared.actions.push_back(Action::CloseLanes);
        self.advance(shared)
    }

    /// Nobody asks any more.
    pub(super) fn timed_out(mut self, shared: &mut Shared) -> State {
        self.parting = Parting::Done;
        self.advance(shared)
    }

    fn advance(self, shared: &mut Shared) -> State {
        if self.record == Written::Pending || !self.quit || shared.deadline.is_some() {
            return State::Refusing(self);
        }
        match self.parting {
            Parting::Done => shared.kept(self.reason),
            Parting::Lingering => {
                shared.bound(shared.config.limits.linger);
                State::Refusing(self)
            }
        }
    }
}

/// The guest could not be resumed: the VMM is ended, then "returned" written, then the source told.
pub(super) struct Returning {
    reason: Reason,
    quit: bool,
    /// It could not be ended, and may live.
    lives: bool,
    record: Option<Written>,
}

impl Returning {
    pub(super) fn handle(mut self, shared: &mut Shared, input: &Input) -> State {
        match input {
            Input::Quit => self.quit = true,
            Input::Journaled(Record::Returned) if self.record == Some(Written::Pending) => {
                self.record = Some(Written::Durably);
                self.told(shared);
            }
            _ => {}
        }
        self.advance(shared)
    }

    /// The VMM has ended without having run the guest, and the journal says so.
    fn told(&self, shared: &mut Shared) {
        shared.bound(shared.config.limits.linger);
        shared.send(Message::Returned {
            reason: in_full(&self.reason),
        });
        shared.answer_all(Verdict::Returned);
    }

    /// When the VMM has ended and the journal is at rest, it can say so.
    fn advance(mut self, shared: &mut Shared) -> State {
        let at_rest = self.record.is_none() && shared.journaling.is_empty();
        // A VMM that may live must not be answered for: the source stays in doubt.
        if self.lives && at_rest {
            return shared.in_doubt(self.reason);
        }
        if self.quit && at_rest {
            self.record = Some(Written::Pending);
            shared.journal(Record::Returned);
        }
        State::Returning(self)
    }

    pub(super) fn trouble(mut self, shared: &mut Shared, reason: &Reason) -> State {
        match reason {
            Reason::Failed(failure) if failure.step == Step::Retire && !self.quit => {
                self.lives = true;
                self.advance(shared)
            }
            // The source knows: the guest is its own again.
            Reason::PeerAborted { .. } if self.record == Some(Written::Durably) => {
                shared.kept(self.reason)
            }
            _ => State::Returning(self),
        }
    }

    /// What the journal does not say must not be told: a person decides.
    pub(super) fn unwritten(self, shared: &mut Shared, failure: &Failure) -> State {
        match self.record {
            Some(Written::Pending) => {
                shared.tell_leftover(failure);
                shared.in_doubt(self.reason)
            }
            _ => self.advance(shared),
        }
    }

    pub(super) fn timed_out(self, shared: &mut Shared) -> State {
        shared.kept(self.reason)
    }
}

impl Shared {
    /// The guest is the source's, and the VMM that was ready for it has ended.
    fn kept(&mut self, reason: Reason) -> State {
        self.finish(Outcome::Kept {
            reason,
            guest: GuestLeft::Ended,
        })
    }

    fn in_doubt(&mut self, reason: Reason) -> State {
        self.finish(Outcome::InDoubt { reason })
    }
}
