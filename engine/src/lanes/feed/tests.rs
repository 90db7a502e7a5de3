//! Lanes, a scan and deaths in any order, against a list of pages; and threads that wait.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::thread;

use ferry_stream::message::Round;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::core::layout::{Layout, PageRange, Region, RegionIndex};
use crate::core::message::{Deltas, Pace, Rewritten, ZeroPages};
use crate::lanes::log::Log;
use crate::lanes::send::RoundOrder;

const REGIONS: u16 = 2;
const PAGES: u64 = 700;
const LANES: usize = 3;
const FIRST_FRAME: u64 = 4;

/// How long a thread may take to do what it must.
const BOUND: Duration = Duration::from_secs(20);

fn layout() -> Layout {
    let region = |index| Region {
        name: format!("ram{index}"),
        bytes: PAGES * 4096,
        backing_page_bytes: 4096,
    };
    Layout::new((0..REGIONS).map(region).collect()).unwrap()
}

fn order(feed: Feed) -> Arc<RoundOrder> {
    Arc::new(RoundOrder {
        round: Round(3),
        feed: Arc::new(feed),
        zeros: ZeroPages::Tell,
        rewritten: Rewritten::Send,
        deltas: Deltas::Off,
        pace: Pace::Limited,
    })
}

type Page = (u16, u64);

fn listed(runs: impl IntoIterator<Item = (RegionIndex, PageRange)>) -> Vec<Page> {
    runs.into_iter()
        .flat_map(|(region, range)| {
            (range.first.0..range.end().0).map(move |page| (region.0, page))
        })
        .collect()
}

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    /// The scan is through with the next part, of so many pages, of which those are dirty.
    Scan(u64, Vec<u64>),
    /// A lane takes a chunk, if there is one.
    Take(usize),
    /// A lane dies when the target has so many of its frames, in percent.
    Die(usize, u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..300_u64, vec(0..300_u64, 0..60)).prop_map(|(count, dirty)| Step::Scan(count, dirty)),
        1 => (200..500_u64).prop_map(|count| Step::Scan(count, (0..count).collect())),
        6 => (0..LANES).prop_map(Step::Take),
        1 => (0..LANES, 0..=100_u64).prop_map(|(lane, percent)| Step::Die(lane, percent)),
    ]
}

/// A lane as its thread works, without one.
#[derive(Default)]
struct Lane {
    log: Log,
    frames: Vec<Vec<Page>>,
    dead: bool,
}

struct World {
    order: Arc<RoundOrder>,
    lanes: [Lane; LANES],
    /// Where the scan is.
    region: u16,
    page: u64,
    dirty: BTreeSet<Page>,
    /// What dead lanes brought, and did not bring.
    placed: Vec<Page>,
    owed: PageSet,
}

impl World {
    fn new() -> Self {
        let order = order(Feed::open(CHUNK_PAGES));
        let mut lanes: [Lane; LANES] = Default::default();
        for lane in &mut lanes {
            lane.log.begin(&order, FIRST_FRAME);
        }
        Self {
            order,
            lanes,
            region: 0,
            page: 0,
            dirty: BTreeSet::new(),
            placed: Vec::new(),
            owed: PageSet::empty(&layout()),
        }
    }

    fn happen(&mut self, step: &Step) {
        match step {
            Step::Scan(count, dirty) => self.scan(*count, dirty),
            Step::Take(lane) => drop(self.take(*lane)),
            Step::Die(lane, percent) => self.die(*lane, *percent),
        }
    }

    fn scan(&mut self, count: u64, dirty: &[u64]) {
        if self.region == REGIONS {
            return;
        }
        let range = PageRange::new(self.page, count.min(PAGES - self.page));
        let region = RegionIndex(self.region);
        let mut set = PageSet::empty(&layout());
        for page in dirty.iter().filter(|page| **page < range.count) {
            let page = range.first.0 + page;
            set.insert(region, PageRange::new(page, 1)).unwrap();
            self.dirty.insert((self.region, page));
        }
        self.order.feed.hand_on(set.take(region, range).unwrap());
        assert!(set.is_empty());
        self.page = range.end().0;
        if self.page == PAGES {
            (self.region, self.page) = (self.region + 1, 0);
        }
    }

    /// What a lane's thread does in a turn; a lane that would have to wait goes on elsewhere.
    fn take(&mut self, at: usize) -> bool {
        let lane = &mut self.lanes[at];
        let mut runs = Vec::new();
        let would_wait = AtomicBool::new(true);
        if lane.dead {
            return false;
        }
        let Some(place) = self.order.feed.take(&mut runs, &would_wait) else {
            return false;
        };
        lane.log.take(place);
        let pages = listed(runs.iter().map(|run| (run.region, run.range)));
        assert!(!pages.is_empty() && pages.len() <= CHUNK_PAGES as usize);
        // Every third frame has nothing to tell, as if all of it were zero: there is none.
        if pages.len() % 3 == 0 {
            lane.log.tell(0);
            self.placed.extend(pages);
        } else {
            lane.log.tell(pages.len() as u64);
            lane.frames.push(pages);
        }
        true
    }

    fn die(&mut self, at: usize, percent: u64) {
        let lane = &mut self.lanes[at];
        if std::mem::replace(&mut lane.dead, true) {
            return;
        }
        let came = lane.frames.len() * usize::try_from(percent).unwrap() / 100;
        let frames = FIRST_FRAME + came as u64;
        let blank = PageSet::empty(&layout());
        let reclaimed = lane.log.reclaim(frames, blank).unwrap();
        let (placed, missing) = lane.frames.split_at(came);
        assert_eq!(
            listed(reclaimed.found.ranges())
                .into_iter()
                .collect::<BTreeSet<_>>(),
            missing.concat().into_iter().collect::<BTreeSet<_>>(),
        );
        assert_eq!(reclaimed.placed, placed.concat().len() as u64);
        self.placed.extend(placed.concat());
        self.owed.union(&reclaimed.found);
    }

    /// The scan ends, and whoever lives takes all that is left.
    fn end(&mut self) {
        let all = self.order.feed.close().pages;
        assert_eq!(all, self.dirty.len() as u64);
        self.lanes[LANES - 1].dead = false;
        while self.take(LANES - 1) {}
    }
}

proptest! {
    /// Every page is taken by exactly one lane, and found again exactly when that lane did not bring
    /// it.
    #[test]
    fn every_page_is_brought_once_or_owed(steps in vec(any_step(), 0..60)) {
        let mut world = World::new();
        for step in &steps {
            // The last lane outlives them all.
            if !matches!(step, Step::Die(lane, _) if *lane == LANES - 1) {
                world.happen(step);
            }
        }
        world.end();
        let mut brought = world.placed;
        for lane in world.lanes.iter().filter(|lane| !lane.dead) {
            brought.extend(lane.frames.concat());
        }
        brought.extend(listed(world.owed.ranges()));
        let count = brought.len();
        let brought: BTreeSet<Page> = brought.into_iter().collect();
        // Twice is as wrong as never.
        prop_assert_eq!(brought.len(), count);
        prop_assert_eq!(brought, world.dirty);
    }
}

/// The pages of `count` from `first` on, as a part of region 0.
fn piece(first: u64, count: u64) -> Piece {
    let mut set = PageSet::full(&layout());
    set.take(RegionIndex(0), PageRange::new(first, count))
        .unwrap()
}

/// A thread that takes to the end, and tells each chunk's length and, with 0, the end.
fn lane(feed: &Arc<Feed>, cut: &Arc<AtomicBool>) -> (mpsc::Receiver<u64>, thread::JoinHandle<()>) {
    let (told, chunks) = mpsc::channel();
    let (feed, cut) = (Arc::clone(feed), Arc::clone(cut));
    let thread = thread::spawn(move || {
        feed.join();
        let mut runs = Vec::new();
        while feed.take(&mut runs, &cut).is_some() {
            told.send(runs.iter().map(|run| run.range.count).sum())
                .unwrap();
        }
        told.send(0).unwrap();
    });
    (chunks, thread)
}

/// Waits until so many lanes wait.
fn until_waiting(feed: &Feed, lanes: u32) {
    let deadline = Instant::now() + BOUND;
    while feed.lock().hunger.waiting != lanes {
        assert!(Instant::now() < deadline, "no {lanes} lanes wait");
        thread::yield_now();
    }
}

#[test]
fn a_lane_waits_for_what_is_handed_on_and_ends_when_the_scan_does() {
    let feed = Arc::new(Feed::open(CHUNK_PAGES));
    feed.hand_on(piece(0, 5));
    let (chunks, thread) = lane(&feed, &Arc::default());
    assert_eq!(chunks.recv_timeout(BOUND), Ok(5));
    until_waiting(&feed, 1);
    feed.hand_on(piece(5, 0));
    feed.hand_on(piece(200, 7));
    assert_eq!(chunks.recv_timeout(BOUND), Ok(7));
    until_waiting(&feed, 1);
    assert!(chunks.try_recv().is_err(), "it ended before the scan");
    let handed_on = feed.close();
    assert_eq!(handed_on.pages, 12);
    assert!(handed_on.starved > Duration::ZERO);
    assert_eq!(chunks.recv_timeout(BOUND), Ok(0));
    thread.join().unwrap();
    // One that joins late finds the end.
    let (late, thread) = lane(&feed, &Arc::default());
    assert_eq!(late.recv_timeout(BOUND), Ok(0));
    thread.join().unwrap();
}

#[test]
fn a_lane_that_is_cut_while_it_waits_ends_and_the_others_go_on() {
    let feed = Arc::new(Feed::open(CHUNK_PAGES));
    let cut = Arc::new(AtomicBool::new(false));
    let (ended, dead) = lane(&feed, &cut);
    let (chunks, living) = lane(&feed, &Arc::default());
    until_waiting(&feed, 2);
    cut.store(true, Ordering::Release);
    feed.wake();
    assert_eq!(ended.recv_timeout(BOUND), Ok(0));
    dead.join().unwrap();
    until_waiting(&feed, 1);
    feed.hand_on(piece(0, 3));
    assert_eq!(chunks.recv_timeout(BOUND), Ok(3));
    feed.close();
    assert_eq!(chunks.recv_timeout(BOUND), Ok(0));
    living.join().unwrap();
}

#[test]
fn a_wait_counts_for_as_many_lanes_as_waited() {
    let mut hunger = Hunger {
        lanes: 4,
        ..Hunger::default()
    };
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    hunger.begin(at(0));
    hunger.begin(at(10));
    hunger.end(at(20));
    hunger.end(at(50));
    hunger.pass(at(90));
    assert_eq!(hunger.of_each(), Duration::from_millis((50 + 10) / 4));
}
