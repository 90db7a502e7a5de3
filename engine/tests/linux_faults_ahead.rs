//! Pages that are discarded ahead, and a process that is found again by what was written down of it.

mod linux_child;

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_engine::core::layout::{Layout, PAGE_SIZE, PageNumber, PageRange, Region, RegionIndex};
use ferry_engine::core::pageset::PageSet;
use ferry_engine::linux::{FaultRange, RamFaults, RamFile, RamPlace};
use ferry_engine::vmm::{Fault, Faults as _, Pager, VmmError};
use linux_child::{Ram, Tracked};

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
        name: "ram0".into(),
        addresses: child.ram().addresses(),
        file: RamFile::from_file(ram.file.try_clone().unwrap()).unwrap(),
        bytes: 0..RAM_BYTES,
    };
    RamFaults::new(Arc::clone(&child.process), vec![range])
}

/// A page whose first word is `value`.
fn page_of(value: u64) -> Vec<u8> {
    let mut page = vec![0x5a; PAGE_SIZE];
    page[..8].copy_from_slice(&value.to_ne_bytes());
    page
}

fn full_of(ram: &Ram, value: u64) {
    for page in 0..PAGES {
        let at = page * PAGE_SIZE as u64;
        ram.file.write_all_at(&page_of(value), at).unwrap();
    }
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

fn place(pager: &dyn Pager, page: u64, value: u64) {
    let range = PageRange::new(page, 1);
    pager.place(REGION, range, &page_of(value)).unwrap();
}

#[test]
fn what_is_discarded_ahead_is_gone_and_waited_for() {
    let ram = Ram::tmpfs(RAM_BYTES, "size=64M,huge=always");
    full_of(&ram, 5);
    let mut child = Tracked::start(ram.path());
    let mut faults = faults_of(&child, &ram);
    let early = faults.discard(&pages(&[(8, 8)]));
    assert!(
        matches!(early, Err(VmmError::Unfit { .. })),
        "unprepared: {early:?}"
    );
    faults.prepare().unwrap();
    faults.discard(&pages(&[(8, 8), (100, 1)])).unwrap();
    faults.discard(&pages(&[(200, 2)])).unwrap();
    assert_eq!(ram.allocated(), RAM_BYTES - 11 * PAGE_SIZE as u64);
    assert_eq!(child.ask("read 16"), "5");
    // Whoever comes already waits; it is heard of later.
    child.order("read 100");
    let pager = faults.arm(&pages(&[(8, 9), (100, 1), (200, 2)])).unwrap();
    assert_eq!(ram.allocated(), RAM_BYTES - 12 * PAGE_SIZE as u64);
    assert_eq!(fault(&*pager).page, PageNumber(100));
    place(&*pager, 100, 4);
    assert_eq!(child.answer(), "4");
    child.order("read 16");
    assert_eq!(fault(&*pager).page, PageNumber(16));
    place(&*pager, 16, 3);
    assert_eq!(child.answer(), "3");
    assert_eq!(child.ask("read 17"), "5");
    faults.disarm().unwrap();
    assert_eq!(child.ask("read 200"), "0");
}

#[test]
fn a_process_is_found_again_by_what_was_written_down() {
    let ram = Ram::tmpfs(RAM_BYTES, "size=64M");
    full_of(&ram, 9);
    let mut child = Tracked::start(ram.path());
    let mapping = child.ram();
    let place_of = RamPlace {
        name: "ram0".into(),
        address: mapping.start,
        bytes: RAM_BYTES,
        file: (mapping.device.major, mapping.device.minor, mapping.inode),
    };
    let adopt = |place: &RamPlace| {
        RamFaults::adopt_at(Arc::clone(&child.process), std::slice::from_ref(place))
    };
    assert!(adopt(&place_of).unwrap().is_none(), "nothing is armed");
    let mut faults = faults_of(&child, &ram);
    faults.prepare().unwrap();
    let pager = faults.arm(&pages(&[(2, PAGES - 2)])).unwrap();
    place(&*pager, 3, 30);
    drop((pager, faults));
    let stranger = RamPlace {
        file: (place_of.file.0, place_of.file.1, place_of.file.2 + 1),
        ..place_of.clone()
    };
    adopt(&stranger).map(|_| ()).unwrap_err();
    let (mut again, layout) = adopt(&place_of).unwrap().unwrap();
    // Pages 0 and 1 were never missing, and 3 was placed.
    assert_eq!(
        again.without_memory(&layout).unwrap(),
        pages(&[(2, 1), (4, PAGES - 4)])
    );
    let pager = again.pager().unwrap();
    child.order("read 77");
    assert_eq!(fault(&*pager).page, PageNumber(77));
    place(&*pager, 77, 70);
    assert_eq!(child.answer(), "70");
    again.disarm().unwrap();
    assert_eq!(child.ask("read 3"), "30");
}
