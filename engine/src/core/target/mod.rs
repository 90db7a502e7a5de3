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

mod ahead;
#[cfg(test)]
mod bench;
mod ending;
mod fetching;
#[cfg(test)]
mod fetching_tests;
mod greeting;
#[cfg(test)]
mod lane_tests;
mod lanes;
mod receiving;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::mem;
use std::time::Duration;

use ferry_stream::message::{Features, LaneId, Message, Run, SessionId};

use self::ending::{Parting, Refusing, Returning, Taken, Taking};
use self::fetching::{Arming, Fetch};
use self::lanes::Lanes;
use self::receiving::{Mismatches, Preparing, Receiving};
use crate::core::message::{
    Action, Command, Failure, Input, Inquirer, MayHaveRun, Moment, Notice, Outcome, Phase, Reason,
    Record, Step,
};
use crate::core::pageset::PageSet;
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
    /// For the VMM to be ready to load.
    pub preparing: Duration,
    /// For Go, after Ready.
    pub offered: Duration,
    /// For somebody to ask who owns the guest, after the link was lost with the answer unknown.
    /// Longer than a source asks.
    pub linger: Duration,
    /// For an answer to be read, after it was given.
    pub parting: Duration,
    /// After which a page lane on which nothing comes is dead, when others have ended the round: it
    /// is fenced then, and its pages go over those. A source that keeps to a bandwidth may sleep off
    /// a chunk of half a MiB for every other lane before it sends its own: with the usual two lanes
    /// half a second at 1 MiB/s.
    pub lane_silence: Duration,
    /// For which nothing is put back or cleaned up once the guest runs: its first moments are its own.
    pub settling: Duration,
}

impl Default for TargetLimits {
    fn default() -> Self {
        Self {
            preparing: Duration::from_secs(300),
            offered: Duration::from_secs(120),
            linger: Duration::from_secs(90),
            parting: Duration::from_secs(2),
            lane_silence: Duration::from_secs(2),
            settling: Duration::from_millis(100),
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
    Arming(Arming),
    /// Since RAM was complete.
    Loading(Moment),
    Offered,
    Taking(Taking),
    /// Since the order.
    Resuming(Moment),
    Taken(Taken),
    Refusing(Refusing),
    Returning(Returning),
    Ended,
}

/// What every state works on.
struct Shared {
    config: TargetConfig,
    inventory: Inventory,
    session: Option<SessionId>,
    /// What both sides are able to do.
    features: Features,
    lanes: Lanes,
    mismatches: Mismatches,
    fetch: Fetch,
    /// For which pages room was ordered ahead; none before the first hint, and after the first round.
    hinted: Option<PageSet>,
    actions: VecDeque<Action>,
    /// Records that are being written, in order: a failure does not say which one it is.
    journaling: VecDeque<Record>,
    inquirers: Vec<Inquirer>,
    peer: Peer,
    now: Moment,
    deadline: Option<(Moment, Duration)>,
}

/// Whether the source can be told something on the control lane.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    There,
    Lost,
}

impl Target {
    /// A target whose VMM is described by `inventory`.
    pub fn new(config: TargetConfig, inventory: Inventory) -> Self {
        let shared = Shared {
            config,
            inventory,
            session: None,
            features: Features::NONE,
            lanes: Lanes::default(),
            mismatches: Mismatches::default(),
            fetch: Fetch::default(),
            hinted: None,
            actions: VecDeque::new(),
            journaling: VecDeque::new(),
            inquirers: Vec::new(),
            peer: Peer::There,
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
        // What comes after the end changes nothing, and nobody carries out orders any more.
        if !matches!(self.state, State::Ended) {
            let state = mem::replace(&mut self.state, State::Ended);
            self.state = self.shared.dispatch(state, input);
        }
    }

    /// The next order, if there is one.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.shared.actions.pop_front()
    }

    /// When [`Target::handle_timeout`] wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let deadline = self.shared.deadline.map(|(at, _)| at);
        let look = self
            .shared
            .lanes
            .look_at()
            .filter(|_| self.state.takes_pages());
        let settles = match &self.state {
            State::Taken(taken) => taken.settles(),
            _ => None,
        };
        [deadline, look, settles].into_iter().flatten().min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.shared.now = now;
        if self.shared.lanes.looks(now) && self.state.takes_pages() {
            self.shared.actions.push_back(Action::LookAtLanes);
        }
        self.settle();
        let Some((_, limit)) = self.shared.deadline.take_if(|(at, _)| *at <= now) else {
            return;
        };
        let state = mem::replace(&mut self.state, State::Ended);
        self.state = match state {
            // Whoever may still have asked has had the time for it.
            State::Taken(taken) => taken.nobody_asked(&mut self.shared),
            State::Refusing(refusing) => refusing.timed_out(&mut self.shared),
            State::Returning(returning) => returning.timed_out(&mut self.shared),
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

    /// The guest has had its first moments here to itself.
    fn settle(&mut self) {
        match mem::replace(&mut self.state, State::Ended) {
            State::Taken(taken) => self.state = taken.settle(&mut self.shared),
            state => self.state = state,
        }
    }

    /// The migration that is served, once a source was accepted.
    pub fn session(&self) -> Option<SessionId> {
        self.shared.session
    }

    /// Page lanes agreed on; 0 before that.
    pub fn lanes(&self) -> u16 {
        self.shared.lanes.most()
    }

    /// Lets a page lane take part: to be asked when its hello has come, before it is answered.
    pub fn enlist(&mut self, lane: LaneId) -> Result<(), &'static str> {
        if !self.state.takes_pages() {
            return Err("no pages are taken any more");
        }
        self.shared.lanes.enlist(lane)
    }

    /// What is going on.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// True when the guest may run here: from the moment the journal says taken.
    pub fn may_run(&self) -> bool {
        matches!(self.state, State::Resuming(_) | State::Taken(_))
    }
}

impl State {
    fn phase(&self) -> Phase {
        match self {
            Self::Waiting => Phase::Waiting,
            Self::Preparing(_) => Phase::Preparing,
            Self::Receiving(_) => Phase::Receiving,
            Self::Arming(_) | Self::Loading(_) => Phase::Loading,
            Self::Offered => Phase::Offered,
            Self::Taking(_) | Self::Resuming(_) => Phase::Taking,
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
            Self::Preparing(_) | Self::Receiving(_) | Self::Arming(_) | Self::Loading(_) => {
                shared.refuse(reason, Parting::Done)
            }
            // A source that gives up has not said Go before.
            Self::Offered if matches!(reason, Reason::PeerAborted { .. }) => {
                shared.refuse(reason, Parting::Done)
            }
            Self::Offered => shared.refuse(reason, Parting::Lingering),
            Self::Taking(taking) => taking.trouble(shared, reason),
            Self::Resuming(since) => match reason {
                // Not even an answer: the adapter broke down in the middle.
                Reason::Failed(failure) if failure.step == Step::Resume => {
                    shared.not_resumed(MayHaveRun::Perhaps, failure)
                }
                _ => Self::Resuming(since),
            },
            Self::Taken(taken) => taken.trouble(shared, &reason),
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
            Input::LinkLost { what } => {
                self.peer = Peer::Lost;
                state.trouble(self, Reason::LinkLost { what })
            }
            Input::Received(Message::Fence(lane)) => self.fence(state, lane),
            Input::Received(Message::Ahead { region, runs }) => self.hinted(state, region, runs),
            Input::LaneLost { lane, what } => self.lane_lost(state, lane, what),
            Input::Mismatched {
                lane,
                round,
                region,
                page,
            } => {
                let message = Message::Mismatch {
                    lane,
                    round,
                    region: region.0,
                    page: page.0,
                };
                self.mismatched(state, round, message)
            }
            Input::LaneEnded {
                lane,
                frames,
                pages,
            } => self.lane_ended(state, lane, frames, pages),
            Input::Whole => self.whole(state),
            Input::Disarmed => self.disarmed(state),
            Input::SourceLeft => self.source_left(state),
            Input::Failed(failure) if failure.step == Step::Disarm => {
                self.tell_leftover(&failure);
                self.disarmed(state)
            }
            Input::LanesSeen(looked) => self.lanes_seen(state, &looked),
            Input::Journaled(record) => {
                if self.journaling.front() == Some(&record) {
                    self.journaling.pop_front();
                }
                self.step(state, Input::Journaled(record))
            }
            Input::Failed(failure) if failure.step == Step::Journal => {
                self.unwritten(state, failure)
            }
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
            (State::Arming(arming), input) => arming.handle(self, &input),
            (State::Loading(since), Input::Loaded) => self.offer(since),
            (State::Offered, Input::Received(Message::Go { run })) => self.take(run),
            (State::Taking(taking), Input::Journaled(Record::Taken)) => taking.taken(self),
            (State::Resuming(since), Input::Resumed) => self.keep(Run::Run, self.since_us(since)),
            (State::Resuming(_), Input::NotResumed { ran, failure }) => {
                self.not_resumed(ran, failure)
            }
            (State::Taken(taken), Input::Received(Message::Finished)) => taken.known(self),
            (State::Refusing(refusing), input) => refusing.handle(self, &input),
            (State::Returning(returning), input) => returning.handle(self, &input),
            (state, input) => self.unexpected(state, &input),
        }
    }

    /// A record could not be written. One that was ordered before the state changed means nothing any
    /// more.
    fn unwritten(&mut self, state: State, failure: Failure) -> State {
        let record = self.journaling.pop_front();
        match (state, record) {
            (State::Taking(taking), _) => taking.unwritten(self, failure),
            (State::Refusing(refusing), Some(Record::Refused)) => {
                refusing.unwritten(self, &failure)
            }
            (State::Returning(returning), _) => returning.unwritten(self, &failure),
            (state, _) => state.trouble(self, Reason::Failed(failure)),
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
            GuestEvent::Gone { what } => Reason::TargetGone { what },
            GuestEvent::ForeignResume => Reason::ForeignResume,
            GuestEvent::ShutDown => Reason::GuestShutDown,
            GuestEvent::Panicked => Reason::GuestPanicked,
            GuestEvent::Reset => Reason::GuestReset,
            _ => return state,
        };
        state.trouble(self, reason)
    }

    fn cancel(&mut self, state: State) -> State {
        if matches!(
            state,
            State::Taking(_) | State::Resuming(_) | State::Taken(_)
        ) {
            self.tell(Notice::TooLateToCancel);
            return state;
        }
        state.trouble(self, Reason::Cancelled)
    }

    fn send(&mut self, message: Message) {
        self.actions.push_back(Action::Send(message));
    }

    fn journal(&mut self, record: Record) {
        self.journaling.push_back(record);
        self.actions.push_back(Action::Journal(record));
    }

    fn tell(&mut self, notice: Notice) {
        self.actions.push_back(Action::Tell(notice));
    }

    /// Microseconds since `moment`, as the source is told them.
    fn since_us(&self, moment: Moment) -> u32 {
        u32::try_from(self.now.since(moment).as_micros()).unwrap_or(u32::MAX)
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
