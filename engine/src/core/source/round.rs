//! A round: its pages go out on every lane, and it is over when both sides count the same.

use std::sync::Arc;

use ferry_stream::message::{Message, Round};

use super::Shared;
use crate::core::message::{Action, Input, LaneTotals, Reason, ZeroPages};
use crate::core::pageset::PageSet;

impl Shared {
    /// Orders the next round over `pages`.
    pub(super) fn copy(&mut self, pages: PageSet) -> InFlight {
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
}

/// A round on its way: sent when every lane has sent its end, done when the target says so, in
/// whichever order the two become known.
pub(super) struct InFlight {
    round: Round,
    sent: Option<LaneTotals>,
    done: Option<u64>,
}

/// What a fact means to a round on its way.
pub(super) enum Settled {
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
    pub(super) fn note(&mut self, shared: &mut Shared, input: Input) -> Settled {
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
