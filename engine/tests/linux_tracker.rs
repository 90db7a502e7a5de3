//! Dirty tracking of a real process, against what that process says it wrote.

mod linux_child;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_engine::core::layout::{PAGE_SIZE, PageRange, RegionIndex};
use ferry_engine::linux::uffd::{Features, Mode, Uffd};
use ferry_engine::linux::{RamTracker, TrackedRange, inject};
use ferry_engine::vmm::{Begun, Found, Rearm, Tracker, VmmError};
use linux_child::{HUGE_PAGE, Ram, Tracked};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const REGION: RegionIndex = RegionIndex(3);
const RAM_BYTES: u64 = 16 << 20;
const PAGES: u64 = RAM_BYTES / PAGE_SIZE as u64;

/// Pages of which one page table tells.
const BLOCK_PAGES: usize = 512;

fn tracker_of(child: &Tracked) -> RamTracker {
    let range = TrackedRange {
        region: REGION,
        addresses: child.ram().addresses(),
    };
    RamTracker::new(Arc::clone(&child.process), vec![range])
}

/// The pages of one collection, which tells each once, and nothing of what it is through with; and
/// that is everything in the end.
fn collect_of(tracker: &mut RamTracker, rearm: Rearm, all: u64) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let mut through = BTreeSet::new();
    let of = |range: PageRange| range.first.0..range.end().0;
    let mut add = |found| match found {
        Found::Written(region, range) => {
            assert_eq!(region, REGION);
            for page in of(range) {
                assert!(!through.contains(&page), "told when it was through with it");
                assert!(pages.insert(page), "told twice");
            }
        }
        Found::Through(region, range) => {
            assert_eq!(region, REGION);
            let fresh = of(range).filter(|page| through.insert(*page)).count();
            assert_eq!(fresh as u64, range.count, "through with pages twice");
        }
    };
    tracker.collect(rearm, &mut add).unwrap();
    assert_eq!(through.len() as u64, all);
    pages
}

fn collect(tracker: &mut RamTracker, rearm: Rearm) -> BTreeSet<u64> {
    collect_of(tracker, rearm, PAGES)
}

/// What a look shows, piece by piece and not on the boundaries of anything.
fn looked_at(tracker: &RamTracker) -> BTreeSet<u64> {
    const PIECE: u64 = 131;
    let fresh = tracker.fresh().unwrap();
    let mut pages = BTreeSet::new();
    for first in (0..PAGES.div_ceil(PIECE)).map(|nth| nth * PIECE) {
        let piece = PageRange::new(first, PIECE.min(PAGES - first));
        let mut found = |range: PageRange| {
            let within = first..piece.end().0;
            pages.extend((range.first.0..range.end().0).filter(|page| within.contains(page)));
        };
        fresh.written(REGION, piece, &mut found).unwrap();
    }
    pages
}

/// The pages that a write to each of `pages` must show, with a backing of `unit` pages.
fn shown(pages: &BTreeSet<u64>, unit: u64) -> BTreeSet<u64> {
    pages
        .iter()
        .flat_map(|page| {
            let first = page - page % unit;
            first..first + unit
        })
        .collect()
}

fn write(child: &mut Tracked, pages: &BTreeSet<u64>) {
    let mut order = "write 7".to_owned();
    for page in pages {
        write!(order, " {page}").unwrap();
    }
    assert_eq!(child.ask(order), "written");
}

/// Rounds of random writes: every report equals what was written since the last one.
fn reports_exactly_what_was_written(ram: &Ram, unit: u64) {
    // Some pages are there before, most are not.
    reports_exactly_after(ram, unit, &(0..PAGES / 4).collect());
}

fn reports_exactly_after(ram: &Ram, unit: u64, before: &BTreeSet<u64>) {
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    write(&mut child, before);
    tracker.start(&mut |_| ()).unwrap();
    assert_eq!(collect(&mut tracker, Rearm::Yes), BTreeSet::new());

    let page = prop_oneof![4 => 0..PAGES, 1 => 0..64_u64, 1 => PAGES - 64..PAGES];
    let sparse = prop::collection::btree_set(page, 0..600);
    let dense = (0..PAGES, 0..PAGES).prop_map(|(a, b)| (a.min(b)..a.max(b)).collect());
    let every_second = (0..2_u64).prop_map(|odd| (odd..PAGES).step_by(2).collect());
    let round = (
        prop_oneof![6 => sparse, 2 => dense, 1 => every_second],
        any::<bool>(),
    );
    let config = Config {
        cases: 200,
        failure_persistence: None,
        ..Config::default()
    };
    // Pages that a look without re-arming has shown, and the next report shows again.
    let still_shown = std::cell::RefCell::new(BTreeSet::new());
    let parts = std::cell::RefCell::new((child, tracker));
    let outcome = TestRunner::new(config).run(&round, |(pages, rearmed)| {
        let (child, tracker) = &mut *parts.borrow_mut();
        write(child, &pages);
        let mut expected = still_shown.borrow_mut();
        expected.extend(shown(&pages, unit));
        prop_assert_eq!(&looked_at(tracker), &*expected);
        let rearm = if rearmed { Rearm::Yes } else { Rearm::No };
        prop_assert_eq!(&collect(tracker, rearm), &*expected);
        if rearmed {
            expected.clear();
        }
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn memfd_is_tracked_exactly() {
    reports_exactly_what_was_written(&Ram::memfd(RAM_BYTES), 1);
    reports_exactly_after(&Ram::memfd(RAM_BYTES), 1, &BTreeSet::new());
}

#[test]
fn tmpfs_is_tracked_exactly() {
    reports_exactly_what_was_written(&Ram::tmpfs(RAM_BYTES, "size=64M"), 1);
}

#[test]
fn tmpfs_with_huge_pages_is_tracked_exactly() {
    let ram = Ram::tmpfs(RAM_BYTES, "size=64M,huge=always");
    let every_block = (0..PAGES).step_by(BLOCK_PAGES).collect();
    reports_exactly_after(&ram, 1, &every_block);
}

/// The first write to a block of which nothing was there may show all of it: a huge page is data as a
/// whole.
#[test]
fn a_huge_page_that_appears_shows_what_was_written() {
    let ram = Ram::tmpfs(RAM_BYTES, "size=64M,huge=always");
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    tracker.start(&mut |_| ()).unwrap();
    let block = BLOCK_PAGES as u64;
    let pages = BTreeSet::from([3 * block + 7, 5 * block]);
    write(&mut child, &pages);
    let shown = collect(&mut tracker, Rearm::Yes);
    assert!(pages.is_subset(&shown));
    let in_block = |page: &u64| [3, 5].contains(&(page / block));
    assert!(shown.iter().all(in_block), "{shown:?}");
    write(&mut child, &pages);
    assert_eq!(collect(&mut tracker, Rearm::Yes), pages);
}

/// Memory that holds nothing is not protected, which would take page tables, and what is written there
/// shows all the same: in a look, in a collection, and when it is written again.
#[test]
fn what_was_never_touched_needs_no_page_tables() {
    const LARGE_BYTES: u64 = 1 << 30;
    let all = LARGE_BYTES / PAGE_SIZE as u64;
    let ram = Ram::memfd(LARGE_BYTES);
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    write(&mut child, &(100..300).collect());
    let before = child.page_table_kib();
    tracker.start(&mut |_| ()).unwrap();
    let mut collected = |rearm| collect_of(&mut tracker, rearm, all);
    assert_eq!(collected(Rearm::Yes), BTreeSet::new());
    let taken = child.page_table_kib() - before;
    // A table for each block would be sixteen times as much.
    let most = LARGE_BYTES / BLOCK_PAGES as u64 / 1024 / 16;
    assert!(taken <= most, "{taken} KiB of page tables");

    let near = [50, 311, 512, 513];
    let far = (4_096..all).step_by(9_973);
    let pages: BTreeSet<u64> = far.chain(near).chain([all - 1]).collect();
    write(&mut child, &pages);
    assert_eq!(collected(Rearm::No), pages);
    assert_eq!(collected(Rearm::Yes), pages);
    assert_eq!(collected(Rearm::No), BTreeSet::new());
    let neighbours: BTreeSet<u64> = pages.iter().map(|page| page ^ 1).collect();
    let again: BTreeSet<u64> = neighbours.union(&pages).copied().collect();
    write(&mut child, &again);
    assert_eq!(collected(Rearm::Yes), again);
}

#[test]
fn hugetlb_is_tracked_in_its_own_unit() {
    reports_exactly_what_was_written(&Ram::hugetlb(RAM_BYTES), HUGE_PAGE / PAGE_SIZE as u64);
}

/// What was read of guest RAM, page by page; zero where nothing was.
struct Copied<'a> {
    ram: &'a Ram,
    bytes: Vec<u8>,
}

impl<'a> Copied<'a> {
    fn nothing_of(ram: &'a Ram) -> Self {
        Self {
            ram,
            bytes: vec![0; usize::try_from(RAM_BYTES).unwrap()],
        }
    }

    fn read(&mut self, range: PageRange) {
        let bytes = range.bytes();
        let place = usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap();
        let copy = &mut self.bytes[place];
        self.ram.file.read_exact_at(copy, bytes.start).unwrap();
    }

    /// What a tracker says may be read at once.
    fn read_watched(&mut self, begun: Begun) {
        if let Begun::Watched(_, range) = begun {
            self.read(range);
        }
    }

    fn is_current(&self) -> bool {
        let mut now = vec![0; self.bytes.len()];
        self.ram.file.read_exact_at(&mut now, 0).unwrap();
        now == self.bytes
    }
}

/// Threads write all the time; a copy kept up to date by the reports alone ends up equal.
fn loses_no_write(ram: &Ram) {
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    assert_eq!(child.ask("run 3"), "running");
    let mut copy = Copied::nothing_of(ram);
    tracker
        .start(&mut |begun| copy.read_watched(begun))
        .unwrap();
    let mut refresh = |tracker: &mut RamTracker, rearm| {
        let mut ranges = Vec::new();
        tracker
            .collect(rearm, &mut |found| ranges.extend(found.written()))
            .unwrap();
        for (_, range) in &ranges {
            copy.read(*range);
        }
        ranges.iter().map(|(_, range)| range.count).sum::<u64>()
    };
    let mut refreshed = 0;
    let deadline = Instant::now() + Duration::from_secs(30);
    while refreshed < 20 * PAGES {
        refreshed += refresh(&mut tracker, Rearm::Yes);
        assert!(
            Instant::now() < deadline,
            "only {refreshed} pages were written"
        );
    }
    let writes: u64 = child.ask("halt").parse().unwrap();
    refresh(&mut tracker, Rearm::No);
    assert!(copy.is_current(), "a write was lost");
    assert!(
        writes > refreshed / (HUGE_PAGE / PAGE_SIZE as u64),
        "{writes} writes"
    );
}

#[test]
fn no_write_is_lost_on_memfd() {
    loses_no_write(&Ram::memfd(RAM_BYTES));
}

#[test]
fn no_write_is_lost_on_huge_pages_of_tmpfs() {
    loses_no_write(&Ram::tmpfs(RAM_BYTES, "size=64M,huge=always"));
}

#[test]
fn no_write_is_lost_on_hugetlb() {
    loses_no_write(&Ram::hugetlb(RAM_BYTES));
}

/// The guest writes to a page that was empty, and gives it back before anybody looked: where it was read
/// meanwhile nobody would ever hear that it is zero again.
#[test]
fn what_is_given_back_unseen_was_not_read() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    write(&mut child, &BTreeSet::from([0]));
    let page = PAGES / 2;
    let mut copy = Copied::nothing_of(&ram);
    let mut begun = Vec::new();
    tracker.start(&mut |part| begun.push(part)).unwrap();
    write(&mut child, &BTreeSet::from([page]));
    for part in begun {
        copy.read_watched(part);
    }
    ram.punch(page * PAGE_SIZE as u64, PAGE_SIZE as u64);
    for page in collect(&mut tracker, Rearm::Yes) {
        copy.read(PageRange::new(page, 1));
    }
    assert!(copy.is_current(), "the page was read, and not reported");
}

/// More memory than one thread looks at.
#[test]
fn a_look_in_parallel_is_exact() {
    const LARGE_BYTES: u64 = (5 << 30) / 2;
    let ram = Ram::memfd(LARGE_BYTES);
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    tracker.start(&mut |_| ()).unwrap();
    let last = LARGE_BYTES / PAGE_SIZE as u64 - 1;
    let pages: BTreeSet<_> = (0..=last).step_by(1_021).chain([last]).collect();
    write(&mut child, &pages);
    let mut collected = |rearm| collect_of(&mut tracker, rearm, last + 1);
    assert_eq!(collected(Rearm::No), pages);
    assert_eq!(collected(Rearm::Yes), pages);
    assert_eq!(collected(Rearm::No), BTreeSet::new());
}

/// Guest RAM of many pieces: each is told when writes to it are reported, and all are.
#[test]
fn watches_piece_by_piece() {
    const LARGE_BYTES: u64 = 300 << 20;
    let ram = Ram::memfd(LARGE_BYTES);
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    // Of the first half there is something, so that it is protected.
    let all = LARGE_BYTES / PAGE_SIZE as u64;
    write(&mut child, &(0..all / 2).step_by(BLOCK_PAGES).collect());
    let mut next = 0;
    let mut written = BTreeSet::new();
    let (mut pieces, mut watched) = (0, 0);
    tracker
        .start(&mut |begun| {
            let (Begun::Watched(region, range) | Begun::Empty(region, range)) = begun;
            assert_eq!((region, range.first.0), (REGION, next), "in order");
            next = range.end().0;
            pieces += 1;
            watched += u32::from(matches!(begun, Begun::Watched(..)));
            // Its first page, at once, with the rest not watched yet.
            write(&mut child, &BTreeSet::from([range.first.0]));
            written.insert(range.first.0);
        })
        .unwrap();
    assert!(watched > 1 && pieces > watched, "{watched} of {pieces}");
    assert_eq!(next, all);
    assert_eq!(collect_of(&mut tracker, Rearm::Yes, next), written);
}

/// An engine that was killed leaves its descriptor; the next one tracks all the same.
#[test]
fn what_a_dead_engine_left_is_closed() {
    let ram = Ram::memfd(RAM_BYTES);
    let child = Tracked::start(ram.path());
    let before = child.descriptors();
    let fd = inject::userfaultfd(&child.process).unwrap();
    let uffd = Uffd::from_fd(child.process.take_fd(fd).unwrap());
    uffd.api(Features::TRACK_WRITES).unwrap();
    uffd.register(&child.ram().addresses(), Mode::WP).unwrap();
    // It dies.
    drop(uffd);
    let mut tracker = tracker_of(&child);
    tracker.start(&mut |_| ()).unwrap();
    tracker.stop().unwrap();
    assert_eq!(child.descriptors(), before);
}

#[test]
fn leaves_the_descriptors_as_they_were() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let before = child.descriptors();
    let mut tracker = tracker_of(&child);
    for _ in 0..3 {
        tracker.start(&mut |_| ()).unwrap();
        tracker.start(&mut |_| ()).unwrap();
        // Not even meanwhile: a descriptor in there would outlive an engine that is killed.
        assert_eq!(child.descriptors(), before);
        write(&mut child, &BTreeSet::from([1]));
        assert_eq!(collect(&mut tracker, Rearm::Yes), BTreeSet::from([1]));
        tracker.stop().unwrap();
        tracker.stop().unwrap();
        assert_eq!(child.descriptors(), before);
    }
    tracker.start(&mut |_| ()).unwrap();
    drop(tracker);
    assert_eq!(child.descriptors(), before);
    write(&mut child, &BTreeSet::from([2]));
}

#[test]
fn a_start_that_fails_undoes_everything() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let before = child.descriptors();
    let all = child.ram().addresses();
    let middle = u64::midpoint(all.start, all.end);
    let range = |addresses| TrackedRange {
        region: REGION,
        addresses,
    };
    let track = |ranges| RamTracker::new(Arc::clone(&child.process), ranges);
    let mut upper = track(vec![range(middle..all.end)]);
    let mut both = track(vec![range(all.start..middle), range(middle..all.end)]);
    let mut lower = track(vec![range(all.start..middle)]);
    upper.start(&mut |_| ()).unwrap();
    // Refused at its second range, when the first is registered already.
    let refused = both.start(&mut |_| ());
    assert!(
        matches!(refused, Err(VmmError::Unfit { .. })),
        "{refused:?}"
    );
    assert_eq!(child.descriptors(), before);
    lower.start(&mut |_| ()).unwrap();
    lower.stop().unwrap();
    // The one that is at work is not disturbed.
    write(&mut child, &BTreeSet::from([5, PAGES / 2, PAGES - 1]));
    let reported = collect_of(&mut upper, Rearm::Yes, PAGES / 2);
    assert_eq!(reported, BTreeSet::from([0, PAGES / 2 - 1]));
    upper.stop().unwrap();
    assert_eq!(child.descriptors(), before);
}

#[test]
fn a_process_that_has_ended_is_told_as_gone() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let mut tracker = tracker_of(&child);
    tracker.start(&mut |_| ()).unwrap();
    let fresh = tracker.fresh().unwrap();
    child.kill();
    // A page worker's look may be the first to meet it. Older kernels find nothing.
    let looked = fresh.written(REGION, PageRange::new(0, PAGES), &mut |_| {});
    assert!(
        matches!(looked, Ok(()) | Err(VmmError::Gone { .. })),
        "{looked:?}"
    );
    let collected = tracker.collect(Rearm::Yes, &mut |_| {});
    assert!(
        matches!(collected, Err(VmmError::Gone { .. })),
        "{collected:?}"
    );
    tracker.stop().unwrap();
    let started = tracker.start(&mut |_| ());
    assert!(matches!(started, Err(VmmError::Gone { .. })), "{started:?}");
}
