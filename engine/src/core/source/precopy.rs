//! From the greeting to the order to stop: the guest is here, and nothing is lost by giving up.

use ferry_stream::message::{Message, Mode, Versions, Welcome};

use super::lanes::Lanes;
use super::postcopy::Postcopy;
use super::round::{InFlight, Settled};
use super::{Flush, Hardware, Shared, State};
use crate::core::converge::Verdict;
use crate::core::encoding::EncodingTotals;
use crate::core::heat::Hot;
use crate::core::layout::PAGE_SIZE;
use crate::core::message::{
    Action, HandedOn, Input, Moment, Notice, Phase, Reason, Record, Rewritten,
};
use crate::core::meter::Progress;
use crate::core::pageset::PageSet;
use crate::core::postcopy::Way;
use crate::vmm::PauseFor;

/// Both sides get ready at the same time: the journal, the lanes, the device state and tracking
/// here, RAM there. What the guest writes meanwhile is sent again; that costs less than waiting. The
/// first round does not wait for tracking: it sends what is tracked already.
#[derive(Default)]
pub(super) struct Preparing {
    journaled: bool,
    state_open: bool,
    prepared: bool,
    tracking: Option<HandedOn>,
}

impl Shared {
    pub(super) fn greeted(&mut self, input: Input) -> State {
        match input {
            Input::Received(Message::Welcome(welcome)) => self.welcomed(welcome),
            input => self.unexpected(State::Greeting, &input),
        }
    }

    fn welcomed(&mut self, welcome: Welcome) -> State {
        let ours = Versions::OURS;
        if !(ours.lowest..=ours.highest).contains(&welcome.version) {
            let reason = Reason::Version {
                lowest: welcome.version,
                highest: welcome.version,
            };
            return self.refuse(reason);
        }
        let lanes_fit = (1..=self.config.lanes.most().get()).contains(&welcome.lanes);
        if !lanes_fit || !self.offered_features().contains(welcome.features) {
            let what = "a welcome with more than was offered";
            return self.refuse(Reason::Protocol {
                what,
                phase: Phase::Greeting,
            });
        }
        self.features = welcome.features;
        if let Err(reason) = self.agree_on_postcopy() {
            return self.refuse(reason);
        }
        self.journal(Record::Migrating);
        self.lanes = Lanes::none_of(welcome.lanes);
        self.open_first_lanes();
        self.actions.push_back(Action::OpenState);
        if !self.copies_nothing() {
            let into = self.blank_set();
            self.meter.tracking_ordered(self.now);
            self.actions.push_back(Action::StartTracking { into });
        }
        self.bound(self.config.limits.preparing);
        State::Preparing(Preparing::default())
    }
}

impl Preparing {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Journaled(Record::Migrating) => self.journaled = true,
            Input::StateOpen => self.state_open = true,
            Input::Received(Message::Prepared) if !self.prepared => self.prepared = true,
            Input::Tracking(handed_on) if self.tracking.is_none() => {
                shared.meter.tracking(shared.now);
                self.tracking = Some(handed_on);
            }
            input => return shared.unexpected(State::Preparing(self), &input),
        }
        self.advance(shared)
    }

    pub(super) fn advance(self, shared: &mut Shared) -> State {
        // One lane is enough to begin: the others join as they come, and a hello that hangs holds up
        // nobody.
        if self.journaled && shared.lanes.up() > 0 && self.state_open && self.prepared {
            shared.begin_copy(self.tracking)
        } else {
            State::Preparing(self)
        }
    }
}

/// A move without `--live`: the guest is being paused before the first round.
pub(super) struct Holding {
    tracking: Option<HandedOn>,
}

impl Holding {
    /// Somebody lets the guest run: it is copied live.
    pub(super) fn go_live(self, shared: &mut Shared) -> State {
        shared.first_round(self.tracking)
    }
}

impl Shared {
    fn begin_copy(&mut self, tracking: Option<HandedOn>) -> State {
        if self.copies_nothing() {
            return self.hand_over_at_once();
        }
        match self.config.mode {
            Mode::Live => self.first_round(tracking),
            Mode::Paused => {
                self.order_hold();
                self.bound(self.config.limits.stopping);
                State::Holding(Holding { tracking })
            }
        }
    }

    fn first_round(&mut self, tracking: Option<HandedOn>) -> State {
        self.order_flush();
        self.bound(self.config.limits.draining);
        let rewritten = self.rewritten();
        let in_flight = self.copy_tracked(tracking, rewritten);
        if self.way == Way::Due {
            self.actions.push_back(Action::CutShort);
        }
        State::Copying(Copying { in_flight })
    }

    fn copy_live(&mut self, pages: PageSet) -> State {
        self.bound(self.config.limits.draining);
        let rewritten = self.rewritten();
        State::Copying(Copying {
            in_flight: self.copy(pages, rewritten),
        })
    }

    /// A guest that stands writes nothing: not worth a look.
    fn rewritten(&self) -> Rewritten {
        match self.held {
            None => Rewritten::LeaveOut,
            Some(_) => Rewritten::Send,
        }
    }

    /// Keeps dirty caches of disk images small, so that the pause finds nothing to write.
    fn order_flush(&mut self) {
        if self.flush == Flush::None {
            self.flush = Flush::UnderWay;
            self.actions.push_back(Action::Flush);
        }
    }
}

impl Holding {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Tracking(handed_on) if self.tracking.is_none() => {
                shared.meter.tracking(shared.now);
                self.tracking = Some(handed_on);
                State::Holding(self)
            }
            Input::Paused { at, .. } => {
                shared.hold(at);
                shared.first_round(self.tracking)
            }
            input => shared.unexpected(State::Holding(self), &input),
        }
    }
}

/// A round is on its way.
pub(super) struct Copying {
    in_flight: InFlight,
}

impl Copying {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        if matches!(input, Input::Tracking(_)) {
            shared.meter.tracking(shared.now);
        }
        let settled = self.in_flight.note(shared, input);
        self.settled(shared, settled)
    }

    /// Whether the target has pages of a round to speak of.
    pub(super) fn awaits_round(&self) -> bool {
        !self.in_flight.is_done()
    }

    /// Whether the lanes have all pages of the round before them.
    pub(super) fn is_known(&self) -> bool {
        self.in_flight.is_known()
    }

    pub(super) fn advance(self, shared: &mut Shared) -> State {
        let settled = self.in_flight.settle(shared);
        self.settled(shared, settled)
    }

    fn settled(self, shared: &mut Shared, settled: Settled) -> State {
        match settled {
            Settled::NotYet => State::Copying(self),
            Settled::Unrelated(input) => shared.unexpected(State::Copying(self), &input),
            Settled::Wrong(reason) => shared.undo(reason),
            Settled::Done => {
                shared.unbound();
                if shared.config.postcopy == Postcopy::AfterPrecopy && shared.way == Way::Open {
                    shared.way = Way::Due;
                }
                if shared.way == Way::Due {
                    return shared.hand_over();
                }
                shared.collect_next()
            }
        }
    }
}

/// What was written during the last round is being collected.
pub(super) struct Collecting {
    /// Collected before and not sent yet.
    before: Option<PageSet>,
    awaits: Awaits,
}

/// What comes next to a collection.
#[derive(PartialEq, Eq)]
enum Awaits {
    /// Its result.
    Pages,
    /// The end of a flush, before another collection is worth anything.
    Flush,
}

impl Collecting {
    /// With pages that are known to be missing already.
    pub(super) fn after(left: PageSet) -> Self {
        Self {
            before: Some(left),
            awaits: Awaits::Pages,
        }
    }

    pub(super) fn handle(self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Collected { mut found } if self.awaits == Awaits::Pages => {
                shared.meter.collected(shared.now, found.len());
                let hot = shared.heat.collected(&mut found);
                if let Some(before) = self.before {
                    found.union(&before);
                }
                shared.add_owed(&mut found);
                shared.decide(found, &hot)
            }
            input => shared.unexpected(State::Collecting(self), &input),
        }
    }

    /// Nothing is waited for any more: a flush has ended or takes too long, or the guest stands.
    pub(super) fn go_on(mut self, shared: &mut Shared) -> State {
        if self.awaits == Awaits::Flush {
            self.awaits = Awaits::Pages;
            shared.unbound();
            shared.collect();
        }
        State::Collecting(self)
    }
}

impl Shared {
    fn collect_next(&mut self) -> State {
        self.collect();
        State::Collecting(Collecting {
            before: None,
            awaits: Awaits::Pages,
        })
    }

    fn decide(&mut self, mut dirty: PageSet, hot: &Hot) -> State {
        if self.way == Way::Due {
            return self.announce(dirty);
        }
        if self.held.is_some() {
            return self.stop(dirty);
        }
        self.tell_floor();
        match self.verdict(dirty.len()) {
            Verdict::Postcopy | Verdict::GiveUp if self.way == Way::Open => {
                self.tell(Notice::HandsOverBefore);
                self.way = Way::Due;
                self.announce(dirty)
            }
            // The pause would wait for the flush, with the guest standing. Further rounds would only
            // pass the time.
            Verdict::Stop if self.flush == Flush::UnderWay => {
                self.bound(self.config.limits.flushing);
                State::Collecting(Collecting {
                    before: Some(dirty),
                    awaits: Awaits::Flush,
                })
            }
            // A guest that stands must not wait for a lane to be opened.
            Verdict::Stop if self.lanes.up() > 0 => self.stop(dirty),
            Verdict::Postcopy | Verdict::GiveUp if self.gives_up() => {
                let reason = self.not_converging(dirty.len());
                self.undo(reason)
            }
            verdict => {
                if verdict == Verdict::Throttle {
                    self.throttle();
                }
                self.order_flush();
                let most = self.view(0).may_wait();
                self.heat.hold(hot, &mut dirty, most);
                self.meter.held(self.heat.waiting());
                self.copy_live(dirty)
            }
        }
    }

    /// Nothing will make rounds shrink: no time-out, no pause that is under way, no step whose outcome is
    /// not known yet.
    fn gives_up(&self) -> bool {
        self.timeout.is_none() && !self.hold_ordered && self.slowing.is_settled()
    }

    fn tell_floor(&mut self) {
        let view = self.view(0);
        let (limit, floor) = (view.limit, view.effective_limit());
        if floor > limit && !self.floor_told {
            self.floor_told = true;
            self.tell(Notice::LimitBelowFloor { limit, floor });
        }
    }

    fn not_converging(&self, dirty_pages: u64) -> Reason {
        let view = self.view(dirty_pages);
        let ms = |span: std::time::Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        Reason::NotConverging {
            predicted_ms: ms(view.predicted()),
            limit_ms: ms(view.effective_limit()),
            dirty_bytes_per_s: view.dirty_bytes_per_s,
            link_bytes_per_s: view.rate_bytes_per_s,
            throttled_percent: self.config.throttling.map(|_| self.slowing.percent()),
        }
    }

    /// Stops the guest with `dirty` still to send.
    pub(super) fn stop(&mut self, dirty: PageSet) -> State {
        self.timeout = None;
        self.hardware = Hardware::Due;
        let now = self.now;
        self.meter.blackout(|watch| watch.copied(now));
        self.abandon_opening_lanes();
        self.pause(PauseFor::Switchover);
        self.bound(self.config.limits.stopping);
        State::Stopping(super::Stopping { dirty })
    }

    pub(super) fn progress(&self, now: Moment, phase: Phase) -> Progress {
        let (done, all) = self.meter.open_pages();
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        let remaining = all.saturating_sub(done) + self.heat.waiting();
        let view = self.view(remaining);
        let measured = !self.meter.rounds().is_empty();
        Progress {
            phase,
            round: self.round.0,
            elapsed: now.0,
            done_bytes: bytes(done),
            remaining_bytes: bytes(remaining),
            bytes_wire: self.meter.bytes_wire(),
            rate_bytes_per_s: self.meter.rate(now),
            dirty_bytes_per_s: self.meter.dirty_rate(),
            predicted_blackout: measured.then(|| view.predicted()),
            left: (all > 0).then(|| view.transfer(remaining)),
            lanes: self.lanes.up(),
            lanes_lost: self.lanes.lost(),
            downtime_limit: self.config.downtime_limit,
            throttled_percent: self.slowing.percent(),
            throttled_percent_max: self.slowing.most(),
            encoding: EncodingTotals::default(),
            given_away: self.given_away,
            postcopy: self.way,
        }
    }
}
