//! Room made ahead of the pages, as the source hints.
//!
//! A hint changes no state, and a source that lies gains nothing: what it names is cut to what guest RAM
//! there is, and a page for which room is being made already is none any more.

use ferry_stream::message::{DataRun, Features, Message, Round};

use super::{Shared, State};
use crate::core::layout::{PageRange, RegionIndex};
use crate::core::message::{Action, Input};
use crate::core::pageset::PageSet;

impl Shared {
    pub(super) fn hinted(&mut self, state: State, region: u16, runs: Vec<DataRun>) -> State {
        if !self.features.contains(Features::AHEAD) || !state.takes_pages() {
            let ahead = Input::Received(Message::Ahead { region, runs });
            return self.unexpected(state, &ahead);
        }
        // After the first round every page has been told.
        let (Round(done), _) = self.lanes.total();
        if done == 0 {
            self.make_room(RegionIndex(region), &runs);
        }
        state
    }

    fn make_room(&mut self, region: RegionIndex, runs: &[DataRun]) {
        let layout = &self.inventory.layout;
        let hinted = self.hinted.get_or_insert_with(|| PageSet::empty(layout));
        let mut room = Vec::new();
        for run in runs {
            let range = PageRange::new(run.first, run.count);
            let new = room.len();
            room.extend(hinted.missing(region, range).map(|range| (region, range)));
            for &(region, range) in &room[new..] {
                let inserted = hinted.insert(region, range);
                inserted.expect("what is missing in a set is within its layout");
            }
        }
        if !room.is_empty() {
            self.actions.push_back(Action::Allocate(room));
        }
    }

    /// What was not allocated by now is no longer ahead of anything.
    pub(super) fn end_allocating(&mut self) {
        if self.hinted.take().is_some() {
            self.actions.push_back(Action::EndAllocating);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::bench::{Bench, ONE, TWO, aborted, ended_by, happy_path, hello};
    use super::*;
    use crate::core::message::Phase;

    /// The sixteen pages of the bench's only region.
    const PAGES: u64 = 16;

    fn ahead(region: u16, runs: &[(u64, u64)]) -> Input {
        let run = |&(first, count): &(u64, u64)| DataRun { first, count };
        let runs = runs.iter().map(run).collect();
        Input::Received(Message::Ahead { region, runs })
    }

    fn preparing() -> Bench {
        let mut bench = Bench::new();
        let features = Features::AHEAD.union(Features::LZ4);
        let hello = ferry_stream::message::Hello {
            features,
            ..hello()
        };
        bench.tell(Input::Received(Message::Hello(hello)));
        bench
    }

    fn receiving() -> Bench {
        let mut bench = preparing();
        for (fact, _) in happy_path().drain(1..3) {
            bench.tell(fact);
        }
        assert_eq!(bench.machine.phase(), Phase::Receiving);
        bench
    }

    fn allocates(first: u64, count: u64) -> String {
        format!("allocate [(0, {first}, {count})]")
    }

    #[test]
    fn room_is_made_while_pages_may_come_and_nothing_else_changes() {
        for (mut bench, phase) in [
            (preparing(), Phase::Preparing),
            (receiving(), Phase::Receiving),
        ] {
            assert_eq!(bench.tell(ahead(0, &[(2, 5)])), [allocates(2, 5)]);
            assert_eq!(bench.machine.phase(), phase);
        }
    }

    #[test]
    fn a_hint_is_cut_to_what_there_is_and_to_what_is_new() {
        let mut bench = receiving();
        assert_eq!(bench.tell(ahead(0, &[(14, u64::MAX)])), [allocates(14, 2)]);
        assert_eq!(bench.tell(ahead(0, &[(12, 4)])), [allocates(12, 2)]);
        assert_eq!(bench.tell(ahead(0, &[(PAGES, 1)])), [""; 0]);
        assert_eq!(bench.tell(ahead(7, &[(0, 1)])), [""; 0]);
        assert_eq!(bench.tell(ahead(0, &[(12, 4)])), [""; 0]);
        assert_eq!(
            bench.tell(ahead(0, &[(0, PAGES)])),
            [allocates(0, 12)],
            "the same once more costs nothing"
        );
        assert_eq!(bench.machine.phase(), Phase::Receiving);
    }

    #[test]
    fn nothing_is_allocated_after_the_first_round() {
        let mut bench = receiving();
        bench.tell(ahead(0, &[(0, 4)]));
        bench.tell(ended_by(ONE, 1, 5));
        let orders = bench.tell(ended_by(TWO, 1, 6));
        assert_eq!(orders, ["send RoundDone", "EndAllocating"]);
        assert_eq!(bench.tell(ahead(0, &[(4, 4)])), [""; 0]);
        assert_eq!(bench.machine.phase(), Phase::Receiving);
    }

    #[test]
    fn what_was_not_agreed_on_is_refused() {
        let mut bench = Bench::at(Phase::Receiving);
        bench.tell(ahead(0, &[(0, 4)]));
        assert_eq!(bench.machine.phase(), Phase::Refusing);
    }

    #[test]
    fn a_hint_that_comes_late_is_refused_and_one_after_that_means_nothing() {
        let mut bench = preparing();
        for (fact, _) in happy_path().drain(1..9) {
            bench.tell(fact);
        }
        assert_eq!(bench.machine.phase(), Phase::Loading);
        bench.tell(ahead(0, &[(0, 4)]));
        assert_eq!(bench.machine.phase(), Phase::Refusing);
        let mut bench = receiving();
        bench.tell(aborted());
        bench.tell(ahead(0, &[(0, 4)]));
        assert_eq!(bench.machine.phase(), Phase::Refusing);
    }
}
