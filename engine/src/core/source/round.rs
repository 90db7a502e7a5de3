//! A round: its pages go out on every lane, and it is over when both sides count the same.

use std::sync::Arc;

use ferry_stream::message::{Message, Round};

use super::Shared;
use crate::core::message::{Action, Deltas, Input, Pace, Reason, Rewritten, ZeroPages};
use crate::core::pageset::PageSet;

impl Shared {
    /// Orders the next round over `pages`, which a collection follows.
    pub(super) fn copy(&mut self, pages: PageSet, rewritten: Rewritten) -> InFlight {
        let deltas = self.next_deltas();
        self.order_copy(pages, rewritten, Pace::Limited, deltas)
    }

    /// Orders the next round over `pages`, with the guest being handed over. Another one follows.
    pub(super) fn copy_standing(&mut self, pages: PageSet) -> InFlight {
        let deltas = self.next_deltas();
        self.order_copy(pages, Rewritten::Send, Pace::Free, deltas)
    }

    /// Orders the round over `pages` that shall be the last: the target may load when it is done.
    pub(super) fn copy_last(&mut self, pages: PageSet) -> InFlight {
        let deltas = self.no_deltas();
        self.order_copy(pages, Rewritten::Send, Pace::Free, deltas)
    }

    fn order_copy(
        &mut self,
        pages: PageSet,
        rewritten: Rewritten,
        pace: Pace,
        deltas: Deltas,
    ) -> InFlight {
        self.round = Round(self.round.0 + 1);
        self.meter.begin_round(self.now, self.round, pages.len());
        self.lanes.begin(self.round);
        if let Some(growth) = &mut self.growth {
            growth.interrupted();
        }
        let zeros = if self.round.0 == 1 {
            ZeroPages::Skip
        } else {
            ZeroPages::Tell
        };
        self.actions.push_back(Action::Copy {
            round: self.round,
            pages: Arc::new(pages),
            zeros,
            rewritten,
            deltas,
            pace,
        });
        InFlight {
            round: self.round,
            done: None,
        }
    }
}

/// A round on its way: over when every lane has sent its end and the target says that it is done, in
/// whichever order the two become known.
pub(super) struct InFlight {
    round: Round,
    /// Pages that the target counts.
    done: Option<u64>,
}

/// What a fact means to a round on its way.
pub(super) enum Settled {
    /// It is not about the round.
    Unrelated(Input),
    /// It is still on its way.
    NotYet,
    /// Every page is in place, but for what dead lanes owe.
    Done,
    /// The two sides count differently.
    Wrong(Reason),
}

impl InFlight {
    pub(super) fn note(&mut self, shared: &mut Shared, input: Input) -> Settled {
        match input {
            Input::Received(Message::RoundDone { round, pages })
                if round == self.round && self.done.is_none() =>
            {
                self.done = Some(pages);
                self.settle(shared)
            }
            input => Settled::Unrelated(input),
        }
    }

    /// Whether the target has said that the round is done.
    pub(super) fn is_done(&self) -> bool {
        self.done.is_some()
    }

    /// Looks whether the round is over, once a lane has moved on.
    pub(super) fn settle(&self, shared: &mut Shared) -> Settled {
        let (Some(ours), Some(theirs)) = (shared.lanes.sum(), self.done) else {
            return Settled::NotYet;
        };
        if ours != theirs {
            return Settled::Wrong(Reason::Miscounted {
                round: self.round,
                ours,
                theirs,
            });
        }
        shared.pages_told += ours;
        shared.meter.end_round(shared.now);
        Settled::Done
    }
}
