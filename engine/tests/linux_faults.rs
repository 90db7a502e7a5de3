//! Missing pages of a real process: whoever touches one waits, and gets that very page.

mod linux_child;

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ferry_engine::core::layout::{Layout, PAGE_SIZE, PageRange, Region, RegionIndex};
use ferry_engine::core::pageset::PageSet;
use ferry_engine::linux::preflight::Finding;
use ferry_engine::linux::{Access, FaultRange, RamFaults, RamFile, RamTracker, TrackedRange};
use ferry_engine::vmm::{Fault, Faults, Pager, Tracker as _, VmmError};
use linux_child::guest::{page_digest, shuffled};
use linux_child::{Ram, Tracked};
use nix::fcntl::{FallocateFlags, fallocate};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const REGION: RegionIndex = RegionIndex(0);
const RAM_BYTES: u64 = 8 << 20;
const PAGES: u64 = RAM_BYTES / PAGE_SIZE as u64;
const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// Longest wait for a state that must come.
const PATIENCE: Duration = Duration::from_secs(30);

fn layout(bytes: u64) -> Layout {
    let region = Region {
        name: "ram0".into(),
        bytes,
        backing_page_bytes: 4096,
    };
    Layout::new(vec![region]).unwrap()
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(&layout(RAM_BYTES));
    for page in pages {
        set.insert(REGION, PageRange::new(page, 1)).unwrap();
    }
    set
}

fn parts(child: &Tracked) -> Vec<FaultRange> {
    let mapping = child.ram();
    vec![FaultRange {
        region: REGION,
        name: "ram0".into(),
        addresses: mapping.addresses(),
        file: RamFile::open(&child.process, &mapping, Access::ReadWrite).unwrap(),
        bytes: mapping.offset..mapping.offset + mapping.byte_len(),
    }]
}

fn faults_of(child: &Tracked) -> RamFaults {
    RamFaults::new(Arc::clone(&child.process), parts(child))
}

fn armed(child: &Tracked, missing: &PageSet) -> (RamFaults, Arc<dyn Pager>) {
    let mut faults = faults_of(child);
    faults.prepare().unwrap();
    let pager = faults.arm(missing).unwrap();
    (faults, pager)
}

/// The words of a page as a source has it, no two pages alike.
fn words(page: u64, version: u64) -> impl Iterator<Item = u64> {
    let words = 0..PAGE_BYTES / 8;
    words.map(move |word| page << 32 | version << 16 | word)
}

fn bytes(page: u64, version: u64) -> Vec<u8> {
    words(page, version).flat_map(u64::to_ne_bytes).collect()
}

fn run_bytes(range: PageRange, version: u64) -> Vec<u8> {
    let pages = range.first.0..range.end().0;
    pages.flat_map(|page| bytes(page, version)).collect()
}

fn digest(page: u64, version: u64) -> String {
    format!("{:#x}", page_digest(page, words(page, version)))
}

fn zero_digest(page: u64) -> String {
    let zeros = std::iter::repeat_n(0, PAGE_SIZE / 8);
    format!("{:#x}", page_digest(page, zeros))
}

/// Writes an old version of every page.
fn fill(ram: &Ram, version: u64) {
    for page in 0..PAGES {
        ram.file
            .write_all_at(&bytes(page, version), page * PAGE_BYTES)
            .unwrap();
    }
}

fn place(pager: &dyn Pager, page: u64, version: u64) {
    let range = PageRange::new(page, 1);
    pager.place(REGION, range, &bytes(page, version)).unwrap();
}

/// The threads of each page's faults, when there are some of `count` pages.
fn await_faults(pager: &dyn Pager, count: usize) -> BTreeMap<u64, Vec<u32>> {
    await_told(pager, |told| told.len() >= count)
}

fn await_told(
    pager: &dyn Pager,
    is_all: impl Fn(&BTreeMap<u64, Vec<u32>>) -> bool,
) -> BTreeMap<u64, Vec<u32>> {
    let deadline = Instant::now() + PATIENCE;
    let mut threads: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    while !is_all(&threads) {
        assert!(Instant::now() < deadline, "only {threads:?}");
        let mut found = Vec::new();
        pager
            .faults(Duration::from_millis(100), &mut found)
            .unwrap();
        for fault in found {
            assert_eq!(fault.region, REGION);
            threads.entry(fault.page.0).or_default().push(fault.thread);
        }
    }
    threads
}

fn no_fault_waits(pager: &dyn Pager) -> bool {
    let mut found = Vec::new();
    pager.faults(Duration::ZERO, &mut found).unwrap();
    found.is_empty()
}

#[test]
fn a_read_waits_for_its_page_and_gets_it() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    fill(&ram, 1);
    let before = child.descriptors();
    let (mut faults, pager) = armed(&child, &set([7, 8]));
    child.order("load 7");
    child.order("load 9");
    // What is not missing is there as it was, while the other one waits.
    let answer = child.answer();
    assert!(
        answer.ends_with(&format!(" 9 {}", digest(9, 1))),
        "{answer}"
    );
    let waiting = await_faults(&*pager, 1);
    let thread = waiting[&7][0];
    assert!(!child.has_answer());
    place(&*pager, 8, 2);
    assert!(!child.has_answer(), "another page has come");
    place(&*pager, 7, 2);
    assert_eq!(child.answer(), format!("{thread} 7 {}", digest(7, 2)));
    child.order("load 8");
    let answer = child.answer();
    assert!(
        answer.ends_with(&format!(" 8 {}", digest(8, 2))),
        "{answer}"
    );
    assert!(no_fault_waits(&*pager));
    faults.disarm().unwrap();
    faults.disarm().unwrap();
    assert_eq!(child.descriptors(), before);
}

#[test]
fn a_write_waits_for_its_page_and_changes_it() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    fill(&ram, 1);
    let (mut faults, pager) = armed(&child, &set(0..PAGES));
    child.order("store 4711 20");
    assert_eq!(await_faults(&*pager, 1).keys().copied().next(), Some(20));
    assert!(!child.has_answer());
    place(&*pager, 20, 2);
    assert!(child.answer().ends_with(" 20 stored"));
    let mut expected = bytes(20, 2);
    expected[..8].copy_from_slice(&4711_u64.to_ne_bytes());
    // It comes again, within others: what the child has written stays.
    let around = PageRange::new(18, 5);
    pager.place(REGION, around, &run_bytes(around, 3)).unwrap();
    pager.zero(REGION, around).unwrap();
    let mut now = vec![0; PAGE_SIZE];
    for page in [18, 19, 21, 22] {
        ram.file.read_exact_at(&mut now, page * PAGE_BYTES).unwrap();
        assert_eq!(now, bytes(page, 3), "page {page}");
    }
    ram.file.read_exact_at(&mut now, 20 * PAGE_BYTES).unwrap();
    assert_eq!(now, expected);
    pager.zero(REGION, PageRange::new(0, PAGES)).unwrap();
    faults.disarm().unwrap();
}

/// A page that nobody sends, or that was given back, blocks until it is asked to be zero.
#[test]
fn what_has_no_memory_is_zero_on_request() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let (mut faults, pager) = armed(&child, &set([]));
    child.order("load 3");
    await_faults(&*pager, 1);
    assert!(!child.has_answer());
    pager.zero(REGION, PageRange::new(0, 8)).unwrap();
    assert!(child.answer().ends_with(&format!(" 3 {}", zero_digest(3))));
    place(&*pager, 100, 2);
    ram.punch(100 * PAGE_BYTES, PAGE_BYTES);
    child.order("load 100");
    await_faults(&*pager, 1);
    pager.zero(REGION, PageRange::new(100, 1)).unwrap();
    assert!(
        child
            .answer()
            .ends_with(&format!(" 100 {}", zero_digest(100)))
    );
    faults.disarm().unwrap();
    // Nothing is watched any more, even while a fault worker lives on.
    let (mut others, _) = armed(&child, &set([]));
    others.disarm().unwrap();
    drop(pager);
}

/// Whatever was there before, on which pages, and is missing: exactly that is told and waited for.
fn discards_exactly(ram: &Ram) {
    let page = (any::<bool>(), any::<bool>());
    let strategy = prop::collection::vec(page, 1..200);
    let mut runner = TestRunner::new(Config {
        cases: 12,
        failure_persistence: None,
        ..Config::default()
    });
    let outcome = runner.run(&strategy, |pages| {
        ram.punch(0, RAM_BYTES);
        let mut child = Tracked::start(ram.path());
        let has_data = |page: u64| {
            pages
                .get(usize::try_from(page).unwrap())
                .is_some_and(|p| p.0)
        };
        let is_missing = |page: u64| {
            pages
                .get(usize::try_from(page).unwrap())
                .is_some_and(|p| p.1)
        };
        let all = 0..pages.len() as u64;
        for page in all.clone().filter(|page| has_data(*page)) {
            assert_eq!(child.ask(format!("write 7 {page}")), "written");
            ram.file
                .write_all_at(&bytes(page, 1), page * PAGE_BYTES)
                .unwrap();
        }
        let (mut faults, pager) = armed(&child, &set(all.clone().filter(|page| is_missing(*page))));
        for page in all.clone() {
            let mut now = vec![0; PAGE_SIZE];
            ram.file.read_exact_at(&mut now, page * PAGE_BYTES).unwrap();
            let kept = has_data(page) && !is_missing(page);
            let expected = if kept {
                bytes(page, 1)
            } else {
                vec![0; PAGE_SIZE]
            };
            prop_assert_eq!(now, expected);
        }
        for page in all.clone() {
            child.order(format!("load {page}"));
        }
        // Others that have no memory may be told as well.
        await_told(&*pager, |told| {
            let mut missing = all.clone().filter(|page| is_missing(*page));
            missing.all(|page| told.contains_key(&page))
        });
        for page in all.clone().filter(|page| is_missing(*page)) {
            place(&*pager, page, 2);
        }
        pager.zero(REGION, PageRange::new(0, PAGES)).unwrap();
        for _ in all {
            let answer = child.answer();
            let words: Vec<_> = answer.split(' ').collect();
            let page: u64 = words[1].parse().unwrap();
            let expected = match (is_missing(page), has_data(page)) {
                (true, _) => digest(page, 2),
                (false, true) => digest(page, 1),
                (false, false) => zero_digest(page),
            };
            prop_assert_eq!(words[2], expected);
        }
        faults.disarm().unwrap();
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn discards_exactly_what_is_missing() {
    discards_exactly(&Ram::memfd(RAM_BYTES));
}

#[test]
fn discards_exactly_what_is_missing_of_huge_pages() {
    discards_exactly(&Ram::tmpfs(RAM_BYTES, "size=64M,huge=always"));
}

/// What was allocated and not written looks like a hole, and would be read as zeros.
#[test]
fn memory_that_was_never_written_is_discarded() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let length = RAM_BYTES.cast_signed();
    fallocate(&ram.file, FallocateFlags::empty(), 0, length).unwrap();
    assert_eq!(ram.allocated(), RAM_BYTES);
    let (mut faults, pager) = armed(&child, &set((0..PAGES).step_by(2)));
    child.order("load 40");
    assert!(await_faults(&*pager, 1).contains_key(&40));
    place(&*pager, 40, 2);
    assert!(child.answer().ends_with(&digest(40, 2)));
    faults.disarm().unwrap();
}

/// A huge page that something has pinned keeps zeros where pages are discarded, with nobody waiting.
#[test]
fn a_pinned_huge_page_is_told() {
    let ram = Ram::tmpfs(RAM_BYTES, "size=64M,huge=always");
    let mut child = Tracked::start(ram.path());
    fill(&ram, 1);
    let before = child.descriptors();
    assert_eq!(child.ask("pin 700"), "pinned");
    let mut faults = faults_of(&child);
    faults.prepare().unwrap();
    let refused = faults.arm(&set([701])).err();
    let Some(VmmError::Unfit { what }) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        what.contains("ram0") && what.contains("huge=never"),
        "{what}"
    );
    // Nobody waits for what is there now, and it works as soon as the pin is gone.
    child.order("load 701");
    assert!(child.answer().ends_with(&zero_digest(701)));
    assert_eq!(child.ask("unpin"), "unpinned");
    let pager = faults.arm(&set([701])).unwrap();
    child.order("load 701");
    await_faults(&*pager, 1);
    place(&*pager, 701, 2);
    assert!(child.answer().ends_with(&digest(701, 2)));
    faults.disarm().unwrap();
    assert_eq!(child.descriptors(), before);
}

/// Places pages that are asked for, until told to end; tells how many faults there were.
fn serve(pager: &dyn Pager, end: &AtomicBool, version: u64) -> u64 {
    let mut faults = 0;
    let mut found: Vec<Fault> = Vec::new();
    while !end.load(Ordering::Relaxed) {
        found.clear();
        pager.faults(Duration::from_millis(5), &mut found).unwrap();
        for fault in &found {
            // What lies around it as well.
            let first = fault.page.0.saturating_sub(1);
            let range = PageRange::new(first, 3.min(PAGES - first));
            let bytes = run_bytes(range, version);
            pager.place(REGION, range, &bytes).unwrap();
        }
        faults += found.len() as u64;
    }
    faults
}

/// Many threads wait at once, for pages that come in any order, several at once and again.
fn serves_a_crowd(seed: u64, order: &str, threads: u64) -> Ram {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    fill(&ram, 1);
    let (mut faults, pager) = armed(&child, &set(0..PAGES));
    let end = AtomicBool::new(false);
    let answers: Vec<_> = thread::scope(|scope| {
        let servers: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| serve(&*pager, &end, 2)))
            .collect();
        scope.spawn(|| {
            for page in shuffled(PAGES, seed) {
                let range = PageRange::new(page, 16.min(PAGES - page));
                let bytes = run_bytes(range, 2);
                pager.place(REGION, range, &bytes).unwrap();
            }
        });
        child.order(format!("{order} {threads}"));
        let answers = (0..threads).map(|_| child.answer()).collect();
        end.store(true, Ordering::Relaxed);
        let told: u64 = servers
            .into_iter()
            .map(|server| server.join().unwrap())
            .sum();
        assert!(told > 0, "nobody had to wait");
        answers
    });
    assert!(no_fault_waits(&*pager));
    faults.disarm().unwrap();
    if order == "digest" {
        let all = (0..PAGES).fold(0_u64, |sum, page| {
            sum.wrapping_add(page_digest(page, words(page, 2)))
        });
        for answer in answers {
            assert!(answer.ends_with(&format!(" {all:#x}")), "a byte is wrong");
        }
    }
    ram
}

#[test]
fn a_crowd_reads_every_byte() {
    for seed in 0..4 {
        serves_a_crowd(seed, "digest", 24);
    }
}

#[test]
fn a_crowd_loses_no_write() {
    const THREADS: u64 = 24;
    for seed in 0..4 {
        let ram = serves_a_crowd(seed, "add", THREADS);
        for page in 0..PAGES {
            let mut expected = bytes(page, 2);
            let first = words(page, 2).next().unwrap() + THREADS;
            expected[..8].copy_from_slice(&first.to_ne_bytes());
            let mut now = vec![0; PAGE_SIZE];
            ram.file.read_exact_at(&mut now, page * PAGE_BYTES).unwrap();
            assert_eq!(now, expected, "page {page}");
        }
    }
}

#[test]
fn a_dead_engine_blocks_and_the_next_one_goes_on() {
    const WAITING: u64 = 12;
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    fill(&ram, 1);
    let before = child.descriptors();
    let (faults, pager) = armed(&child, &set(0..PAGES));
    for page in 0..WAITING {
        child.order(format!("load {page}"));
    }
    // Some of them are there, all are told to the one that dies.
    await_faults(&*pager, usize::try_from(WAITING).unwrap());
    for page in 0..WAITING / 2 {
        place(&*pager, page, 2);
    }
    for _ in 0..WAITING / 2 {
        child.answer();
    }
    drop((faults, pager));
    assert_eq!(child.descriptors().len(), before.len() + 1);
    // A new target is none, and a tracker takes nothing for its own.
    let refused = faults_of(&child).prepare();
    assert!(
        matches!(refused, Err(VmmError::Unfit { .. })),
        "{refused:?}"
    );
    let range = TrackedRange {
        region: REGION,
        addresses: child.ram().addresses(),
    };
    let tracked = RamTracker::new(Arc::clone(&child.process), vec![range]).start(&mut |_| ());
    assert!(
        matches!(tracked, Err(VmmError::Unfit { .. })),
        "{tracked:?}"
    );
    assert_eq!(child.descriptors().len(), before.len() + 1);
    child.order("load 100");
    assert!(!child.has_answer(), "somebody went on without a page");

    let process = Arc::clone(&child.process);
    let mut faults = RamFaults::adopt(process, parts(&child)).unwrap().unwrap();
    let pager = faults.pager().unwrap();
    let told = await_faults(&*pager, usize::try_from(WAITING / 2 + 1).unwrap());
    assert!(told.keys().copied().eq((WAITING / 2..WAITING).chain([100])));
    let all = PageRange::new(0, PAGES);
    pager.place(REGION, all, &run_bytes(all, 2)).unwrap();
    for _ in 0..=WAITING / 2 {
        let answer = child.answer();
        let words: Vec<_> = answer.split(' ').collect();
        assert_eq!(words[2], digest(words[1].parse().unwrap(), 2));
    }
    faults.disarm().unwrap();
    assert_eq!(child.descriptors(), before);
    let mut now = vec![0; usize::try_from(RAM_BYTES).unwrap()];
    ram.file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == run_bytes(all, 2), "a byte is wrong");
    let process = Arc::clone(&child.process);
    assert!(RamFaults::adopt(process, parts(&child)).unwrap().is_none());
}

#[test]
fn what_was_not_armed_leaves_nothing() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let before = child.descriptors();
    let mut faults = faults_of(&child);
    faults.disarm().unwrap();
    for _ in 0..3 {
        faults.prepare().unwrap();
        faults.prepare().unwrap();
        assert_eq!(child.descriptors().len(), before.len() + 1);
        faults.disarm().unwrap();
        assert_eq!(child.descriptors(), before);
    }
    faults.prepare().unwrap();
    drop(faults);
    assert_eq!(child.descriptors(), before);
    child.order("load 5");
    assert!(child.answer().ends_with(&zero_digest(5)));
}

#[test]
fn unfit_ram_is_refused_by_name_with_nothing_changed() {
    let refused = |ram: &Ram| {
        let child = Tracked::start(ram.path());
        let before = child.descriptors();
        let mut faults = faults_of(&child);
        let problems = faults.problems().unwrap();
        let refused = faults.prepare();
        assert_eq!(child.descriptors(), before);
        match refused {
            Err(VmmError::Unfit { what }) => (problems, what),
            other => panic!("{other:?}"),
        }
    };
    let (problems, what) = refused(&Ram::hugetlb(RAM_BYTES));
    assert!(
        matches!(&problems[..], [Finding::HugePages { .. }]),
        "{problems:?}"
    );
    assert!(what.contains("ram0") && what.contains("2097152"), "{what}");
    let (problems, what) = refused(&Ram::ramfs(RAM_BYTES));
    assert!(
        matches!(&problems[..], [Finding::NotTmpfs { .. }]),
        "{problems:?}"
    );
    assert!(what.contains("ram0"), "{what}");
}

#[test]
fn a_process_that_may_not_make_a_userfaultfd_is_refused() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let mut faults = faults_of(&child);
    assert!(faults.problems().unwrap().is_empty());
    let before = child.descriptors();
    assert_eq!(child.ask("nobody"), "nobody");
    match faults.prepare() {
        Err(VmmError::Unfit { what }) => assert!(what.contains("sysctl"), "{what}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(child.descriptors(), before);
}

/// Through a second mapping missing pages would be read as zeros.
#[test]
fn ram_that_is_mapped_otherwise_is_refused() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let refused = |parts| {
        let refused = RamFaults::new(Arc::clone(&child.process), parts).prepare();
        matches!(refused, Err(VmmError::Unfit { .. }))
    };
    let change = |by: &dyn Fn(&mut FaultRange)| {
        let mut parts = parts(&child);
        by(&mut parts[0]);
        refused(parts)
    };
    assert!(change(&|part| part.addresses.end += PAGE_BYTES));
    assert!(change(
        &|part| part.addresses = part.addresses.start + 1..part.addresses.end + 1
    ));
    assert!(change(&|part| {
        part.addresses.start -= PAGE_BYTES;
        part.addresses.end -= PAGE_BYTES;
    }));
    assert!(change(&|part| part.bytes.end += PAGE_BYTES));
    assert!(change(&|part| {
        part.file = RamFile::open(&child.process, &child.ram(), Access::Read).unwrap();
    }));
    let mut twice = parts(&child);
    twice.extend(parts(&child));
    assert!(refused(twice));
    assert!(!change(&|_| ()));
    let mut faults = faults_of(&child);
    assert_eq!(child.ask("map"), "mapped");
    let refused = faults.prepare();
    assert!(
        matches!(refused, Err(VmmError::Unfit { .. })),
        "{refused:?}"
    );
}

#[test]
fn pages_outside_guest_ram_are_errors() {
    let ram = Ram::memfd(RAM_BYTES);
    let child = Tracked::start(ram.path());
    let mut faults = faults_of(&child);
    assert!(faults.arm(&set([1])).is_err(), "before it is prepared");
    faults.prepare().unwrap();
    let larger = PageSet::full(&layout(RAM_BYTES + PAGE_BYTES));
    assert!(faults.arm(&larger).is_err());
    let pager = faults.arm(&set([1])).unwrap();
    assert!(faults.arm(&set([1])).is_err(), "twice");
    let page = bytes(1, 2);
    let unfit = |outcome| matches!(outcome, Err(VmmError::Unfit { .. }));
    assert!(unfit(pager.place(REGION, PageRange::new(PAGES, 1), &page)));
    assert!(unfit(pager.place(
        RegionIndex(1),
        PageRange::new(0, 1),
        &page
    )));
    assert!(unfit(pager.place(REGION, PageRange::new(0, 2), &page)));
    assert!(unfit(pager.zero(REGION, PageRange::new(u64::MAX, 2))));
    faults.disarm().unwrap();
    assert!(pager.place(REGION, PageRange::new(0, 1), &page).is_err());
}

#[test]
fn tells_regions_apart() {
    const HALF: u64 = RAM_BYTES / 2;
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    fill(&ram, 1);
    // Not in the order of their addresses.
    let mut halves = Vec::new();
    for (index, start) in [(1, 0), (0, HALF)] {
        let mut part = parts(&child).remove(0);
        part.region = RegionIndex(index);
        part.bytes = start..start + HALF;
        let first = part.addresses.start + start;
        part.addresses = first..first + HALF;
        halves.push(part);
    }
    let region = |name: &str| Region {
        name: name.into(),
        bytes: HALF,
        backing_page_bytes: 4096,
    };
    let layout = Layout::new(vec![region("a"), region("b")]).unwrap();
    let mut missing = PageSet::empty(&layout);
    missing
        .insert(RegionIndex(0), PageRange::new(5, 2))
        .unwrap();
    missing
        .insert(RegionIndex(1), PageRange::new(9, 1))
        .unwrap();
    let mut faults = RamFaults::new(Arc::clone(&child.process), halves);
    faults.prepare().unwrap();
    let pager = faults.arm(&missing).unwrap();
    let upper = PAGES / 2 + 5;
    for (page, region, within) in [(upper, 0, 5), (9, 1, 9)] {
        child.order(format!("load {page}"));
        let mut found = Vec::new();
        pager.faults(PATIENCE, &mut found).unwrap();
        let fault = found[0];
        let expected = (RegionIndex(region), within);
        assert_eq!((fault.region, fault.page.0), expected);
        let range = PageRange::new(within, 1);
        pager.place(fault.region, range, &bytes(page, 2)).unwrap();
        assert!(child.answer().ends_with(&digest(page, 2)));
    }
    // The neighbours are as they were.
    for page in [5, upper - 1, upper + 2, 8, 10] {
        child.order(format!("load {page}"));
        assert!(child.answer().ends_with(&digest(page, 1)));
    }
    faults.disarm().unwrap();
}

#[test]
fn a_full_file_system_is_an_error() {
    let ram = Ram::tmpfs(RAM_BYTES, "size=4M");
    let mut child = Tracked::start(ram.path());
    let (mut faults, pager) = armed(&child, &set(0..PAGES));
    let all = PageRange::new(0, PAGES);
    let placed = pager.place(REGION, all, &run_bytes(all, 2));
    assert!(matches!(placed, Err(VmmError::Io { .. })), "{placed:?}");
    let zeroed = pager.zero(REGION, all);
    assert!(matches!(zeroed, Err(VmmError::Io { .. })), "{zeroed:?}");
    assert_eq!(ram.allocated(), 4 << 20);
    // The rest waits.
    child.order(format!("load {}", PAGES - 1));
    await_faults(&*pager, 1);
    assert!(!child.has_answer());
    ram.punch(0, PAGE_BYTES);
    place(&*pager, PAGES - 1, 2);
    assert!(child.answer().ends_with(&digest(PAGES - 1, 2)));
    faults.disarm().unwrap();
}

#[test]
fn the_end_of_the_process_is_told_as_gone() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let (mut faults, pager) = armed(&child, &set(0..PAGES));
    child.order("load 1");
    await_faults(&*pager, 1);
    let (ready, waits) = mpsc::channel();
    let start = Instant::now();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (ready, pager) = (ready.clone(), &pager);
                scope.spawn(move || {
                    ready.send(()).unwrap();
                    pager.faults(10 * PATIENCE, &mut Vec::new())
                })
            })
            .collect();
        waits.recv().unwrap();
        waits.recv().unwrap();
        child.kill();
        for reader in readers {
            let told = reader.join().unwrap();
            assert!(matches!(told, Err(VmmError::Gone { .. })), "{told:?}");
        }
    });
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    let gone = |outcome: Result<(), VmmError>| match outcome {
        Err(VmmError::Gone { .. }) => {}
        other => panic!("{other:?}"),
    };
    gone(pager.faults(Duration::ZERO, &mut Vec::new()));
    gone(pager.place(REGION, PageRange::new(1, 1), &bytes(1, 2)));
    gone(pager.zero(REGION, PageRange::new(1, 1)));
    faults.disarm().unwrap();
}

#[test]
fn preparing_and_arming_tell_of_the_end() {
    let ram = Ram::memfd(RAM_BYTES);
    let mut child = Tracked::start(ram.path());
    let (mut early, mut late) = (faults_of(&child), faults_of(&child));
    early.prepare().unwrap();
    child.kill();
    let armed = early.arm(&set([1])).err();
    assert!(matches!(armed, Some(VmmError::Gone { .. })), "{armed:?}");
    let prepared = late.prepare();
    assert!(
        matches!(prepared, Err(VmmError::Gone { .. })),
        "{prepared:?}"
    );
    early.disarm().unwrap();
}

/// The guest waits for it: what holds nothing costs nothing to discard, however it is scattered.
#[test]
fn arming_what_is_mostly_holes_is_quick() {
    const LARGE_BYTES: u64 = 1 << 30;
    let ram = Ram::memfd(LARGE_BYTES);
    let child = Tracked::start(ram.path());
    let pages = LARGE_BYTES / PAGE_BYTES;
    for page in (0..pages).step_by(4_099) {
        ram.file
            .write_all_at(&bytes(page, 1), page * PAGE_BYTES)
            .unwrap();
    }
    let mut missing = PageSet::empty(&layout(LARGE_BYTES));
    for page in (0..pages).step_by(2) {
        missing.insert(REGION, PageRange::new(page, 1)).unwrap();
    }
    let mut faults = faults_of(&child);
    faults.prepare().unwrap();
    let start = Instant::now();
    let pager = faults.arm(&missing).unwrap();
    let elapsed = start.elapsed();
    println!("armed {} pages in {elapsed:?}", missing.len());
    // One call for each of them would take ten times as long.
    assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
    let kept = (0..pages)
        .step_by(4_099)
        .filter(|page| page % 2 == 1)
        .count() as u64;
    assert_eq!(
        ram.file.metadata().unwrap().blocks() * 512,
        kept * PAGE_BYTES
    );
    drop(pager);
    faults.disarm().unwrap();
}
