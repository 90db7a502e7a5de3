//! Post-copy: the guest is handed over without all of its pages, and they come after it.
//!
//! ```text
//!  Copying ─cut short─► Announcing ─► Stopping ─► Switching ─► Offering ─► … Given ─► Serving ─► Leaving
//!                       Absent and     the guest    the rest, and                     until the target
//!                       Discard        stands       Complete                          is whole
//! ```
//!
//! From Complete on the missing pages are served, for the target's load may want some already. The
//! guest stands here, so what is served does not change; its RAM is kept until every page is there.
//! Up to Go everything can still be put back: the target has nothing that is missing here.

use std::time::Duration;

use ferry_stream::message::{Features, Message};

use super::precopy::Collecting;
use super::switchover::Saved;
use super::{Shared, State};
use crate::core::converge::Verdict;
use crate::core::message::{Action, Input, Moment, Notice, Reason};
use crate::core::pageset::PageSet;
use crate::core::postcopy::Way;
use crate::core::postcopy::absence::absences;

/// Whether a guest may be handed over before its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Postcopy {
    /// No.
    #[default]
    Never,
    /// When it is ordered, or when the rule says that precopy cannot meet the downtime limit.
    Allowed,
    /// After the first round.
    AfterPrecopy,
    /// At once: nothing is copied before.
    Now,
}

/// Looks within a round at whether copying can keep up.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// One is under way.
    under_way: bool,
    /// By the last one it could not.
    outrun: bool,
}

impl Shared {
    /// The target has said what it is able to. An error where it cannot do what was asked for.
    pub(super) fn agree_on_postcopy(&mut self) -> Result<(), Reason> {
        let able = self.features.contains(Features::POSTCOPY);
        match (self.config.postcopy, able) {
            (Postcopy::Never, _) => {}
            (Postcopy::Now, true) => self.way = Way::Due,
            (Postcopy::Allowed | Postcopy::AfterPrecopy, true) => self.way = Way::Open,
            (Postcopy::Allowed, false) => self.tell(Notice::NoPostcopy),
            (Postcopy::Now | Postcopy::AfterPrecopy, false) => return Err(Reason::NoPostcopy),
        }
        Ok(())
    }

    /// Whether nothing is copied before the guest is handed over.
    pub(super) fn copies_nothing(&self) -> bool {
        self.config.postcopy == Postcopy::Now
    }

    /// A person, the time-out or the rule wants the guest handed over now.
    pub(super) fn order_postcopy(&mut self, state: &State) {
        match self.way {
            Way::Closed => self.tell(Notice::NoPostcopy),
            Way::Open => {
                self.way = Way::Due;
                self.timeout = None;
                if matches!(state, State::Copying(_)) {
                    self.actions.push_back(Action::CutShort);
                }
            }
            Way::Due | Way::Taken | Way::Whole => {}
        }
    }

    /// Looks, within a round, whether copying can keep up: a round may take long.
    pub(super) fn peek(&mut self) {
        if self.way == Way::Open && !self.looks.under_way {
            self.looks.under_way = true;
            self.actions.push_back(Action::Peek);
        }
    }

    pub(super) fn peeked(&mut self, state: &State, dirty: u64) {
        self.looks.under_way = false;
        if self.way != Way::Open || !matches!(state, State::Copying(_)) {
            return;
        }
        let Some(written) = self.meter.written_so_far(self.now, dirty) else {
            return;
        };
        let verdict = self.verdict_within(dirty, written);
        // One look may be at a burst.
        if verdict != Verdict::Postcopy || !std::mem::replace(&mut self.looks.outrun, true) {
            self.looks.outrun = verdict == Verdict::Postcopy;
            return;
        }
        self.tell(Notice::HandsOverBefore);
        self.order_postcopy(state);
    }

    /// Nothing is copied: all that the guest has will be missing.
    pub(super) fn hand_over_at_once(&mut self) -> State {
        let nothing = self.blank_set();
        self.survey(nothing);
        self.bound(self.config.limits.draining);
        State::Surveying
    }

    fn survey(&mut self, known: PageSet) {
        let into = self.blank_set();
        self.actions.push_back(Action::Survey { known, into });
    }

    /// What the guest has, with it running.
    pub(super) fn surveyed(&mut self, input: Input) -> State {
        match input {
            Input::Collected { found } => self.announce(found),
            input => self.unexpected(State::Surveying, &input),
        }
    }

    /// Has the target discard what is known to be missing while the guest runs on: to do it takes time.
    pub(super) fn announce(&mut self, missing: PageSet) -> State {
        if missing.is_empty() {
            return self.stop(missing);
        }
        for absence in absences(&missing) {
            self.send(Message::Absent(absence));
        }
        self.send(Message::Discard);
        self.bound(self.config.limits.draining);
        State::Announcing(missing)
    }

    /// The target has discarded what it was told of.
    pub(super) fn announced(&mut self, missing: PageSet, input: Input) -> State {
        match input {
            Input::Received(Message::Discarded) => self.stop(missing),
            input => self.unexpected(State::Announcing(missing), &input),
        }
    }

    /// A round was cut short, or is over: what nobody has taken of it is missing.
    pub(super) fn hand_over(&mut self) -> State {
        let into = self.blank_set();
        self.actions.push_back(Action::TakeLeft { into });
        State::CutShort
    }

    /// What is left of the round is known.
    pub(super) fn cut_short(&mut self, input: Input) -> State {
        match input {
            Input::Left { left } => {
                // What was written since goes with it: the more is known now, the less is to be done while
                // the guest stands.
                self.collect();
                State::Collecting(Collecting::after(left))
            }
            input => self.unexpected(State::CutShort, &input),
        }
    }

    /// The guest stands, and what it lacks at the target is looked for.
    pub(super) fn switch(&mut self, dirty: PageSet) -> State {
        self.way = Way::Taken;
        self.send(Message::Paused);
        self.actions.push_back(Action::Save);
        self.bound_standing();
        State::Switching(Switching {
            dirty,
            saved: None,
            found: None,
        })
    }
}

/// The guest stands; its device state is saved, and what it wrote is looked for.
pub(super) struct Switching {
    /// Known to be missing before.
    dirty: PageSet,
    saved: Option<Saved>,
    /// What the last look has found.
    found: Option<PageSet>,
}

impl Switching {
    pub(super) fn handle(mut self, shared: &mut Shared, input: Input) -> State {
        match input {
            Input::Saved { bytes, crc } if self.saved.is_none() => {
                let at = shared.now;
                self.saved = Some(Saved { bytes, crc, at });
                shared.meter.state(bytes);
                shared.read_hardware();
                // Saving may write RAM: only now.
                if shared.copies_nothing() {
                    shared.survey(self.dirty.clone());
                } else {
                    let into = shared.blank_set();
                    shared.actions.push_back(Action::CollectLast { into });
                }
            }
            Input::Collected { mut found } if self.saved.is_some() && self.found.is_none() => {
                // What was kept waiting for the last round is missing as well.
                drop(shared.heat.collected(&mut found));
                self.found = Some(found);
            }
            Input::Inventoried(now) => {
                if let Some(reason) = shared.compare(&now) {
                    return shared.undo(reason);
                }
            }
            input => return shared.unexpected(State::Switching(self), &input),
        }
        self.advance(shared)
    }

    /// What dead lanes have brought must be known, too.
    pub(super) fn advance(self, shared: &mut Shared) -> State {
        match self {
            Self {
                dirty,
                saved: Some(saved),
                found: Some(found),
            } if shared.lanes.sum().is_some() => shared.complete_without(&dirty, found, saved),
            switching => State::Switching(switching),
        }
    }
}

impl Shared {
    /// Tells the target what it has to do without.
    fn complete_without(&mut self, dirty: &PageSet, found: PageSet, saved: Saved) -> State {
        let now = self.now;
        self.meter.blackout(|watch| {
            watch.placed(saved.at);
            watch.copied_and_saved(saved.at, now);
        });
        let mut missing = dirty.clone();
        missing.union(&found);
        self.add_owed(&mut missing);
        let mut new = missing.clone();
        for (region, range) in dirty.ranges() {
            let known = new.remove(region, range);
            known.expect("both are sets over one layout");
        }
        for absence in absences(&new) {
            self.send(Message::Absent(absence));
        }
        self.say_complete(self.pages_told, saved);
        self.meter.handed_over_without(now, missing.len());
        // The guest wrote there last, and will again.
        let first = if self.copies_nothing() {
            self.blank_set()
        } else {
            found
        };
        if missing.is_empty() {
            self.way = Way::Whole;
        } else {
            self.actions.push_back(Action::Serve { missing, first });
        }
        self.bound(self.config.limits.offering);
        State::Offering(super::switchover::Offering::of_the_rest(saved))
    }

    /// The target is whole: it may be so before it runs.
    pub(super) fn whole(&mut self, state: State) -> State {
        if self.way == Way::Taken {
            self.way = Way::Whole;
            self.meter.whole(self.now);
        }
        match state {
            State::Serving => self.depart(),
            state => state,
        }
    }

    /// The guest runs at the target, which took `resume` to let it, if that is known.
    pub(super) fn runs_there(&mut self, resume: Duration) -> State {
        self.meter.runs(self.now, resume);
        if self.way == Way::Taken {
            self.unbound();
            return State::Serving;
        }
        self.depart()
    }

    /// Whatever happens here, the target needs its pages: only they, or a person, end this.
    pub(super) fn trouble_while_serving(&mut self, reason: Reason) -> State {
        match reason {
            // Its guest is gone, and needs nothing any more.
            Reason::PeerAborted { .. } => return self.in_doubt(reason),
            // The lanes that pages go over have links of their own.
            Reason::LinkLost { .. } => {}
            reason => self.tell(Notice::Leftover(reason.to_string())),
        }
        State::Serving
    }

    /// Until when the target is asked whose the guest is: as long as it takes where it may run and wait
    /// for pages.
    pub(super) fn asks_until(&self) -> Moment {
        match self.way {
            Way::Taken => Moment(Duration::MAX),
            _ => self.now.after(self.config.limits.asking),
        }
    }
}
