//! A round: its pages go out on every lane, and it is over when both sides count the same.

use std::sync::Arc;

use ferry_stream::message::{Message, Round};

use super::Shared;
use crate::core::message::{
    Action, Deltas, HandedOn, Input, Pace, Pages, Reason, Rewritten, ZeroPages,
};
use crate::core::pageset::PageSet;
use crate::vmm::Rearm;

/// How the next round is sent.
#[derive(Clone, Copy)]
struct Manner {
    rewritten: Rewritten,
    deltas: Deltas,
    pace: Pace,
}

impl Manner {
    /// While the guest runs.
    fn live(rewritten: Rewritten, deltas: Deltas) -> Self {
        Self {
            rewritten,
            deltas,
            pace: Pace::Limited,
        }
    }

    /// With the guest being handed over.
    fn standing(deltas: Deltas) -> Self {
        Self {
            rewritten: Rewritten::Send,
            deltas,
            pace: Pace::Free,
        }
    }
}

impl Shared {
    /// Orders the next round over `pages`, which a collection follows.
    pub(super) fn copy(&mut self, pages: PageSet, rewritten: Rewritten) -> InFlight {
        let manner = Manner::live(rewritten, self.next_deltas());
        self.copy_known(pages, manner)
    }

    /// Orders the first round, over what is handed on while tracking is started.
    pub(super) fn copy_tracked(
        &mut self,
        populated: Option<HandedOn>,
        rewritten: Rewritten,
    ) -> InFlight {
        let most = self.inventory.layout.pages();
        let manner = Manner::live(rewritten, self.next_deltas());
        let mut in_flight = self.order_copy(Pages::Scanned, most, manner);
        if let Some(handed_on) = populated {
            in_flight.scanned(self, handed_on);
        }
        in_flight
    }

    /// Orders the round over `pages` that shall be the last: the target may load when it is done.
    pub(super) fn copy_last(&mut self, pages: PageSet) -> InFlight {
        let manner = Manner::standing(self.no_deltas());
        self.copy_known(pages, manner)
    }

    /// Orders a scan with the guest being handed over, and the next round over what it finds and what
    /// is dirty anyway.
    pub(super) fn copy_scanned(&mut self, rearm: Rearm, with: PageSet) -> InFlight {
        let least = with.len();
        // Another round follows a scan that re-protects. Without, it may be the last.
        let deltas = match rearm {
            Rearm::Yes => self.next_deltas(),
            Rearm::No => self.no_deltas(),
        };
        self.actions.push_back(Action::Scan { rearm, with });
        self.order_copy(Pages::Scanned, least, Manner::standing(deltas))
    }

    fn copy_known(&mut self, pages: PageSet, manner: Manner) -> InFlight {
        let all = pages.len();
        self.order_copy(Pages::Known(Arc::new(pages)), all, manner)
    }

    fn order_copy(&mut self, pages: Pages, expected: u64, manner: Manner) -> InFlight {
        self.round = Round(self.round.0 + 1);
        self.meter.begin_round(self.now, self.round, expected);
        self.lanes.begin(self.round);
        if let Some(growth) = &mut self.growth {
            growth.interrupted();
        }
        let zeros = if self.round.0 == 1 {
            ZeroPages::Skip
        } else {
            ZeroPages::Tell
        };
        let scan = match pages {
            Pages::Known(_) => Scan::Over,
            Pages::Scanned => Scan::UnderWay,
        };
        let Manner {
            rewritten,
            deltas,
            pace,
        } = manner;
        self.actions.push_back(Action::Copy {
            round: self.round,
            pages,
            zeros,
            rewritten,
            deltas,
            pace,
        });
        InFlight {
            round: self.round,
            scan,
            done: None,
        }
    }
}

/// A round on its way: over when all its pages are known, every lane has sent its end, and the target
/// says that it is done, in whichever order that becomes known.
pub(super) struct InFlight {
    round: Round,
    scan: Scan,
    /// Pages that the target counts.
    done: Option<u64>,
}

/// The scan that hands on the pages of a round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scan {
    UnderWay,
    /// It has ended, or the pages were known without one.
    Over,
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
            Input::Tracking(handed_on) | Input::Scanned(handed_on) if !self.is_known() => {
                self.scanned(shared, handed_on);
                self.settle(shared)
            }
            input => Settled::Unrelated(input),
        }
    }

    /// The scan that the round was waiting for has ended.
    pub(super) fn scanned(&mut self, shared: &mut Shared, handed_on: HandedOn) {
        self.scan = Scan::Over;
        shared.meter.scanned(handed_on);
    }

    /// Whether all pages of the round are known.
    pub(super) fn is_known(&self) -> bool {
        self.scan == Scan::Over
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
        // The scan's own word may come after that of the lanes which it has let go.
        if !self.is_known() {
            return Settled::NotYet;
        }
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
