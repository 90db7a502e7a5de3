//! From the order to stop to the target's word: the guest stands still, and then has a new owner.
//!
//! The order of what happens here is law. The guest is paused and its I/O has landed; its state is
//! saved, which may still write RAM; only then the last collection. The target says Ready with
//! everything loaded; the journal says given, durably; then, and never before, Go.

use std::time::Duration;

use ferry_stream::message::{Message, Verdict};

use super::round::{InFlight, Settled};
use super::{Hardware, Shared, State};
use crate::core::message::{
    Action, HandedOn, Input, Moment, Notice, Outcome, Reason, Record, run_order,
};
use crate::core::pageset::PageSet;
use crate::core::postcopy::Way;
use crate::vmm::{Inventory, Rearm};

/// The guest is being paused.
pub(super) struct Stopping {
    /// Collected before the pause, not sent yet.
    pub(super) dirty: PageSet,
}

impl Stopping {
    pub(super) fn handle(self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Paused { at, drained } => shared.drain(self.dirty, at, drained),
            input => shared.unexpected(State::Stopping(self), &input),
        }
    }
}

impl Shared {
    fn drain(&mut self, mut dirty: PageSet, stopped: Moment, drained: Moment) -> State {
        self.meter.stopped(self.held.unwrap_or(stopped));
        let now = self.now;
        self.meter.blackout(|watch| watch.paused(drained, now));
        if self.way == Way::Due {
            return self.switch(dirty);
        }
        self.send(Message::Paused);
        self.actions.push_back(Action::Save);
        self.add_owed(&mut dirty);
        // Saving the state may write RAM still: what it writes is for the last scan to find.
        let in_flight = self.copy_scanned(Rearm::Yes, dirty);
        self.bound_standing();
        State::Draining(Draining {
            left: Left::Sending(in_flight),
            saved: None,
        })
    }
}

/// The guest stands. Two things go on side by side: the pages it left dirty are sent while they are
/// being looked for, and its device state is saved. When both are done, what the saving wrote is looked
/// for and sent in the same way. How much that is, is known when the last scan has ended.
pub(super) struct Draining {
    left: Left,
    saved: Option<Saved>,
}

/// The device state, as saved.
#[derive(Clone, Copy)]
pub(super) struct Saved {
    pub(super) bytes: u64,
    pub(super) crc: u32,
    pub(super) at: Moment,
}

/// How far the pages are that the guest left dirty.
enum Left {
    /// On their way.
    Sending(InFlight),
    /// In place.
    Placed,
    /// The last of them are on their way, and being looked for.
    Last(Last),
}

/// The last round, as long as its pages are not known.
struct Last {
    in_flight: InFlight,
    saved: Saved,
    /// Lanes that had died before it.
    lost: u32,
}

impl Draining {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        if let Input::Scanned(handed_on) = &input {
            let starved = handed_on.starved;
            shared.meter.blackout(|watch| watch.scanned(starved));
        }
        match (input, &mut self.left) {
            (Input::Inventoried(now), _) => {
                if let Some(reason) = shared.compare(&now) {
                    return shared.undo(reason);
                }
            }
            (Input::Saved { bytes, crc }, _) if self.saved.is_none() => {
                let at = shared.now;
                self.saved = Some(Saved { bytes, crc, at });
                shared.meter.state(bytes);
                shared.read_hardware();
            }
            (Input::Scanned(handed_on), Left::Last(_)) => return self.complete(shared, handed_on),
            (input, Left::Sending(in_flight) | Left::Last(Last { in_flight, .. })) => {
                let settled = in_flight.note(shared, input);
                return self.settled(shared, settled);
            }
            (input, Left::Placed) => return shared.unexpected(State::Draining(self), &input),
        }
        self.advance(shared)
    }

    /// Whether the target has pages of a round to speak of.
    pub(super) fn awaits_round(&self) -> bool {
        matches!(&self.left, Left::Sending(in_flight) if !in_flight.is_done())
    }

    /// A lane has moved on, and perhaps the round with it.
    pub(super) fn moved(self, shared: &mut Shared) -> State {
        match &self.left {
            Left::Placed => State::Draining(self),
            Left::Sending(in_flight) | Left::Last(Last { in_flight, .. }) => {
                let settled = in_flight.settle(shared);
                self.settled(shared, settled)
            }
        }
    }

    fn settled(mut self, shared: &mut Shared, settled: Settled) -> State {
        match settled {
            Settled::NotYet => {}
            Settled::Done => {
                let now = shared.now;
                shared.meter.blackout(|watch| watch.placed(now));
                shared.bound(shared.config.limits.draining);
                self.left = Left::Placed;
            }
            Settled::Wrong(reason) => return shared.undo(reason),
            Settled::Unrelated(input) => {
                return shared.unexpected(State::Draining(self), &input);
            }
        }
        self.advance(shared)
    }

    fn advance(mut self, shared: &mut Shared) -> State {
        if let (Some(saved), Left::Placed) = (self.saved, &self.left) {
            let now = shared.now;
            shared
                .meter
                .blackout(|watch| watch.copied_and_saved(saved.at, now));
            let mut owed = shared.blank_set();
            shared.add_owed(&mut owed);
            let lost = shared.lanes.lost();
            shared.bound_standing();
            self.left = Left::Last(Last {
                in_flight: shared.copy_scanned(Rearm::No, owed),
                saved,
                lost,
            });
        }
        State::Draining(self)
    }

    /// Says at once what will be complete when the last round is: the target then need not be told
    /// again, which is a round trip less in the blackout. Every page of a later round is told, so
    /// their number is known with the end of the scan. But not what a lane has taken that died
    /// meanwhile: then it is said when the round is done.
    fn complete(self, shared: &mut Shared, handed_on: HandedOn) -> State {
        let Left::Last(mut last) = self.left else {
            return State::Draining(self);
        };
        last.in_flight.scanned(shared, handed_on);
        let complete = if last.lost == shared.lanes.lost() {
            shared.say_complete(shared.pages_told + handed_on.pages, last.saved);
            Complete::Stands
        } else {
            Complete::Void
        };
        // All else may have come before the scan's own word.
        let offering = shared.offering(last.in_flight, last.saved, complete);
        offering.moved(shared)
    }
}

impl Shared {
    /// One more round, with what dead lanes owe.
    fn last_round(&mut self, last: PageSet, saved: Saved) -> State {
        let pages = self.pages_told + last.len();
        let in_flight = self.copy_last(last);
        self.say_complete(pages, saved);
        State::Offering(self.offering(in_flight, saved, Complete::Stands))
    }

    fn offering(&mut self, in_flight: InFlight, saved: Saved, complete: Complete) -> Offering {
        self.bound_standing();
        Offering {
            saved,
            complete,
            in_flight: Some(in_flight),
            ready: false,
        }
    }

    pub(super) fn say_complete(&mut self, pages: u64, saved: Saved) {
        self.send(Message::Complete {
            round: self.round,
            pages,
            state_bytes: saved.bytes,
            state_crc: saved.crc,
        });
    }
}

impl Shared {
    /// Orders the inventory, behind the save and not before it: the target loads meanwhile, and nobody
    /// but the journal's "given" has to wait for it.
    pub(super) fn read_hardware(&mut self) {
        self.hardware = Hardware::Read;
        self.actions.push_back(Action::Inventory);
    }

    /// The hardware may have changed since it was offered, up to the pause and no later.
    pub(super) fn compare(&mut self, now: &Inventory) -> Option<Reason> {
        self.hardware = Hardware::Same;
        difference(&self.inventory, now).map(|what| Reason::InventoryChanged { what })
    }
}

/// What is different between two readings of one VM, in words.
fn difference(before: &Inventory, now: &Inventory) -> Option<String> {
    if let Some(first) = before.layout.differences(&now.layout).first() {
        return Some(first.to_string());
    }
    let added = now
        .devices
        .iter()
        .find(|device| !before.devices.contains(device));
    let removed = before
        .devices
        .iter()
        .find(|device| !now.devices.contains(device));
    match (added, removed) {
        (Some(device), _) => Some(format!("{device} was added")),
        (None, Some(device)) => Some(format!("{device} was removed")),
        (None, None) => (before.machine != now.machine).then(|| "the machine type".to_owned()),
    }
}

/// A duration, as the target tells it.
fn micros(us: u32) -> Duration {
    Duration::from_micros(us.into())
}

/// Everything is on its way; the target loads.
pub(super) struct Offering {
    saved: Saved,
    complete: Complete,
    /// The last round, until it is in place.
    in_flight: Option<InFlight>,
    ready: bool,
}

/// Whether the target goes by what it was told of the end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Complete {
    Stands,
    /// A lane died in the last round: the target was told nothing, or has forgotten it with the fence.
    Void,
}

impl Offering {
    /// No page is on its way but what the guest runs without.
    pub(super) fn of_the_rest(saved: Saved) -> Self {
        Self {
            saved,
            complete: Complete::Stands,
            in_flight: None,
            ready: false,
        }
    }

    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        let settled = match &mut self.in_flight {
            None => Settled::Unrelated(input),
            Some(in_flight) => in_flight.note(shared, input),
        };
        self.settled(shared, settled)
    }

    /// A lane has moved on, and perhaps the round with it.
    pub(super) fn moved(self, shared: &mut Shared) -> State {
        match &self.in_flight {
            None => State::Offering(self),
            Some(in_flight) => {
                let settled = in_flight.settle(shared);
                self.settled(shared, settled)
            }
        }
    }

    fn settled(self, shared: &mut Shared, settled: Settled) -> State {
        match settled {
            Settled::NotYet => State::Offering(self),
            Settled::Wrong(reason) => shared.undo(reason),
            Settled::Unrelated(input) => self.unrelated(shared, &input),
            Settled::Done => self.round_done(shared),
        }
    }

    /// True until the last round is known to be in place.
    pub(super) fn is_sending(&self) -> bool {
        self.in_flight.is_some()
    }

    /// A lane was fenced after the target was told what will be complete. That is void, unless the
    /// round was done before: then nothing was owed either.
    pub(super) fn fenced(&mut self) {
        if self
            .in_flight
            .as_ref()
            .is_some_and(|round| !round.is_done())
        {
            self.complete = Complete::Void;
        }
    }

    /// The round is done. What dead lanes owe goes in another one.
    fn round_done(mut self, shared: &mut Shared) -> State {
        if let Some(owed) = shared.lanes.take_owed() {
            return shared.last_round(owed, self.saved);
        }
        self.in_flight = None;
        shared.bound(shared.config.limits.offering);
        if self.complete == Complete::Void {
            self.complete = Complete::Stands;
            shared.say_complete(shared.pages_told, self.saved);
        }
        self.give_when_ready(shared)
    }

    fn unrelated(mut self, shared: &mut Shared, input: &Input) -> State {
        match input {
            // The target may be faster than our own lanes are to say that the round is out.
            Input::Received(Message::Ready { load_us }) if !self.ready => {
                self.ready = true;
                let (now, load) = (shared.now, micros(*load_us));
                shared.meter.blackout(|watch| watch.ready(now, load));
            }
            Input::Inventoried(now) => {
                if let Some(reason) = shared.compare(now) {
                    return shared.undo(reason);
                }
            }
            input => return shared.unexpected(State::Offering(self), input),
        }
        self.give_when_ready(shared)
    }

    fn give_when_ready(self, shared: &mut Shared) -> State {
        let is_complete = self.in_flight.is_none() && shared.hardware == Hardware::Same;
        if !self.ready || !is_complete {
            return State::Offering(self);
        }
        shared.unbound();
        shared.journal(Record::Given);
        State::Giving(Giving)
    }
}

/// "Given" is being written. Go has not been said, so trouble keeps the guest, and at once: a journal
/// that hangs must not hold a guest that stands. Records are written in order, so "kept" comes after
/// a "given" that is still written.
pub(super) struct Giving;

impl Giving {
    pub(super) fn handle(self, shared: &mut Shared, input: &Input) -> State {
        match input {
            Input::Journaled(Record::Given) => shared.go(),
            input => shared.unexpected(State::Giving(self), input),
        }
    }
}

impl Shared {
    fn go(&mut self) -> State {
        let run = run_order(self.config.run_at_target.unwrap_or(self.wanted));
        let now = self.now;
        self.meter.blackout(|watch| watch.given(now));
        self.send(Message::Go { run });
        self.given_away = true;
        self.bound(self.config.limits.given);
        State::Given(Given)
    }
}

/// The guest is given away. From here on only the target's word counts.
pub(super) struct Given;

impl Given {
    pub(super) fn handle(self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Received(Message::Running { resume_us }) => shared.runs_there(micros(resume_us)),
            Input::Received(Message::Returned { reason }) => {
                shared.undo(Reason::Returned { text: reason })
            }
            // Anything else that comes is no word about the guest: ask.
            input => shared.unexpected(State::Given(self), &input),
        }
    }

    pub(super) fn trouble(self, shared: &mut Shared, reason: Reason) -> State {
        match reason {
            Reason::LinkLost { .. }
            | Reason::PeerAborted { .. }
            | Reason::TimedOut { .. }
            | Reason::Protocol { .. } => shared.ask(reason),
            // The guest's VMM here, its tracking, its lanes: none of them owns the guest any more.
            reason => {
                shared.tell(Notice::Leftover(reason.to_string()));
                State::Given(self)
            }
        }
    }
}

/// The target is being asked.
pub(super) struct Asking {
    reason: Reason,
    until: Moment,
    /// Whether an attempt is under way.
    attempt: Attempt,
}

#[derive(PartialEq, Eq)]
enum Attempt {
    UnderWay,
    Due,
}

impl Shared {
    fn ask(&mut self, reason: Reason) -> State {
        self.tell(Notice::AskingTarget);
        self.actions.push_back(Action::Ask);
        self.unbound();
        let until = self.asks_until();
        State::Asking(Asking {
            reason,
            until,
            attempt: Attempt::UnderWay,
        })
    }
}

impl Asking {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Received(Message::Running { resume_us }) => shared.runs_there(micros(resume_us)),
            Input::Answered(Some(Verdict::Taken)) => shared.runs_there(Duration::ZERO),
            Input::Answered(Some(Verdict::Refused)) => shared.undo(Reason::Refused),
            Input::Answered(Some(Verdict::Returned)) => {
                let text = "the target says so when asked".to_owned();
                shared.undo(Reason::Returned { text })
            }
            Input::Received(Message::Returned { reason }) => {
                shared.undo(Reason::Returned { text: reason })
            }
            Input::Answered(None) if shared.now >= self.until => shared.in_doubt(self.reason),
            Input::Answered(None) => {
                self.attempt = Attempt::Due;
                shared.bound(shared.config.limits.ask_again);
                State::Asking(self)
            }
            input => shared.unexpected(State::Asking(self), &input),
        }
    }

    pub(super) fn ask_again(mut self, shared: &mut Shared) -> State {
        if self.attempt == Attempt::Due {
            self.attempt = Attempt::UnderWay;
            shared.actions.push_back(Action::Ask);
        }
        State::Asking(self)
    }

    pub(super) fn trouble(self, shared: &mut Shared, reason: &Reason) -> State {
        if !matches!(reason, Reason::LinkLost { .. }) {
            shared.tell(Notice::Leftover(reason.to_string()));
        }
        State::Asking(self)
    }
}

impl Shared {
    /// A person decides. Neither VMM is touched; tracking ends, which the guest does not notice.
    pub(super) fn in_doubt(&mut self, reason: Reason) -> State {
        self.actions.push_back(Action::CloseLanes);
        self.actions.push_back(Action::StopTracking);
        self.finish(Outcome::InDoubt { reason })
    }
}
