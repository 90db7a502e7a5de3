//! The source's machine: it owns the guest, copies its RAM, and gives it away once.
//!
//! ```text
//! Greeting ─► Preparing ─► Copying ⇄ Collecting ─► Stopping ─► Draining ─► Offering
//!                                                                             │ Ready
//!    Kept ◄── Undoing ◄─── (any trouble up to here)                        Giving   journal: given
//!                 ▲                                                           │
//!                 │ refused, returned                                       Given    Go is sent
//!                 ├────────────────────── Asking ◄──── link lost ─────────────┤
//!                 │                         │ no answer: InDoubt              │ Running
//!                 │                         └── taken ──► Leaving ◄───────────┘
//!                                                            └─► Moved
//! ```
//!
//! Every state is a struct, consumed by its handler, which returns the next. Trouble of any kind is
//! one input to a state: what it leads to depends only on whether the guest was given away.

mod ending;
mod precopy;
mod switchover;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use ferry_stream::message::{
    Features, Hello, Message, Mode, Offer, Purpose, RegionInfo, Round, SessionId, Versions,
};

use self::ending::{Leaving, Undoing};
use self::precopy::{Arming, Collecting, Copying, Holding, Preparing};
use self::switchover::{Asking, Draining, Given, Giving, Offering, Stopping};
use crate::core::converge::{Converge, View};
use crate::core::message::{
    Action, Command, GuestLeft, Input, LaneTotals, Moment, Notice, Outcome, Phase, Reason,
    ZeroPages,
};
use crate::core::meter::{Meter, Progress, Report};
use crate::core::pageset::PageSet;
use crate::vmm::{GuestEvent, Inventory, PauseFor, Rearm, RunState};

/// What a source is told beforehand.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Names the migration.
    pub session: SessionId,
    /// Whether the guest runs while it is copied.
    pub mode: Mode,
    /// In which state the target leaves it: `None` for the state that it has here.
    pub run_at_target: Option<RunState>,
    /// The longest blackout that is wanted.
    pub downtime_limit: Duration,
    /// After this time the guest is paused and the move finishes, whatever the blackout.
    pub timeout: Option<Duration>,
    /// Page lanes to open.
    pub lanes: u16,
    /// What a switchover with nothing dirty costs, for a first prediction.
    pub switchover_floor: Duration,
    /// Bounds on the peer and the VMM.
    pub limits: SourceLimits,
}

/// How long the source waits for others. A peer that is alive is never cut off while pages move; a
/// dead one is found by the driver's heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceLimits {
    /// For the target's welcome.
    pub greeting: Duration,
    /// For the target to blank its RAM, and for the page lanes to stand.
    pub preparing: Duration,
    /// For the guest to stop.
    pub stopping: Duration,
    /// For the last pages and the device state to be sent.
    pub draining: Duration,
    /// For the target to load.
    pub offering: Duration,
    /// For the target's word that it runs, before it is asked.
    pub given: Duration,
    /// For asking the target, before a person has to.
    pub asking: Duration,
    /// Between two attempts to ask.
    pub ask_again: Duration,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            greeting: Duration::from_secs(10),
            preparing: Duration::from_secs(300),
            stopping: Duration::from_secs(30),
            draining: Duration::from_secs(60),
            offering: Duration::from_secs(60),
            given: Duration::from_secs(15),
            asking: Duration::from_secs(60),
            ask_again: Duration::from_millis(250),
        }
    }
}

/// The source's machine. Facts go in through [`Source::handle`], orders come out of
/// [`Source::poll_action`].
pub struct Source {
    shared: Shared,
    state: State,
}

enum State {
    Greeting,
    Preparing(Preparing),
    Arming(Arming),
    Holding(Holding),
    Copying(Copying),
    Collecting(Collecting),
    Stopping(Stopping),
    Draining(Draining),
    Offering(Offering),
    Giving(Giving),
    Given(Given),
    Asking(Asking),
    Leaving(Leaving),
    Undoing(Undoing),
    Ended,
}

/// What every state works on.
struct Shared {
    config: SourceConfig,
    inventory: Inventory,
    converge: Box<dyn Converge>,
    meter: Meter,
    actions: VecDeque<Action>,
    now: Moment,
    deadline: Option<(Moment, Duration)>,
    timeout: Option<Moment>,
    round: Round,
    pages_told: u64,
    /// The state in which people want the guest, whatever the engine does with it meanwhile.
    wanted: RunState,
    /// When the engine paused the guest for a copy, if it did.
    held: Option<Moment>,
    hold_ordered: bool,
    flushing: bool,
    link: Link,
    floor_told: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    Down,
}

impl Source {
    /// A source that offers the guest described by `inventory`, now in state `guest`.
    pub fn new(
        config: SourceConfig,
        inventory: Inventory,
        guest: RunState,
        converge: Box<dyn Converge>,
    ) -> Self {
        let timeout = config.timeout.map(|span| Moment::default().after(span));
        let mut shared = Shared {
            converge,
            meter: Meter::default(),
            actions: VecDeque::new(),
            now: Moment::default(),
            deadline: None,
            timeout,
            round: Round(0),
            pages_told: 0,
            wanted: guest,
            held: None,
            hold_ordered: false,
            flushing: false,
            link: Link::Up,
            floor_told: false,
            config,
            inventory,
        };
        let hello = shared.hello();
        shared.send(Message::Hello(hello));
        shared.bound(shared.config.limits.greeting);
        Self {
            shared,
            state: State::Greeting,
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

    /// When [`Source::handle_timeout`] wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let deadline = self.shared.deadline.map(|(at, _)| at);
        [deadline, self.shared.timeout].into_iter().flatten().min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.shared.now = now;
        if self.shared.timeout.is_some_and(|at| at <= now) {
            self.shared.timeout = None;
            self.shared.suspend(&self.state);
        }
        if let Some((at, limit)) = self.shared.deadline
            && at <= now
        {
            self.shared.deadline = None;
            let state = mem::replace(&mut self.state, State::Ended);
            self.state = match state {
                State::Asking(asking) => asking.ask_again(&mut self.shared),
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
    }

    /// What is going on.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// True as long as the source may let the guest run: it never does from the moment it says Go
    /// until it knows that the target has not taken it.
    pub fn may_run(&self) -> bool {
        !matches!(
            self.state,
            State::Given(_) | State::Asking(_) | State::Leaving(_) | State::Ended
        )
    }

    /// A look at how far it is.
    pub fn progress(&self, now: Moment) -> Progress {
        self.shared.progress(now, self.state.phase())
    }

    /// The figures so far.
    pub fn report(&self, now: Moment) -> Report {
        self.shared.meter.report(now)
    }
}

impl State {
    fn phase(&self) -> Phase {
        match self {
            Self::Greeting => Phase::Greeting,
            Self::Preparing(_) | Self::Arming(_) | Self::Holding(_) => Phase::Preparing,
            Self::Copying(_) | Self::Collecting(_) => Phase::Copying,
            Self::Stopping(_) => Phase::Stopping,
            Self::Draining(_) => Phase::Draining,
            Self::Offering(_) => Phase::Offering,
            Self::Giving(_) => Phase::Giving,
            Self::Given(_) => Phase::Given,
            Self::Asking(_) => Phase::Asking,
            Self::Leaving(_) => Phase::Leaving,
            Self::Undoing(_) => Phase::Undoing,
            Self::Ended => Phase::Ended,
        }
    }

    /// Something went wrong. Before the guest was given away everything is put back; afterwards only
    /// the target's word counts.
    fn trouble(self, shared: &mut Shared, reason: Reason) -> Self {
        match self {
            Self::Greeting => shared.refuse(reason),
            Self::Giving(giving) => giving.trouble(shared, reason),
            Self::Given(given) => given.trouble(shared, reason),
            Self::Asking(asking) => asking.trouble(shared, &reason),
            Self::Leaving(leaving) => leaving.trouble(shared, &reason),
            Self::Undoing(undoing) => undoing.trouble(shared, &reason),
            Self::Ended => Self::Ended,
            Self::Preparing(_)
            | Self::Arming(_)
            | Self::Holding(_)
            | Self::Copying(_)
            | Self::Collecting(_)
            | Self::Stopping(_)
            | Self::Draining(_)
            | Self::Offering(_) => shared.undo(reason),
        }
    }

    /// True while the guest runs and its RAM is copied.
    fn is_copying(&self) -> bool {
        matches!(self, Self::Copying(_) | Self::Collecting(_))
    }

    /// True from the order to stop for the switchover until the guest is given away.
    fn is_switching(&self) -> bool {
        matches!(
            self,
            Self::Stopping(_) | Self::Draining(_) | Self::Offering(_) | Self::Giving(_)
        )
    }
}

impl Shared {
    fn dispatch(&mut self, state: State, input: Input) -> State {
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
            Input::Failed(failure) => state.trouble(self, Reason::Failed(failure)),
            Input::Guest(event) => self.guest_event(state, event),
            Input::Command(command) => self.command(state, command),
            Input::Sent(totals) => {
                self.meter.sent(totals);
                // Pages that move are no standstill, however slow the link.
                if let (State::Draining(_), Some((_, limit))) = (&state, self.deadline) {
                    self.bound(limit);
                }
                state
            }
            Input::Flushed => {
                self.flushing = false;
                state
            }
            Input::Paused { at } if state.is_copying() => {
                self.hold(at);
                state
            }
            input => self.step(state, input),
        }
    }

    fn step(&mut self, state: State, input: Input) -> State {
        match state {
            State::Greeting => self.greeted(input),
            State::Preparing(preparing) => preparing.handle(self, input),
            State::Arming(arming) => arming.handle(self, input),
            State::Holding(holding) => holding.handle(self, input),
            State::Copying(copying) => copying.handle(self, input),
            State::Collecting(collecting) => collecting.handle(self, input),
            State::Stopping(stopping) => stopping.handle(self, input),
            State::Draining(draining) => draining.handle(self, input),
            State::Offering(offering) => offering.handle(self, input),
            State::Giving(giving) => giving.handle(self, &input),
            State::Given(given) => given.handle(self, input),
            State::Asking(asking) => asking.handle(self, input),
            State::Leaving(leaving) => leaving.handle(self, &input),
            State::Undoing(undoing) => undoing.handle(self, input),
            State::Ended => State::Ended,
        }
    }

    /// What an unexpected input means: a message at the wrong time is the peer's fault, a fact that
    /// comes late (its order was given before the state changed) means nothing.
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

    fn guest_event(&mut self, state: State, event: GuestEvent) -> State {
        let reason = match event {
            GuestEvent::Reset => {
                self.tell(Notice::GuestReset);
                return state;
            }
            GuestEvent::ForeignPause => return self.foreign_pause(state),
            GuestEvent::ForeignResume => return self.foreign_resume(state),
            GuestEvent::ShutDown => Reason::GuestShutDown,
            GuestEvent::Panicked => Reason::GuestPanicked,
            GuestEvent::IoErrorPause { device } => Reason::GuestIoError { device },
            GuestEvent::Gone { what } => Reason::GuestGone { what },
        };
        self.wanted = RunState::Paused;
        state.trouble(self, reason)
    }

    fn foreign_pause(&mut self, state: State) -> State {
        self.wanted = RunState::Paused;
        self.tell(Notice::GuestStateChanged(RunState::Paused));
        state
    }

    /// Somebody lets the guest run. While RAM is copied that is their right, and the move goes on
    /// live; while it is handed over it spoils what was saved; afterwards it is a second owner.
    fn foreign_resume(&mut self, state: State) -> State {
        if matches!(
            state,
            State::Given(_) | State::Asking(_) | State::Leaving(_)
        ) {
            self.tell(Notice::ResumedAfterGiven);
            self.actions.push_back(Action::Pause(PauseFor::Copy));
            return state;
        }
        self.wanted = RunState::Running;
        if state.is_switching() {
            return state.trouble(self, Reason::ForeignResume);
        }
        self.held = None;
        self.hold_ordered = false;
        self.meter.went_on();
        self.tell(Notice::GuestStateChanged(RunState::Running));
        state
    }

    fn command(&mut self, state: State, command: Command) -> State {
        match command {
            Command::Cancel if matches!(state, State::Given(_) | State::Asking(_)) => {
                self.tell(Notice::TooLateToCancel);
                state
            }
            Command::Cancel if matches!(state, State::Leaving(_) | State::Undoing(_)) => state,
            Command::Cancel => state.trouble(self, Reason::Cancelled),
            Command::SetDowntimeLimit(limit) => {
                self.config.downtime_limit = limit;
                state
            }
            Command::Suspend => {
                self.suspend(&state);
                state
            }
        }
    }

    /// Pauses the guest now, so that what is left is copied without it running. Before the first
    /// round that is what a move without `--live` does.
    fn suspend(&mut self, state: &State) {
        if state.is_copying() && !self.hold_ordered {
            self.tell(Notice::TimeoutSuspends);
            self.order_hold();
        } else if matches!(
            state,
            State::Greeting | State::Preparing(_) | State::Arming(_)
        ) {
            self.config.mode = Mode::Paused;
        }
    }

    fn order_hold(&mut self) {
        self.hold_ordered = true;
        self.actions.push_back(Action::Pause(PauseFor::Copy));
    }

    fn hold(&mut self, at: Moment) {
        self.held = Some(at);
        self.meter.stopped(at);
    }

    fn hello(&self) -> Hello {
        let regions = self.inventory.layout.iter().map(|(_, region)| RegionInfo {
            name: region.name.clone(),
            bytes: region.bytes,
            backing_page_bytes: region.backing_page_bytes,
        });
        Hello {
            versions: Versions::OURS,
            features: Features::NONE,
            session: self.config.session,
            purpose: Purpose::Migrate,
            offer: Some(Offer {
                arch: self.inventory.arch.clone(),
                machine: self.inventory.machine.clone(),
                vmm: self.inventory.vmm.clone(),
                regions: regions.collect(),
                lanes: self.config.lanes,
                mode: self.config.mode,
            }),
        }
    }

    fn send(&mut self, message: Message) {
        if self.link == Link::Up {
            self.actions.push_back(Action::Send(message));
        }
    }

    fn tell(&mut self, notice: Notice) {
        self.actions.push_back(Action::Tell(notice));
    }

    /// Bounds what comes next by `limit` from now.
    fn bound(&mut self, limit: Duration) {
        self.deadline = Some((self.now.after(limit), limit));
    }

    fn unbound(&mut self) {
        self.deadline = None;
    }

    /// An empty set for a collection to fill.
    fn blank_set(&self) -> PageSet {
        PageSet::empty(&self.inventory.layout)
    }

    fn collect(&mut self, rearm: Rearm) {
        let into = self.blank_set();
        self.actions.push_back(Action::Collect { rearm, into });
    }

    /// Orders the next round over `pages`.
    fn copy(&mut self, pages: PageSet) -> InFlight {
        self.round = Round(self.round.0 + 1);
        self.meter.begin_round(self.now, self.round, pages.len());
        let zeros = if self.round.0 == 1 {
            ZeroPages::Skip
        } else {
            ZeroPages::Tell
        };
        self.actions.push_back(Action::Copy {
            round: self.round,
            pages: Arc::new(pages),
            zeros,
        });
        InFlight {
            round: self.round,
            sent: None,
            done: None,
        }
    }

    fn view(&self, dirty_pages: u64) -> View<'_> {
        View {
            rounds: self.meter.rounds(),
            dirty_pages,
            rate_bytes_per_s: self.meter.rate(self.now),
            dirty_bytes_per_s: self.meter.dirty_rate(),
            floor: self.config.switchover_floor,
            limit: self.config.downtime_limit,
        }
    }

    fn finish(&mut self, outcome: Outcome) -> State {
        self.unbound();
        self.timeout = None;
        self.actions.push_back(Action::Finish(outcome));
        State::Ended
    }

    /// The peer would not have it, or could not be understood: nothing has been changed yet.
    fn refuse(&mut self, reason: Reason) -> State {
        self.send(Message::Abort {
            code: reason.abort_code(),
            text: reason.to_string(),
        });
        self.finish(Outcome::Kept {
            reason,
            guest: GuestLeft::Untouched,
        })
    }
}

/// A round on its way: sent when every lane has sent its end, done when the target says so, in
/// whichever order the two become known.
struct InFlight {
    round: Round,
    sent: Option<LaneTotals>,
    done: Option<u64>,
}

/// What a fact means to a round on its way.
enum Settled {
    /// It is not about the round.
    Unrelated(Input),
    /// It is still on its way.
    NotYet,
    /// Every page is in place.
    Done,
    /// The two sides count differently.
    Wrong(Reason),
}

impl InFlight {
    fn note(&mut self, shared: &mut Shared, input: Input) -> Settled {
        match input {
            Input::RoundSent { round, totals } if round == self.round => self.sent = Some(totals),
            Input::Received(Message::RoundDone { round, pages }) if round == self.round => {
                self.done = Some(pages);
            }
            input => return Settled::Unrelated(input),
        }
        let (Some(totals), Some(theirs)) = (self.sent, self.done) else {
            return Settled::NotYet;
        };
        let ours = totals.pages - shared.pages_told;
        if ours != theirs {
            return Settled::Wrong(Reason::Miscounted {
                round: self.round,
                ours,
                theirs,
            });
        }
        shared.pages_told = totals.pages;
        shared.meter.end_round(shared.now, totals);
        Settled::Done
    }
}
