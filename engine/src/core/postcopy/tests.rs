//! A guest, a source and lanes that lose what they like: the guest never sees a wrong page, and every
//! page comes.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use ferry_stream::frame::Generation;
use ferry_stream::message::{LaneId, LaneIndex};
use proptest::prelude::*;

use super::owed::PageRun;
use super::{Answer, Lacking, Owed};
use crate::core::layout::{Layout, PAGE_SIZE, PageNumber, PageRange, Region, RegionIndex};
use crate::core::message::Moment;
use crate::core::pageset::PageSet;
use crate::vmm::Fault;

const REGIONS: u16 = 2;
const PAGES: u64 = 90;
const LANES: u16 = 3;
const FRAME_PAGES: u64 = 7;

type Page = (RegionIndex, PageNumber);

fn layout() -> Layout {
    let region = |at: u16| Region {
        name: format!("ram{at}"),
        bytes: PAGES * PAGE_SIZE as u64,
        backing_page_bytes: 4096,
    };
    Layout::new((0..REGIONS).map(region).collect()).unwrap()
}

fn set(pages: impl IntoIterator<Item = (u16, u64)>) -> PageSet {
    let mut set = PageSet::empty(&layout());
    for (region, page) in pages {
        set.insert(RegionIndex(region), PageRange::new(page, 1))
            .unwrap();
    }
    set
}

fn lane(index: u16, generation: u16) -> LaneId {
    LaneId {
        index: LaneIndex(index),
        generation: Generation(generation),
    }
}

fn pages_of((region, range): PageRun) -> impl Iterator<Item = Page> {
    (range.first.0..range.end().0).map(move |page| (region, PageNumber(page)))
}

/// Whatever the steps are, in whatever order.
struct World {
    steps: VecDeque<u32>,
    now: Moment,
    owed: Owed,
    lacking: Lacking,
    /// What the source has in each page; at the target it counts until the guest writes there.
    truth: HashMap<Page, u64>,
    /// The target's memory: pages with none are not in it.
    memory: HashMap<Page, u64>,
    lanes: BTreeMap<u16, Lane>,
    next_value: u64,
    blocked: Vec<Fault>,
}

/// One connection of a lane.
struct Lane {
    id: LaneId,
    frames: VecDeque<Vec<PageRun>>,
    arrived: u64,
    faults: VecDeque<Page>,
    /// Counts of frames that are in place, on their way back.
    counts: VecDeque<u64>,
}

impl Lane {
    fn new(id: LaneId) -> Self {
        Self {
            id,
            frames: VecDeque::new(),
            arrived: 0,
            faults: VecDeque::new(),
            counts: VecDeque::new(),
        }
    }
}

impl World {
    fn new(missing: PageSet, first: &PageSet, steps: Vec<u32>) -> Self {
        let mut truth = HashMap::new();
        let mut memory = HashMap::new();
        for (region, range) in PageSet::full(&layout()).ranges() {
            for page in pages_of((region, range)) {
                let value = 1000 + u64::from(page.0.0) * PAGES + page.1.0;
                truth.insert(page, value);
                if !missing.contains(page.0, page.1) {
                    memory.insert(page, value);
                }
            }
        }
        Self {
            steps: steps.into(),
            now: Moment::default(),
            owed: Owed::new(missing.clone(), first),
            lacking: Lacking::new(missing, PageSet::empty(&layout())),
            truth,
            memory,
            lanes: (1..=LANES)
                .map(|index| (index, Lane::new(lane(index, 0))))
                .collect(),
            next_value: 1,
            blocked: Vec::new(),
        }
    }

    /// Any number below `end`; 0 when the steps are used up.
    fn pick(&mut self, end: u64) -> u64 {
        u64::from(self.steps.pop_front().unwrap_or(0)) % end
    }

    fn run(&mut self) {
        while !self.steps.is_empty() {
            self.now = self.now.after(Duration::from_micros(7));
            let lane = 1 + u16::try_from(self.pick(u64::from(LANES))).unwrap();
            match self.pick(9) {
                0 => self.access(),
                1 => self.balloon(),
                2 | 3 => self.sweep(lane),
                4 => self.serve(lane),
                5 | 6 => self.arrive(lane),
                7 => self.acknowledge(lane),
                _ => self.die(lane),
            }
        }
        self.finish();
    }

    /// Everything that still can happen does.
    fn finish(&mut self) {
        for _ in 0..4 * u64::from(REGIONS) * PAGES {
            for lane in 1..=LANES {
                self.serve(lane);
                self.sweep(lane);
                self.arrive(lane);
                self.acknowledge(lane);
            }
        }
        assert!(self.lacking.is_whole(), "{:?}", self.lacking);
        assert_eq!(self.lacking.wanted(), []);
        assert!(self.blocked.is_empty(), "{:?}", self.blocked);
        assert_eq!(self.owed.left(), 0);
        for (page, value) in &self.truth {
            if let Some(found) = self.memory.get(page) {
                assert_eq!(found, value, "{page:?}");
            }
        }
    }

    /// The guest reads a page, or writes it.
    fn access(&mut self) {
        let region = RegionIndex(u16::try_from(self.pick(u64::from(REGIONS))).unwrap());
        let page = PageNumber(self.pick(PAGES));
        let thread = u32::try_from(self.pick(2)).unwrap();
        if self.blocked.iter().any(|fault| fault.thread == thread) {
            return;
        }
        let Some(found) = self.memory.get(&(region, page)) else {
            let fault = Fault {
                region,
                page,
                thread,
            };
            return self.fault(fault);
        };
        assert_eq!(*found, self.truth[&(region, page)], "a wrong page");
        self.next_value += 1;
        self.memory.insert((region, page), self.next_value);
        self.truth.insert((region, page), self.next_value);
    }

    fn fault(&mut self, fault: Fault) {
        let page = (fault.region, fault.page);
        match self.lacking.fault(self.now, fault) {
            Answer::Ask => {
                self.blocked.push(fault);
                self.lanes.get_mut(&1).unwrap().faults.push_back(page);
            }
            Answer::Wait => self.blocked.push(fault),
            // It was given back: it reads as zeros from now on.
            Answer::There => {
                assert_eq!(self.truth[&page], 0, "zeros in place of what was there");
                self.memory.insert(page, 0);
            }
        }
    }

    /// The guest gives a page back.
    fn balloon(&mut self) {
        let region = RegionIndex(u16::try_from(self.pick(u64::from(REGIONS))).unwrap());
        let page = (region, PageNumber(self.pick(PAGES)));
        if self.memory.remove(&page).is_some() {
            self.truth.insert(page, 0);
        }
    }

    /// The source sends the next frame.
    fn sweep(&mut self, lane: u16) {
        let lane = self.lanes.get_mut(&lane).unwrap();
        if let Some(runs) = self.owed.next(lane.id, FRAME_PAGES, 3) {
            let pages: u64 = runs.iter().map(|run| run.1.count).sum();
            assert!(pages <= FRAME_PAGES && runs.len() <= 3);
            lane.frames.push_back(runs);
        }
    }

    /// The source hears of a fault.
    fn serve(&mut self, lane: u16) {
        let lane = self.lanes.get_mut(&lane).unwrap();
        if let Some((region, page)) = lane.faults.pop_front()
            && let Some(run) = self.owed.fault(lane.id, region, page)
        {
            lane.frames.push_back(vec![run]);
        }
    }

    /// A frame comes, and its pages are placed.
    fn arrive(&mut self, lane: u16) {
        let lane = self.lanes.get_mut(&lane).unwrap();
        let Some(runs) = lane.frames.pop_front() else {
            return;
        };
        lane.arrived += 1;
        lane.counts.push_back(lane.arrived);
        for (region, range) in runs {
            for claimed in self.lacking.claim(region, range).unwrap() {
                for page in pages_of((region, claimed)) {
                    // What was sent is what the source has: its guest stands.
                    let sent = 1000 + u64::from(page.0.0) * PAGES + page.1.0;
                    assert_eq!(self.memory.insert(page, sent), None, "placed twice");
                }
                self.lacking.placed(self.now, region, claimed);
                let placed = |fault: &Fault| {
                    let end = claimed.end();
                    fault.region == region && (claimed.first..end).contains(&fault.page)
                };
                self.blocked.retain(|fault| !placed(fault));
            }
        }
    }

    fn acknowledge(&mut self, lane: u16) {
        let lane = self.lanes.get_mut(&lane).unwrap();
        if let Some(frames) = lane.counts.pop_front() {
            self.owed.placed(lane.id, frames).unwrap();
        }
    }

    /// A lane dies with all that is on its way, and another comes in its place.
    fn die(&mut self, index: u16) {
        let lane = self.lanes.get_mut(&index).unwrap();
        self.owed.lost(lane.id);
        *lane = Lane::new(self::lane(index, lane.id.generation.0 + 1));
        if index == 1 {
            lane.faults.extend(self.lacking.wanted());
        }
        if self.pick(2) == 0 {
            for (region, range) in self.lacking.missing().ranges() {
                self.owed.lacking(region, range).unwrap();
            }
        }
    }
}

fn some_pages() -> impl Strategy<Value = PageSet> {
    prop::collection::vec((0..REGIONS, 0..PAGES), 0..180).prop_map(set)
}

proptest! {
    #[test]
    fn every_page_comes_and_none_is_wrong(
        missing in some_pages(),
        first in some_pages(),
        steps in prop::collection::vec(any::<u32>(), 0..1500),
    ) {
        World::new(missing, &first, steps).run();
    }
}

const ONE: LaneId = LaneId::first(LaneIndex(1));
const TWO: LaneId = LaneId::first(LaneIndex(2));
const RAM: RegionIndex = RegionIndex(0);

fn run(first: u64, count: u64) -> PageRun {
    (RAM, PageRange::new(first, count))
}

#[test]
fn what_was_written_last_goes_first_then_what_follows_a_fault() {
    let all = set((0..20).map(|page| (0, page)));
    let mut owed = Owed::new(all, &set([(0, 3), (0, 17), (1, 5)]));
    assert_eq!(owed.next(ONE, 4, 2), Some(vec![run(3, 1), run(17, 1)]));
    assert_eq!(owed.fault(TWO, RAM, PageNumber(10)), Some(run(10, 1)));
    assert_eq!(owed.next(ONE, 4, 9), Some(vec![run(11, 4)]));
    assert_eq!(owed.fault(TWO, RAM, PageNumber(12)), None, "on its way");
    assert_eq!(
        owed.next(ONE, 9, 9),
        Some(vec![run(15, 2), run(18, 2), run(0, 3), run(4, 2)])
    );
    assert_eq!(owed.next(ONE, 99, 9), Some(vec![run(6, 4)]));
    assert_eq!(owed.next(ONE, 99, 9), None);
}

#[test]
fn neighbours_are_close_and_owed() {
    let mut owed = Owed::new(set([1, 2, 5, 6, 30].map(|page| (0, page))), &set([]));
    assert_eq!(owed.fault(ONE, RAM, PageNumber(1)), Some(run(1, 1)));
    assert_eq!(owed.behind(ONE, RAM, PageNumber(1), 4), Some(run(2, 1)));
    assert_eq!(owed.behind(ONE, RAM, PageNumber(1), 4), Some(run(5, 1)));
    assert_eq!(owed.behind(ONE, RAM, PageNumber(1), 4), None);
    assert_eq!(owed.next(TWO, 9, 9), Some(vec![run(6, 1), run(30, 1)]));
    owed.lost(ONE);
    assert_eq!(owed.left(), 3);
}

#[test]
fn a_dead_lane_owes_what_was_not_acknowledged() {
    let mut owed = Owed::new(set((0..9).map(|page| (0, page))), &set([]));
    for _ in 0..3 {
        owed.next(ONE, 3, 1).unwrap();
    }
    owed.placed(ONE, 1).unwrap();
    owed.placed(ONE, 1).unwrap();
    assert_eq!((owed.left(), owed.in_flight(ONE)), (0, 2));
    owed.lost(ONE);
    assert_eq!(owed.left(), 6);
    assert_eq!(owed.next(TWO, 99, 9), Some(vec![run(3, 6)]));
    let overstated = owed.placed(TWO, 2).unwrap_err();
    assert_eq!((overstated.told, overstated.sent), (2, 1));
}

#[test]
fn a_source_that_starts_anew_owes_what_the_target_lacks() {
    let mut owed = Owed::new(set([]), &set([]));
    owed.lacking(RAM, PageRange::new(2, 4)).unwrap();
    assert_eq!(owed.next(ONE, 2, 1), Some(vec![run(2, 2)]));
    owed.lacking(RAM, PageRange::new(0, 8)).unwrap();
    assert_eq!(owed.next(ONE, 99, 9), Some(vec![run(4, 4), run(0, 2)]));
    owed.lacking(RAM, PageRange::new(89, 2)).unwrap_err();
}

#[test]
fn waits_are_counted_by_who_waited() {
    let mut lacking = Lacking::new(set([(0, 1), (0, 2)]), set([]));
    let at = |us| Moment(Duration::from_micros(us));
    let fault = |page, thread| Fault {
        region: RAM,
        page: PageNumber(page),
        thread,
    };
    assert_eq!(lacking.fault(at(0), fault(1, 7)), Answer::Ask);
    assert_eq!(lacking.fault(at(10), fault(1, 8)), Answer::Wait);
    assert_eq!(
        lacking.fault(at(20), fault(1, 7)),
        Answer::Wait,
        "told again"
    );
    assert_eq!(lacking.fault(at(20), fault(0, 9)), Answer::There);
    assert_eq!(
        lacking.longest_wait(at(100)),
        Some(Duration::from_micros(100))
    );
    let range = PageRange::new(0, 9);
    let claimed = lacking.claim(RAM, range).unwrap();
    assert_eq!(claimed, [PageRange::new(1, 2)]);
    assert_eq!(lacking.claim(RAM, range).unwrap(), [], "claimed once");
    assert_eq!(
        lacking.fault(at(30), fault(2, 9)),
        Answer::Wait,
        "being placed"
    );
    assert!(!lacking.is_whole());
    lacking.placed(at(100), RAM, claimed[0]);
    assert!(lacking.is_whole());
    let figures = lacking.figures();
    assert_eq!(
        (figures.faults.count, figures.faults.longest),
        (3, Duration::from_micros(100))
    );
    let total = Duration::from_micros(100);
    assert_eq!(figures.stalls[0], (7, super::Stalls { count: 1, total }));
}

#[test]
fn what_could_not_be_placed_is_asked_for_again() {
    let mut lacking = Lacking::new(set([(0, 1)]), set([]));
    let fault = Fault {
        region: RAM,
        page: PageNumber(1),
        thread: 1,
    };
    assert_eq!(lacking.fault(Moment::default(), fault), Answer::Ask);
    let page = PageRange::new(1, 1);
    assert_eq!(lacking.claim(RAM, page).unwrap(), [page]);
    assert_eq!(lacking.wanted(), []);
    lacking.failed(RAM, page);
    assert_eq!(lacking.wanted(), [(RAM, PageNumber(1))]);
    assert_eq!(lacking.claim(RAM, page).unwrap(), [page]);
}
