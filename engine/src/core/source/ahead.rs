//! What the target is told before its pages come: where there is data.
//!
//! A hint need not be complete. What is left out is allocated as it comes, and costs no more than it
//! did without any.

use ferry_stream::limits::MAX_AHEAD_RUNS;
use ferry_stream::message::{DataRun, Features, Message};

use super::Shared;
use crate::core::layout::{Layout, PageRange, RegionIndex};
use crate::core::pageset::PageSet;

/// Shorter runs are not told: a lane allocates so few pages in less time than it takes to be told of
/// them. Holes are never told instead to join runs: the target would hold more than the source.
const LEAST_RUN_PAGES: u64 = 16;

/// Most messages of one migration. With all of them full that is a MiB, which the control lane carries
/// in front of everything else.
const MOST_MESSAGES: usize = 64;

impl Shared {
    /// The one place where hints are given: as soon as it is known what may hold data. That is before
    /// the first round can be over, and so before Complete.
    pub(super) fn tell_ahead(&mut self, populated: &PageSet) {
        if self.features.contains(Features::AHEAD) {
            for hint in hints(populated, &self.inventory.layout) {
                self.send(hint);
            }
        }
    }
}

/// What there is to tell of `populated`, in the order in which pages are sent.
fn hints(populated: &PageSet, layout: &Layout) -> Vec<Message> {
    let mut hints = Vec::new();
    let mut open: Option<(RegionIndex, Vec<DataRun>)> = None;
    for (region, range) in populated.ranges() {
        if range.count < LEAST_RUN_PAGES || is_all_there(layout, region, range) {
            continue;
        }
        let run = DataRun {
            first: range.first.0,
            count: range.count,
        };
        match &mut open {
            Some((same, runs)) if *same == region && runs.len() < MAX_AHEAD_RUNS => runs.push(run),
            _ => hints.extend(open.replace((region, vec![run])).map(hint)),
        }
    }
    hints.extend(open.map(hint));
    hints.truncate(MOST_MESSAGES);
    hints
}

/// RAM that was allocated ahead of time tells nothing: most of it may be zeros, for which the target
/// needs no page.
fn is_all_there(layout: &Layout, region: RegionIndex, range: PageRange) -> bool {
    layout
        .region(region)
        .is_some_and(|region| region.all() == range)
}

fn hint((region, runs): (RegionIndex, Vec<DataRun>)) -> Message {
    Message::Ahead {
        region: region.0,
        runs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::layout::Region;

    const PAGES: u64 = 1 << 20;

    fn layout() -> Layout {
        let region = |name: &str, pages: u64| Region {
            name: name.into(),
            bytes: pages * 4096,
            backing_page_bytes: 4096,
        };
        Layout::new(vec![region("a", PAGES), region("b", 64), region("c", 64)]).unwrap()
    }

    fn told(pieces: &[(u16, u64, u64)]) -> Vec<(u16, Vec<(u64, u64)>)> {
        let mut set = PageSet::empty(&layout());
        for &(region, first, count) in pieces {
            let range = PageRange::new(first, count);
            set.insert(RegionIndex(region), range).unwrap();
        }
        let pairs = |runs: Vec<DataRun>| runs.iter().map(|run| (run.first, run.count)).collect();
        let hints = hints(&set, &layout()).into_iter();
        hints
            .map(|hint| match hint {
                Message::Ahead { region, runs } => (region, pairs(runs)),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn runs_are_told_region_by_region_and_holes_never() {
        let found = told(&[(0, 3, 40), (0, 44, 16), (0, 100, 15), (2, 0, 63)]);
        assert_eq!(found, [(0, vec![(3, 40), (44, 16)]), (2, vec![(0, 63)])]);
    }

    #[test]
    fn a_region_that_is_all_there_tells_nothing() {
        assert_eq!(told(&[(1, 0, 64), (2, 1, 63)]), [(2, vec![(1, 63)])]);
        assert_eq!(told(&[]), []);
    }

    #[test]
    fn a_guest_in_tatters_is_told_in_part() {
        let tatters: Vec<_> = (0..PAGES / 17).map(|at| (0, at * 17, 16)).collect();
        assert!(tatters.len() < MOST_MESSAGES * MAX_AHEAD_RUNS);
        let found = told(&tatters);
        let full = found
            .iter()
            .filter(|(_, runs)| runs.len() == MAX_AHEAD_RUNS);
        assert_eq!(full.count(), found.len() - 1);
        let all: usize = found.iter().map(|(_, runs)| runs.len()).sum();
        assert_eq!(all, tatters.len());
    }
}
