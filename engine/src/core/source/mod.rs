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

mod ahead;
#[cfg(test)]
mod bench;
mod config;
#[cfg(test)]
mod delta_tests;
mod deltas;
mod dispatch;
mod ending;
mod events;
mod fencing;
#[cfg(test)]
mod lane_tests;
mod lanes;
mod orders;
mod postcopy;
#[cfg(test)]
mod postcopy_tests;
mod precopy;
mod round;
#[cfg(test)]
mod scan_tests;
mod slowing;
#[cfg(test)]
mod slowing_tests;
mod switchover;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::mem;
use std::time::Duration;

use ferry_stream::message::{Features, Message, Mode, Round};

pub use ferry_stream::limits::MAX_LANES;

pub use self::config::{AtTimeout, LanePlan, SourceConfig, SourceLimits};
use self::deltas::Bases;
use self::ending::{Leaving, Undoing};
use self::lanes::Lanes;
pub use self::postcopy::Postcopy;
use self::postcopy::{Looks, Switching};
use self::precopy::{Collecting, Copying, Holding, Preparing};
use self::slowing::Slowing;
use self::switchover::{Asking, Draining, Given, Giving, Offering, Stopping};
use crate::core::converge::Converge;
use crate::core::growth::Growth;
use crate::core::heat::Heat;
use crate::core::message::{Action, Input, Moment, Phase, Reason, Record};
use crate::core::meter::{Meter, Progress, Report};
use crate::core::pageset::PageSet;
use crate::core::postcopy::Way;
use crate::vmm::{Inventory, RunState};

/// The source's machine. Facts go in through [`Source::handle`], orders come out of
/// [`Source::poll_action`].
pub struct Source {
    shared: Shared,
    state: State,
}

enum State {
    Greeting,
    Preparing(Preparing),
    Holding(Holding),
    Copying(Copying),
    Collecting(Collecting),
    /// What is left of a round that was cut short is being taken back.
    CutShort,
    /// What the guest has is looked for, where nothing is copied before it is handed over.
    Surveying,
    /// The target discards these pages, which will be missing.
    Announcing(PageSet),
    Stopping(Stopping),
    Draining(Draining),
    Switching(Switching),
    Offering(Offering),
    Giving(Giving),
    Given(Given),
    Asking(Asking),
    /// The guest runs at the target, and its pages follow.
    Serving,
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
    /// Records that are being written, in order: a failure does not say which one it is.
    journaling: VecDeque<Record>,
    now: Moment,
    deadline: Option<(Moment, Duration)>,
    timeout: Option<Moment>,
    /// What both sides are able to do with pages.
    features: Features,
    lanes: Lanes,
    bases: Bases,
    /// Whether more lanes are opened.
    growth: Option<Growth>,
    round: Round,
    pages_told: u64,
    /// How the guest was to be copied: whoever wants it paused for that has its copy paced, too.
    asked: Mode,
    /// The state in which people want the guest, whatever the engine does with it meanwhile.
    wanted: RunState,
    /// When the engine paused the guest for a copy, if it did.
    held: Option<Moment>,
    hold_ordered: bool,
    slowing: Slowing,
    flush: Flush,
    hardware: Hardware,
    heat: Heat,
    link: Link,
    way: Way,
    looks: Looks,
    floor_told: bool,
    /// Go was said, and the target has not said that the guest is ours again.
    given_away: bool,
}

/// Whether the hardware is known to be still what was offered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hardware {
    /// Nobody looks: the guest is not handed over yet.
    Offered,
    /// The guest is being handed over: it must be read again.
    Due,
    /// It is being read again.
    Read,
    /// It is the same, or that it is not has been told.
    Same,
}

/// The flush of the guest's disk images.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    None,
    UnderWay,
    /// Under way for so long that nobody waits for it any more.
    Hanging,
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
        let growth = match config.lanes {
            LanePlan::Fixed(_) => None,
            LanePlan::Grow { room, .. } => Some(Growth::new(room, config.limits.growing)),
        };
        let mut shared = Shared {
            converge,
            meter: Meter::default(),
            actions: VecDeque::new(),
            journaling: VecDeque::new(),
            now: Moment::default(),
            deadline: None,
            timeout,
            features: Features::NONE,
            lanes: Lanes::default(),
            bases: Bases::default(),
            growth,
            round: Round(0),
            pages_told: 0,
            asked: config.mode,
            wanted: guest,
            held: None,
            hold_ordered: false,
            slowing: Slowing::new(config.throttling),
            flush: Flush::None,
            hardware: Hardware::Offered,
            heat: Heat::new(&inventory.layout),
            link: Link::Up,
            way: Way::Closed,
            looks: Looks::default(),
            floor_told: false,
            given_away: false,
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

    /// Lanes that the migration begins with.
    pub(crate) fn first_lanes(&self) -> usize {
        self.shared.config.lanes.first().get().into()
    }

    /// When [`Source::handle_timeout`] wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let deadline = self.shared.deadline.map(|(at, _)| at);
        let lanes = self.state.lanes_due(&self.shared);
        let due = [deadline, self.shared.timeout, lanes];
        due.into_iter().flatten().min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.shared.now = now;
        if self.shared.timeout.is_some_and(|at| at <= now) {
            self.shared.timeout = None;
            match self.shared.config.at_timeout {
                AtTimeout::Suspend => self.shared.suspend(&self.state),
                AtTimeout::Postcopy => self.shared.order_postcopy(&self.state),
            }
        }
        let state = mem::replace(&mut self.state, State::Ended);
        self.state = state.look_after_lanes(&mut self.shared);
        if let Some((at, limit)) = self.shared.deadline
            && at <= now
        {
            self.shared.deadline = None;
            let state = mem::replace(&mut self.state, State::Ended);
            self.state = match state {
                State::Asking(asking) => asking.ask_again(&mut self.shared),
                State::Leaving(leaving) => {
                    self.shared.clear_away();
                    State::Leaving(leaving)
                }
                // Only a flush bounds it.
                State::Collecting(collecting) => {
                    self.shared.flush = Flush::Hanging;
                    collecting.go_on(&mut self.shared)
                }
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
            State::Given(_) | State::Asking(_) | State::Serving | State::Leaving(_) | State::Ended
        )
    }

    /// A look at how far it is.
    pub fn progress(&self, now: Moment) -> Progress {
        self.shared.progress(now, self.state.phase())
    }

    /// Pages that the guest was handed over without.
    pub(crate) fn missing_pages(&self) -> u64 {
        self.shared.meter.missing_pages()
    }

    /// What both sides are able to do with pages; none before the target has said so.
    pub fn features(&self) -> Features {
        self.shared.features
    }

    /// The figures so far.
    pub fn report(&self, now: Moment) -> Report {
        let Shared { lanes, slowing, .. } = &self.shared;
        Report {
            lanes: lanes.most(),
            lanes_lost: lanes.lost(),
            throttled_percent: slowing.percent(),
            throttled_percent_max: slowing.most(),
            ..self.shared.meter.report(now)
        }
    }
}

impl State {
    fn phase(&self) -> Phase {
        match self {
            Self::Greeting => Phase::Greeting,
            Self::Preparing(_) | Self::Holding(_) => Phase::Preparing,
            Self::Copying(_)
            | Self::Collecting(_)
            | Self::CutShort
            | Self::Surveying
            | Self::Announcing(_) => Phase::Copying,
            Self::Stopping(_) => Phase::Stopping,
            Self::Draining(_) | Self::Switching(_) => Phase::Draining,
            Self::Offering(_) => Phase::Offering,
            Self::Giving(_) => Phase::Giving,
            Self::Given(_) => Phase::Given,
            Self::Asking(_) => Phase::Asking,
            Self::Serving => Phase::Serving,
            Self::Leaving(_) => Phase::Leaving,
            Self::Undoing(_) => Phase::Undoing,
            Self::Ended => Phase::Ended,
        }
    }

    /// Something went wrong. Before the guest was given away everything is put back; afterwards only
    /// the target's word counts.
    fn trouble(self, shared: &mut Shared, reason: Reason) -> Self {
        match self {
            Self::Greeting => shared.refuse(no_ferry(reason)),
            Self::Given(given) => given.trouble(shared, reason),
            Self::Asking(asking) => asking.trouble(shared, &reason),
            Self::Serving => shared.trouble_while_serving(reason),
            Self::Leaving(leaving) => leaving.trouble(shared, &reason),
            Self::Undoing(undoing) => undoing.trouble(shared, &reason),
            Self::Ended => Self::Ended,
            Self::Preparing(_)
            | Self::Holding(_)
            | Self::Copying(_)
            | Self::Collecting(_)
            | Self::CutShort
            | Self::Surveying
            | Self::Announcing(_)
            | Self::Stopping(_)
            | Self::Draining(_)
            | Self::Switching(_)
            | Self::Offering(_)
            | Self::Giving(_) => shared.undo(reason),
        }
    }

    /// What was waited for before the next collection is there.
    fn go_on(self, shared: &mut Shared) -> Self {
        match self {
            Self::Collecting(collecting) => collecting.go_on(shared),
            state => state,
        }
    }

    /// True while the guest runs and its RAM is copied.
    fn is_copying(&self) -> bool {
        matches!(
            self,
            Self::Copying(_)
                | Self::Collecting(_)
                | Self::CutShort
                | Self::Surveying
                | Self::Announcing(_)
        )
    }

    /// True from the order to stop for the switchover until the guest is given away.
    fn is_switching(&self) -> bool {
        matches!(
            self,
            Self::Stopping(_)
                | Self::Draining(_)
                | Self::Switching(_)
                | Self::Offering(_)
                | Self::Giving(_)
        )
    }
}

/// Before its welcome a peer that cannot be understood, is silent or goes away may be anything.
fn no_ferry(reason: Reason) -> Reason {
    match reason {
        Reason::LinkLost { what } => Reason::NoFerry { what },
        Reason::TimedOut { limit_ms, .. } => Reason::NoFerry {
            what: format!("it said nothing for {limit_ms} ms"),
        },
        reason => reason,
    }
}
