//! Slowing a guest that writes faster than the link carries, and giving it its time back.
//!
//! The guest has all of its time before every pause and on every way out: what is slow may hold up the
//! VMM, and nobody gets back a guest that was left so.

use std::collections::VecDeque;

use super::{Shared, State};
use crate::core::message::{Action, Failure, Notice};
use crate::core::outcome::in_full;
use crate::core::throttle::{Throttle, Throttling};
use crate::vmm::PauseFor;

/// How slow the guest is, as far as is known.
#[derive(Debug, Default)]
pub(super) struct Slowing {
    /// `None` when nobody wants it slowed, or it cannot be.
    throttle: Option<Throttle>,
    /// Orders that are not answered yet, in percent of the guest's time. They are answered in turn, and a
    /// failure does not say which one it is.
    ordered: VecDeque<u8>,
    now: Now,
    most: u8,
}

/// How slow the guest was left by the last order that was answered.
#[derive(Clone, Copy, Debug)]
enum Now {
    /// By so much of its time, in percent.
    By(u8),
    /// An order failed, and may have been followed in part.
    Unknown(u8),
}

impl Default for Now {
    fn default() -> Self {
        Self::By(0)
    }
}

impl Slowing {
    pub(super) fn new(config: Option<Throttling>) -> Self {
        Self {
            throttle: config.map(Throttle::new),
            ..Self::default()
        }
    }

    /// In percent of its time.
    pub(super) fn percent(&self) -> u8 {
        match self.now {
            Now::By(percent) | Now::Unknown(percent) => percent,
        }
    }

    /// The most so far, in percent of its time.
    pub(super) fn most(&self) -> u8 {
        self.most
    }

    /// Whether it can be slowed further, by what is known now.
    pub(super) fn has_more(&self) -> bool {
        self.is_settled() && self.throttle.is_some_and(Throttle::has_more)
    }

    /// Whether every order was answered.
    pub(super) fn is_settled(&self) -> bool {
        self.ordered.is_empty()
    }

    /// Whether it may be slow once everything ordered is done.
    fn needs_lift(&self) -> bool {
        match (self.ordered.back().copied(), self.now) {
            (Some(percent), _) | (None, Now::By(percent)) => percent > 0,
            (None, Now::Unknown(_)) => true,
        }
    }
}

impl Shared {
    /// Slows the guest, or slows it further.
    pub(super) fn throttle(&mut self) {
        // Who is about to stand needs not be slowed.
        if self.hold_ordered || !self.slowing.has_more() {
            return;
        }
        let (sent, written) = (self.meter.rate(self.now), self.meter.dirty_rate());
        let throttle = self.slowing.throttle.as_mut();
        if let Some(percent) = throttle.map(|throttle| throttle.step(sent, written)) {
            self.order_throttle(percent);
        }
    }

    /// Gives the guest all of its time back, if it may lack some.
    pub(super) fn lift_throttle(&mut self) {
        if let Some(throttle) = &mut self.slowing.throttle {
            throttle.lift();
        }
        if self.slowing.needs_lift() {
            self.order_throttle(0);
        }
    }

    /// Pauses the guest, with all of its time: a vCPU that waits for its own may hold QEMU's lock.
    pub(super) fn pause(&mut self, why: PauseFor) {
        self.lift_throttle();
        self.actions.push_back(Action::Pause(why));
    }

    fn order_throttle(&mut self, percent: u8) {
        self.slowing.ordered.push_back(percent);
        self.actions.push_back(Action::Throttle(percent));
    }

    pub(super) fn throttled(&mut self, percent: u8) {
        if self.slowing.ordered.pop_front().is_none() {
            return;
        }
        self.slowing.now = Now::By(percent);
        self.slowing.most = self.slowing.most.max(percent);
        if percent > 0 {
            self.tell(Notice::Throttled(percent));
        }
    }

    /// The guest is not as slow as was ordered, or not as fast. Neither is worth the move.
    pub(super) fn not_throttled(&mut self, state: State, failure: &Failure) -> State {
        let Some(wanted) = self.slowing.ordered.pop_front() else {
            return state;
        };
        self.slowing.now = Now::Unknown(self.slowing.percent());
        // Putting everything back is another attempt, and tells of its own failure.
        if matches!(state, State::Undoing(_)) {
            return state;
        }
        let what = in_full(failure);
        if wanted == 0 {
            self.tell(Notice::Leftover(format!(
                "the guest may not have all of its time back: {what}"
            )));
        } else if self.slowing.throttle.take().is_some() {
            self.tell(Notice::NotThrottled { what });
            self.lift_throttle();
        }
        state
    }
}
