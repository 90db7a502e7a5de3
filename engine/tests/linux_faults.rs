//! Pages that a real process waits for: it gets them whole, and never gets others.

mod linux_child;

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_engine::core::layout::{Layout, PAGE_SIZE, PageNumber, PageRange, Region, RegionIndex};
use ferry_engine::core::pageset::PageSet;
use ferry_engine::linux::{FaultRange, RamFaults, RamFile, RamPlace};
use ferry_engine::vmm::{Fault, Faults as _, Pager, VmmError};
use linux_child::{HUGE_PAGE, Ram, Tracked};

const REGION: RegionIndex = RegionIndex(0);
const RAM_BYTES: u64 = 4 << 20;
const PAGES: u64 = RAM_BYTES / PAGE_SIZE as u64;

/// How long anything may take.
const BOUND: Duration = Duration::from_secs(20);

fn layout() -> Layout {
    let region = Region {
        name: "ram0".into(),
        bytes: RAM_BYTES,
        backing_page_bytes: 4096,
    };
    Layout::new(vec![region]).unwrap()
}

fn pages(ranges: &[(u64, u64)]) -> PageSet {
    let mut set = PageSet::empty(&layout());
    for &(first, count) in ranges {
        set.insert(REGION, PageRange::new(first, count)).unwrap();
    }
    set
}

fn faults_of(child: &Tracked, ram: &Ram) -> RamFaults {
    let range = FaultRange {
        region: REGION,
        addresses: child.ram().addresses(),
        file: RamFile::from_file(ram.file.try_clone().unwrap()).unwrap(),
        file_start: 0,
    };
    RamFaults::new(Arc::clone(&child.process), vec![range])
}

/// A page whose first word is `value`.
fn page_of(value: u64) -> Vec<u8> {
    let mut page = vec![0x5a; PAGE_SIZE];
    page[..8].copy_from_slice(&value.to_ne_bytes());
    page
}

fn write_page(ram: &Ram, page: u64, value: u64) {
    let at = page * PAGE_SIZE as u64;
    ram.file.write_all_at(&page_of(value), at).unwrap();
}

/// The next fault, which must come.
fn fault(pager: &dyn Pager) -> Fault {
    let deadline = Instant::now() + BOUND;
    let mut found = Vec::new();
    while found.is_empty() {
        assert!(Instant::now() < deadline, "no fault came");
        pager.faults(Duration::from_millis(50), &mut found).unwrap();
    }
    assert_eq!(found.len(), 1, "one thread waits for one page: {found:?}");
    found[0]
}

/// A child whose pages 0 to 3 had other bytes before, and 2 to 99 are missing.
fn armed(ram: &Ram) -> (Tracked, RamFaults, Arc<dyn Pager>) {
    for page in 0..4 {
        write_page(ram, page, 1000 + page);
    }
    let child = Tracked::start(ram.path());
    let mut faults = faults_of(&child, ram);
    faults.prepare().unwrap();
    let pager = faults.arm(&pages(&[(2, 98)])).unwrap();
    (child, faults, pager)
}

fn kinds() -> [Ram; 3] {
    [
        Ram::memfd(RAM_BYTES),
        Ram::tmpfs(RAM_BYTES, "size=64M"),
        Ram::tmpfs(RAM_BYTES, "size=64M,huge=always"),
    ]
}

#[test]
fn a_missing_page_is_waited_for_and_comes_whole() {
    for ram in kinds() {
        let (mut child, mut faults, pager) = armed(&ram);
        let before = child.pid();
        // What was there and is not missing is read at once.
        assert_eq!(child.ask("read 1"), "1001");
        child.order("read 2");
        let found = fault(&*pager);
        assert_eq!((found.region, found.page), (REGION, PageNumber(2)));
        assert_eq!(
            found.thread,
            before.as_raw().unsigned_abs(),
            "the main thread"
        );
        let range = PageRange::new(2, 1);
        pager.place(REGION, range, &page_of(7)).unwrap();
        assert_eq!(child.answer(), "7", "and not 1002");
        // It has been written since: a late duplicate changes nothing.
        assert_eq!(child.ask("write 8 2"), "written");
        pager.place(REGION, range, &page_of(9)).unwrap();
        assert_eq!(child.ask("read 2"), "8");
        // To write is to wait as well.
        child.order("write 3 50");
        assert_eq!(fault(&*pager).page, PageNumber(50));
        pager
            .place(REGION, PageRange::new(50, 1), &page_of(6))
            .unwrap();
        assert_eq!(child.answer(), "written");
        assert_eq!(child.ask("read 50"), "3");
        faults.disarm().unwrap();
        assert_eq!(child.ask("read 99"), "0", "nobody waits any more");
    }
}

#[test]
fn what_has_no_memory_and_is_not_missing_is_made_zero() {
    let ram = Ram::memfd(RAM_BYTES);
    let (mut child, _faults, pager) = armed(&ram);
    child.order(format!("read {}", PAGES - 1));
    let found = fault(&*pager);
    assert_eq!(found.page, PageNumber(PAGES - 1));
    pager.zero(REGION, PageRange::new(PAGES - 1, 1)).unwrap();
    assert_eq!(child.answer(), "0");
    // Zeros leave what is there.
    pager
        .place(REGION, PageRange::new(60, 1), &page_of(5))
        .unwrap();
    pager.zero(REGION, PageRange::new(58, 4)).unwrap();
    assert_eq!(child.ask("read 60"), "5");
    assert_eq!(child.ask("read 61"), "0");
}

#[test]
fn many_pages_are_placed_at_once_around_those_that_are_there() {
    let ram = Ram::memfd(RAM_BYTES);
    let (mut child, _faults, pager) = armed(&ram);
    for there in [10, 11, 40] {
        pager
            .place(REGION, PageRange::new(there, 1), &page_of(1))
            .unwrap();
    }
    let bytes: Vec<u8> = (2..100).flat_map(|page| page_of(100 + page)).collect();
    pager.place(REGION, PageRange::new(2, 98), &bytes).unwrap();
    for page in 2..100 {
        let expected = if [10, 11, 40].contains(&page) {
            1
        } else {
            100 + page
        };
        assert_eq!(child.ask(format!("read {page}")), expected.to_string());
    }
    let wrong = pager.place(REGION, PageRange::new(2, 2), &bytes[..PAGE_SIZE]);
    assert!(matches!(wrong, Err(VmmError::Unfit { .. })), "{wrong:?}");
}

#[test]
fn a_process_outlives_the_engine_that_armed_it_and_waits_for_the_next() {
    let ram = Ram::tmpfs(RAM_BYTES, "size=64M");
    let (mut child, faults, pager) = armed(&ram);
    let mapping = child.ram();
    pager
        .place(REGION, PageRange::new(3, 1), &page_of(30))
        .unwrap();
    child.order("read 77");
    assert_eq!(fault(&*pager).page, PageNumber(77));
    drop((pager, faults));
    let place = RamPlace {
        name: "ram0".into(),
        address: mapping.start,
        bytes: RAM_BYTES,
        file: (mapping.device.major, mapping.device.minor, mapping.inode),
    };
    let (mut again, layout) = RamFaults::find(&child.process, &[place]).unwrap();
    let missing = again.without_memory(&layout).unwrap();
    // Of what had memory 0 and 1 were never missing, and 3 was placed.
    let mut expected = PageSet::full(&layout);
    for there in [0, 1, 3] {
        expected.remove(REGION, PageRange::new(there, 1)).unwrap();
    }
    assert_eq!(missing, expected);
    let pager = again.adopt().unwrap().unwrap();
    assert_eq!(fault(&*pager).page, PageNumber(77), "raised again");
    pager
        .place(REGION, PageRange::new(77, 1), &page_of(70))
        .unwrap();
    assert_eq!(child.answer(), "70");
    again.disarm().unwrap();
    assert_eq!(child.ask("read 3"), "30");
}

#[test]
fn nothing_is_left_in_the_process() {
    let ram = Ram::memfd(RAM_BYTES);
    let child = Tracked::start(ram.path());
    let before = child.descriptors();
    let mut faults = faults_of(&child, &ram);
    assert!(faults.adopt().unwrap().is_none(), "nothing was armed");
    faults.prepare().unwrap();
    assert_eq!(child.descriptors().len(), before.len() + 1);
    let mut other = faults_of(&child, &ram);
    let twice = other.prepare();
    assert!(matches!(twice, Err(VmmError::Unfit { .. })), "{twice:?}");
    // Dropped before it was armed.
    drop(faults);
    assert_eq!(child.descriptors(), before);
    other.prepare().unwrap();
    other.arm(&pages(&[(0, PAGES)])).unwrap();
    assert_eq!(child.descriptors().len(), before.len() + 1);
    other.disarm().unwrap();
    other.disarm().unwrap();
    assert_eq!(child.descriptors(), before);
}

#[test]
fn what_is_discarded_ahead_is_gone() {
    let ram = Ram::memfd(RAM_BYTES);
    for page in 0..PAGES {
        write_page(&ram, page, 5);
    }
    let mut child = Tracked::start(ram.path());
    let mut faults = faults_of(&child, &ram);
    faults.prepare().unwrap();
    faults.discard(&pages(&[(8, 8), (100, 1)])).unwrap();
    assert_eq!(ram.allocated(), RAM_BYTES - 9 * PAGE_SIZE as u64);
    let pager = faults.arm(&pages(&[(8, 9), (100, 1)])).unwrap();
    assert_eq!(ram.allocated(), RAM_BYTES - 10 * PAGE_SIZE as u64);
    assert_eq!(child.ask("read 17"), "5");
    child.order("read 16");
    assert_eq!(fault(&*pager).page, PageNumber(16));
    pager
        .place(REGION, PageRange::new(16, 1), &page_of(4))
        .unwrap();
    assert_eq!(child.answer(), "4");
    faults.disarm().unwrap();
}

#[test]
fn huge_pages_are_refused_by_name() {
    let ram = Ram::hugetlb(HUGE_PAGE * 2);
    let child = Tracked::start(ram.path());
    let before = child.descriptors();
    let refused = faults_of(&child, &ram).prepare().unwrap_err();
    assert!(refused.to_string().contains("hugetlbfs"), "{refused}");
    assert_eq!(child.descriptors(), before);
}

#[test]
fn a_process_that_dies_is_gone() {
    let ram = Ram::memfd(RAM_BYTES);
    let (mut child, mut faults, pager) = armed(&ram);
    child.kill();
    let heard = pager.faults(Duration::from_millis(50), &mut Vec::new());
    assert!(matches!(heard, Err(VmmError::Gone { .. })), "{heard:?}");
    let placed = pager.place(REGION, PageRange::new(5, 1), &page_of(1));
    assert!(matches!(placed, Err(VmmError::Gone { .. })), "{placed:?}");
    drop(faults.disarm());
}
