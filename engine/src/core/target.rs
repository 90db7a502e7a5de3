//! The target's machine: it owns nothing until it is told Go, and then it owns the guest for good.
//!
//! ```text
//! Waiting ─► Preparing ─► Receiving ─► Loading ─► Offered ── Go ──► Taking    journal: taken
//!    │           │            │           │          │                │
//!    │           └────────────┴───────────┴──────────┤             Resuming ──► Taken ─► ended
//!    ▼                                               ▼                │
//!  ended                     journal: refused     Refusing            ▼ certainly not run
//!                                                    └─► ended     Returning    journal: returned
//! ```
//!
//! A target that refuses writes so before anybody is told, and that voids a Go still on its way. It
//! lingers for a while to answer a source that lost the link after it had said Go.

use std::collections::VecDeque;
use std::mem;
use std::time::Duration;

use ferry_stream::message::{
    AbortCode, Features, Hello, Message, Offer, Round, Run, SessionId, Verdict, Versions, Welcome,
};

use crate::core::layout::{Layout, Region};
use crate::core::message::{
    Action, Command, Failure, GuestLeft, Input, Inquirer, MayHaveRun, Moment, Notice, Outcome,
    Phase, Reason, Record, Step,
};
use crate::vmm::{GuestEvent, Inventory};

/// What a target is told beforehand.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// Most page lanes that are accepted.
    pub lanes: u16,
    /// Bounds on the peer.
    pub limits: TargetLimits,
}

/// How long the target waits for the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetLimits {
    /// For page lanes to stand and RAM to be blank.
    pub preparing: Duration,
    /// For Go, after Ready.
    pub offered: Duration,
    /// For somebody to ask who owns the guest, after the link was lost with the answer unknown.
    /// Longer than a source asks.
    pub linger: Duration,
    /// For an answer to be read, after it was given.
    pub parting: Duration,
}

impl Default for TargetLimits {
    fn default() -> Self {
        Self {
            preparing: Duration::from_secs(300),
            offered: Duration::from_secs(120),
            linger: Duration::from_secs(90),
            parting: Duration::from_secs(2),
        }
    }
}

/// Most connections whose question waits for an answer at one time.
const MAX_INQUIRERS: usize = 8;

/// The target's machine.
pub struct Target {
    shared: Shared,
    state: State,
}

enum State {
    Waiting,
    Preparing(Preparing),
    Receiving(Receiving),
    Loading,
    Offered,
    Taking(Taking),
    Resuming,
    Taken(Parting),
    Refusing(Refusing),
    Returning(Returning),
    Ended,
}

/// What every state works on.
struct Shared {
    config: TargetConfig,
    inventory: Inventory,
    session: Option<SessionId>,
    lanes: u16,
    actions: VecDeque<Action>,
    inquirers: Vec<Inquirer>,
    now: Moment,
    deadline: Option<(Moment, Duration)>,
}

#[derive(Default)]
struct Preparing {
    journaled: bool,
    lanes_open: bool,
    prepared: bool,
}

/// RAM comes, round by round.
struct Receiving {
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

/// "Taken" is being written.
struct Taking {
    run: Run,
}

/// Whether the peer knows how it ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parting {
    /// It will say so on the control lane.
    Expected,
    /// The link was lost: it may ask.
    Lingering,
}

/// "Refused" is being written, and the VMM ended.
struct Refusing {
    reason: Reason,
    journaled: bool,
    quit: bool,
    parting: Parting,
}

/// The guest could not be resumed: the VMM is ended, then "returned" written, then the source told.
struct Returning {
    reason: Reason,
    quit: bool,
    journaled: bool,
}

impl Target {
    /// A target whose VMM is described by `inventory`.
    pub fn new(config: TargetConfig, inventory: Inventory) -> Self {
        let shared = Shared {
            config,
            inventory,
            session: None,
            lanes: 0,
            actions: VecDeque::new(),
            inquirers: Vec::new(),
            now: Moment::default(),
            deadline: None,
        };
        Self {
            shared,
            state: State::Waiting,
        }
    }

    /// Takes a fact in.
    pub fn handle(&mut self, now: Moment, input: Input) {
        self.shared.now = now;
        let state = mem::replace(&mut self.state, State::Ended);
        self.state = self.shared.dispatch(state, input);
    }

    /// The next order, if there is one.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.shared.actions.pop_front()
    }

    /// When [`Target::handle_timeout`] wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.shared.deadline.map(|(at, _)| at)
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.shared.now = now;
        let Some((_, limit)) = self.shared.deadline.take_if(|(at, _)| *at <= now) else {
            return;
        };
        let state = mem::replace(&mut self.state, State::Ended);
        self.state = match state {
            State::Taken(_) => self.shared.finish(Outcome::Moved),
            State::Refusing(refusing) => refusing.finish(&mut self.shared),
            State::Returning(returning) => returning.finish(&mut self.shared),
            state => {
                let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                let reason = Reason::TimedOut {
                    phase: state.phase(),
                    limit_ms,
                };
                state.trouble(&mut self.shared, reason)
            }
        };
    }

    /// The migration that is served, once a source was accepted.
    pub fn session(&self) -> Option<SessionId> {
        self.shared.session
    }

    /// Page lanes agreed on; 0 before that.
    pub fn lanes(&self) -> u16 {
        self.shared.lanes
    }

    /// What is going on.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// True when the guest may run here: from the moment the journal says taken.
    pub fn may_run(&self) -> bool {
        matches!(self.state, State::Resuming | State::Taken(_))
    }
}

impl State {
    fn phase(&self) -> Phase {
        match self {
            Self::Waiting => Phase::Waiting,
            Self::Preparing(_) => Phase::Preparing,
            Self::Receiving(_) => Phase::Receiving,
            Self::Loading => Phase::Loading,
            Self::Offered => Phase::Offered,
            Self::Taking(_) | Self::Resuming => Phase::Taking,
            Self::Taken(_) => Phase::Taken,
            Self::Refusing(_) | Self::Returning(_) => Phase::Refusing,
            Self::Ended => Phase::Ended,
        }
    }

    /// Something went wrong. Before Go the guest is the source's; after it, a link that is lost
    /// changes nothing.
    fn trouble(self, shared: &mut Shared, reason: Reason) -> Self {
        match self {
            Self::Waiting => shared.turn_away(reason),
            Self::Preparing(_) | Self::Receiving(_) | Self::Loading => {
                shared.refuse(reason, Parting::Expected)
            }
            Self::Offered => shared.refuse(reason, Parting::Lingering),
            Self::Taking(taking) => taking.trouble(shared, reason),
            Self::Resuming => Self::Resuming,
            Self::Taken(parting) => parting.trouble(shared, &reason),
            Self::Refusing(refusing) => refusing.trouble(shared, &reason),
            Self::Returning(returning) => returning.trouble(shared, &reason),
            Self::Ended => Self::Ended,
        }
    }
}

impl Shared {
    fn dispatch(&mut self, state: State, input: Input) -> State {
        match input {
            Input::Received(Message::Ping) => state,
            Input::Received(Message::Abort { code, text }) => {
                state.trouble(self, Reason::PeerAborted { code, text })
            }
            Input::LinkLost { what } => state.trouble(self, Reason::LinkLost { what }),
            Input::Failed(failure) => state.trouble(self, Reason::Failed(failure)),
            Input::Guest(event) => self.guest_event(state, event),
            Input::Inquired(inquirer) => self.inquired(state, inquirer),
            Input::Command(Command::Cancel) => self.cancel(state),
            input => self.step(state, input),
        }
    }

    fn step(&mut self, state: State, input: Input) -> State {
        match (state, input) {
            (State::Waiting, Input::Received(Message::Hello(hello))) => self.greet(hello),
            (State::Preparing(preparing), input) => preparing.handle(self, input),
            (State::Receiving(receiving), input) => receiving.handle(self, input),
            (State::Loading, Input::Loaded) => self.offer(),
            (State::Offered, Input::Received(Message::Go { run })) => {
                self.deadline = None;
                self.actions.push_back(Action::Journal(Record::Taken));
                State::Taking(Taking { run })
            }
            (State::Taking(taking), Input::Journaled(Record::Taken)) => taking.taken(self),
            (State::Resuming, Input::Resumed) => self.runs(),
            (State::Resuming, Input::NotResumed { ran, failure }) => self.not_resumed(ran, failure),
            (State::Taken(_), Input::Received(Message::Finished)) => self.finish(Outcome::Moved),
            (State::Refusing(refusing), input) => refusing.handle(self, &input),
            (State::Returning(returning), input) => returning.handle(self, &input),
            (state, input) => self.unexpected(state, &input),
        }
    }

    fn unexpected(&mut self, state: State, input: &Input) -> State {
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

    /// Before Go nobody may touch the guest here; afterwards it is its owner's to do with.
    fn guest_event(&mut self, state: State, event: GuestEvent) -> State {
        let reason = match event {
            GuestEvent::Gone { what } => Reason::GuestGone { what },
            GuestEvent::ForeignResume => Reason::ForeignResume,
            GuestEvent::ShutDown => Reason::GuestShutDown,
            _ => return state,
        };
        state.trouble(self, reason)
    }

    fn cancel(&mut self, state: State) -> State {
        if matches!(state, State::Taking(_) | State::Resuming | State::Taken(_)) {
            self.tell(Notice::TooLateToCancel);
            return state;
        }
        state.trouble(self, Reason::Cancelled)
    }

    fn greet(&mut self, hello: Hello) -> State {
        let session = hello.session;
        match self.agree(hello) {
            Ok(welcome) => {
                self.session = Some(session);
                self.lanes = welcome.lanes;
                self.send(Message::Welcome(welcome));
                self.actions.push_back(Action::Journal(Record::Receiving));
                self.actions.push_back(Action::Prepare);
                self.bound(self.config.limits.preparing);
                State::Preparing(Preparing::default())
            }
            Err(reason) => self.turn_away(reason),
        }
    }

    fn agree(&self, hello: Hello) -> Result<Welcome, Reason> {
        let Versions { lowest, highest } = hello.versions;
        let version = Versions::OURS
            .agree(hello.versions)
            .ok_or(Reason::Version { lowest, highest })?;
        let what = "a hello without an offer";
        let offer = hello.offer.ok_or(Reason::Protocol {
            what,
            phase: Phase::Waiting,
        })?;
        self.check_machine(&offer)?;
        let layout = parse_layout(&offer)?;
        let differences = layout.differences(&self.inventory.layout);
        if !differences.is_empty() {
            return Err(Reason::Layout(differences));
        }
        let lanes = offer.lanes.clamp(1, self.config.lanes.max(1));
        Ok(Welcome {
            version,
            features: Features::NONE,
            lanes,
        })
    }

    fn check_machine(&self, offer: &Offer) -> Result<(), Reason> {
        let here = &self.inventory;
        for (theirs, ours) in [(&offer.arch, &here.arch), (&offer.machine, &here.machine)] {
            if theirs != ours {
                return Err(Reason::Machine {
                    ours_or_source: theirs.clone(),
                    theirs_or_target: ours.clone(),
                });
            }
        }
        Ok(())
    }

    /// Not a source that can be served: nothing was changed here.
    fn turn_away(&mut self, reason: Reason) -> State {
        self.send(Message::Abort {
            code: reason.abort_code(),
            text: reason.to_string(),
        });
        self.finish(Outcome::Kept {
            reason,
            guest: GuestLeft::Untouched,
        })
    }

    fn offer(&mut self) -> State {
        self.send(Message::Ready);
        self.bound(self.config.limits.offered);
        State::Offered
    }

    fn runs(&mut self) -> State {
        self.send(Message::Running);
        self.answer_all(Verdict::Taken);
        self.bound(self.config.limits.linger);
        State::Taken(Parting::Expected)
    }

    fn not_resumed(&mut self, ran: MayHaveRun, failure: Failure) -> State {
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

    fn inquired(&mut self, state: State, inquirer: Inquirer) -> State {
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

    fn refuse(&mut self, reason: Reason, parting: Parting) -> State {
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

    fn send(&mut self, message: Message) {
        self.actions.push_back(Action::Send(message));
    }

    fn tell(&mut self, notice: Notice) {
        self.actions.push_back(Action::Tell(notice));
    }

    fn bound(&mut self, limit: Duration) {
        self.deadline = Some((self.now.after(limit), limit));
    }

    fn finish(&mut self, outcome: Outcome) -> State {
        self.deadline = None;
        self.actions.push_back(Action::Finish(outcome));
        State::Ended
    }
}

fn parse_layout(offer: &Offer) -> Result<Layout, Reason> {
    let regions = offer.regions.iter().map(|region| Region {
        name: region.name.clone(),
        bytes: region.bytes,
        backing_page_bytes: region.backing_page_bytes,
    });
    let layout = Layout::new(regions.collect()).map_err(Reason::BadLayout)?;
    let in_order = layout
        .iter()
        .zip(&offer.regions)
        .all(|((_, ours), theirs)| ours.name == theirs.name);
    if in_order {
        Ok(layout)
    } else {
        Err(Reason::Protocol {
            what: "regions out of order",
            phase: Phase::Waiting,
        })
    }
}

impl Preparing {
    fn handle(mut self, shared: &mut Shared, input: Input) -> State {
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

impl Receiving {
    fn handle(mut self, shared: &mut Shared, input: Input) -> State {
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
                    Parting::Expected,
                );
            }
            Input::Loaded => {
                let what = "device state that ends before it was complete";
                return shared.refuse(
                    Reason::Protocol {
                        what,
                        phase: Phase::Receiving,
                    },
                    Parting::Expected,
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
            return shared.refuse(reason, Parting::Expected);
        }
        let (bytes, crc) = (complete.state_bytes, complete.state_crc);
        shared.actions.push_back(Action::ReleaseLoad { bytes, crc });
        State::Loading
    }
}

impl Taking {
    fn taken(self, shared: &mut Shared) -> State {
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
    fn trouble(self, shared: &mut Shared, reason: Reason) -> State {
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

impl Parting {
    fn trouble(self, shared: &mut Shared, reason: &Reason) -> State {
        match reason {
            Reason::LinkLost { .. } | Reason::PeerAborted { .. } => State::Taken(Self::Lingering),
            Reason::GuestGone { .. } => {
                shared.tell(Notice::Leftover(reason.to_string()));
                State::Taken(self)
            }
            _ => State::Taken(self),
        }
    }
}

impl Refusing {
    fn handle(mut self, shared: &mut Shared, input: &Input) -> State {
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

    fn trouble(mut self, shared: &mut Shared, reason: &Reason) -> State {
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

    fn finish(self, shared: &mut Shared) -> State {
        shared.finish(Outcome::Kept {
            reason: self.reason,
            guest: GuestLeft::Ended,
        })
    }
}

impl Returning {
    fn handle(mut self, shared: &mut Shared, input: &Input) -> State {
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

    fn trouble(mut self, shared: &mut Shared, reason: &Reason) -> State {
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

    fn finish(self, shared: &mut Shared) -> State {
        shared.finish(Outcome::Kept {
            reason: self.reason,
            guest: GuestLeft::Ended,
        })
    }
}
