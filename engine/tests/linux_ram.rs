//! Guest RAM in files: opened through a process's descriptors, read, written, found and cleared.

mod linux_child;

use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use ferry_engine::core::layout::{PAGE_SIZE, PageRange, RegionIndex};
use ferry_engine::linux::{Access, Error, RamFile, RamPart, SharedRam};
use ferry_engine::vmm::{Ram as _, RamWindow, VmmError};
use linux_child::{HUGE_PAGE, Ram, Tracked};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const REGION: RegionIndex = RegionIndex(0);
const RAM_BYTES: u64 = 8 << 20;
const PAGES: u64 = RAM_BYTES / PAGE_SIZE as u64;

fn part(ram: &Ram, bytes: Range<u64>) -> RamPart {
    RamPart {
        name: "ram0".into(),
        file: RamFile::from_file(ram.file.try_clone().unwrap()).unwrap(),
        bytes,
    }
}

fn target(ram: &Ram) -> SharedRam {
    let length = ram.file.metadata().unwrap().len();
    SharedRam::new(vec![part(ram, 0..length)], Access::ReadWrite).unwrap()
}

fn kinds() -> [(&'static str, Ram); 4] {
    [
        ("memfd", Ram::memfd(RAM_BYTES)),
        ("tmpfs", Ram::tmpfs(RAM_BYTES, "size=64M")),
        ("huge tmpfs", Ram::tmpfs(RAM_BYTES, "size=64M,huge=always")),
        ("hugetlb", Ram::hugetlb(RAM_BYTES)),
    ]
}

fn contents(ram: &SharedRam) -> Vec<u8> {
    let all = ram.layout().region(REGION).unwrap().all();
    let mut bytes = vec![1; usize::try_from(all.byte_len()).unwrap()];
    ram.read(REGION, all, &mut bytes).unwrap();
    bytes
}

fn places(range: PageRange) -> Range<usize> {
    let bytes = range.bytes();
    usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap()
}

fn populated(ram: &SharedRam) -> Vec<PageRange> {
    let mut found = Vec::new();
    ram.populated(REGION, PageRange::new(0, PAGES), &mut |range| {
        found.push(range);
    })
    .unwrap();
    found
}

#[derive(Clone, Debug)]
enum Change {
    Write(PageRange, u8),
    Receive(PageRange, u8),
    /// From a source that has zeros in every third page.
    Fetch(PageRange, u8),
    Zero(PageRange),
}

fn change() -> impl Strategy<Value = Change> {
    let range = (0..PAGES, 1..200_u64)
        .prop_map(|(first, count)| PageRange::new(first, count.min(PAGES - first)));
    (range, any::<u8>(), 0..4).prop_map(|(range, byte, kind)| match kind {
        0 => Change::Write(range, byte),
        1 => Change::Receive(range, byte),
        2 => Change::Fetch(range, byte),
        _ => Change::Zero(range),
    })
}

/// Bytes that differ from page to page and within one.
fn bytes_of(range: PageRange, byte: u8) -> Vec<u8> {
    let mut bytes = vec![byte; places(range).len()];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let number = u64::from(byte) << 32 | index as u64;
        word.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// Where a source's region begins in its file.
const SOURCE_START: u64 = 3 << 12;

/// A source that holds something in `range`, but for every third page, and nothing elsewhere.
fn source_of(range: PageRange, byte: u8) -> Ram {
    let source = Ram::memfd(RAM_BYTES + SOURCE_START);
    let bytes = bytes_of(range, byte);
    for (page, bytes) in (range.first.0..).zip(bytes.chunks_exact(PAGE_SIZE)) {
        if page % 3 != 0 {
            let offset = SOURCE_START + page * PAGE_SIZE as u64;
            source.file.write_all_at(bytes, offset).unwrap();
        }
    }
    source
}

fn window(source: &Ram) -> RamWindow {
    RamWindow::new(
        source.file.try_clone().unwrap(),
        SOURCE_START..SOURCE_START + RAM_BYTES,
    )
}

fn apply(ram: &SharedRam, change: &Change, oracle: &mut [u8]) {
    match *change {
        Change::Write(range, byte) => {
            let bytes = bytes_of(range, byte);
            ram.write(REGION, range, &bytes).unwrap();
            oracle[places(range)].copy_from_slice(&bytes);
        }
        Change::Receive(range, byte) => {
            let bytes = bytes_of(range, byte);
            let mut seed = crc32fast::Hasher::new();
            seed.update(b"header");
            let mut expected = seed.clone();
            expected.update(&bytes);
            // A stream that gives a little at a time, with more behind.
            let tail: &[u8] = b"next";
            let mut stream = Trickle(&[&bytes[..], tail].concat(), 0);
            let hasher = ram.receive(REGION, range, &mut stream, seed).unwrap();
            assert_eq!(hasher.finalize(), expected.finalize());
            assert_eq!(stream.rest(), tail);
            oracle[places(range)].copy_from_slice(&bytes);
        }
        Change::Fetch(range, byte) => {
            let source = source_of(range, byte);
            ram.fetch(REGION, range, &window(&source)).unwrap();
            let mut expected = vec![0; places(range).len()];
            source
                .file
                .read_exact_at(&mut expected, range.bytes().start + SOURCE_START)
                .unwrap();
            oracle[places(range)].copy_from_slice(&expected);
        }
        Change::Zero(range) => {
            ram.zero(REGION, range).unwrap();
            oracle[places(range)].fill(0);
        }
    }
}

/// A stream that gives at most 50,000 bytes at a time.
struct Trickle<'a>(&'a [u8], usize);

impl Trickle<'_> {
    fn rest(&self) -> &[u8] {
        &self.0[self.1..]
    }
}

impl std::io::Read for Trickle<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let length = into.len().min(50_000).min(self.rest().len());
        into[..length].copy_from_slice(&self.rest()[..length]);
        self.1 += length;
        Ok(length)
    }
}

#[test]
fn holds_what_was_put_into_it() {
    for (kind, backing) in kinds() {
        let ram = target(&backing);
        // A part of it is allocated before it is blanked, and so mapped ahead.
        let third = PageRange::new(PAGES / 3, PAGES / 3);
        ram.write(REGION, third, &bytes_of(third, 9)).unwrap();
        ram.blank().unwrap();
        let oracle = std::cell::RefCell::new(vec![0; usize::try_from(RAM_BYTES).unwrap()]);
        let config = Config {
            cases: 30,
            failure_persistence: None,
            ..Config::default()
        };
        let changes = prop::collection::vec(change(), 1..10);
        let outcome = TestRunner::new(config).run(&changes, |changes| {
            let mut oracle = oracle.borrow_mut();
            for change in &changes {
                apply(&ram, change, &mut oracle);
            }
            prop_assert!(contents(&ram) == *oracle, "{kind}");
            Ok(())
        });
        outcome.unwrap();
    }
}

/// Every page that is not zero is found, and on small pages nothing else.
#[test]
fn finds_what_is_populated() {
    for (kind, backing) in kinds() {
        let ram = target(&backing);
        for range in [
            PageRange::new(0, 1),
            PageRange::new(700, 3),
            PageRange::new(PAGES - 1, 1),
        ] {
            ram.write(REGION, range, &bytes_of(range, 9)).unwrap();
        }
        let found = populated(&ram);
        if kind == "hugetlb" {
            assert_eq!(found, [PageRange::new(0, PAGES)]);
        } else if kind == "huge tmpfs" {
            for page in [0, 700, 701, 702, PAGES - 1] {
                let holds = |range: &PageRange| (range.first.0..range.end().0).contains(&page);
                assert!(found.iter().any(holds), "{page} is not in {found:?}");
            }
        } else {
            let expected = [
                PageRange::new(0, 1),
                PageRange::new(700, 3),
                PageRange::new(PAGES - 1, 1),
            ];
            assert_eq!(found, expected, "{kind}");
        }
    }
}

/// What is asked for is found whole, and what is told beyond it is data as well.
#[test]
fn finds_what_is_populated_in_a_part() {
    for (kind, backing) in kinds() {
        let ram = target(&backing);
        let data = PageRange::new(100, 500);
        ram.write(REGION, data, &bytes_of(data, 9)).unwrap();
        let all = populated(&ram);
        for part in [(0, 100), (0, 150), (150, 50), (550, 150), (600, 100)] {
            let part = PageRange::new(part.0, part.1);
            let pages = |range: &PageRange| range.first.0..range.end().0;
            let within = |page: &u64| pages(&part).contains(page);
            let mut found = Vec::new();
            ram.populated(REGION, part, &mut |range| found.extend(pages(&range)))
                .unwrap();
            let expected: Vec<_> = all.iter().flat_map(pages).filter(within).collect();
            let of_part: Vec<_> = found.iter().copied().filter(within).collect();
            assert_eq!(of_part, expected, "{kind}, {part}");
            let all: Vec<_> = all.iter().flat_map(pages).collect();
            assert!(
                found.iter().all(|page| all.contains(page)),
                "{kind}, {part}"
            );
        }
    }
}

#[test]
fn looking_allocates_nothing() {
    for (kind, backing) in kinds() {
        let ram = target(&backing);
        assert!(contents(&ram).iter().all(|byte| *byte == 0), "{kind}");
        populated(&ram);
        ram.zero(REGION, PageRange::new(0, PAGES)).unwrap();
        ram.blank().unwrap();
        assert_eq!(backing.allocated(), 0, "{kind}");
    }
}

#[test]
fn blank_clears_old_bytes_and_keeps_what_is_allocated() {
    for (kind, backing) in kinds() {
        let ram = target(&backing);
        let half = PageRange::new(0, PAGES / 2);
        ram.write(REGION, half, &bytes_of(half, 5)).unwrap();
        let last = PageRange::new(PAGES - 1, 1);
        ram.write(REGION, last, &bytes_of(last, 6)).unwrap();
        let allocated = backing.allocated();
        assert!(
            (RAM_BYTES / 2..RAM_BYTES).contains(&allocated),
            "{kind}: {allocated}"
        );
        ram.blank().unwrap();
        assert!(contents(&ram).iter().all(|byte| *byte == 0), "{kind}");
        assert_eq!(backing.allocated(), allocated, "{kind}");
    }
}

#[test]
fn a_full_file_system_is_an_error_that_names_the_region() {
    let backing = Ram::tmpfs(RAM_BYTES, "size=4M");
    let ram = target(&backing);
    let all = PageRange::new(0, PAGES);
    let bytes = bytes_of(all, 1);
    let written = ram.write(REGION, all, &bytes);
    let received = ram.receive(REGION, all, &mut &bytes[..], crc32fast::Hasher::new());
    for outcome in [written, received.map(drop)] {
        match outcome {
            Err(VmmError::Io { what, source }) => {
                assert_eq!(source.kind(), ErrorKind::StorageFull);
                assert!(what.contains("\"ram0\""), "{what}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// One of them writes to the file, the others through the mapping.
#[test]
fn several_lanes_write_side_by_side() {
    const LANES: u64 = 4;
    const RUN_PAGES: u64 = 16;
    for (kind, file) in kinds() {
        let ram = target(&file);
        std::thread::scope(|scope| {
            for lane in 0..LANES {
                let ram = &ram;
                scope.spawn(move || {
                    for run in (lane..PAGES / RUN_PAGES).step_by(LANES.try_into().unwrap()) {
                        let range = PageRange::new(run * RUN_PAGES, RUN_PAGES);
                        let bytes = bytes_of(range, run.to_le_bytes()[0]);
                        ram.write(REGION, range, &bytes).unwrap();
                    }
                });
            }
        });
        let found = contents(&ram);
        for run in 0..PAGES / RUN_PAGES {
            let range = PageRange::new(run * RUN_PAGES, RUN_PAGES);
            let expected = bytes_of(range, run.to_le_bytes()[0]);
            assert!(found[places(range)] == expected, "{kind}: run {run}");
        }
    }
}

/// Whichever way they take, none dies of a signal.
#[test]
fn several_lanes_find_a_full_file_system() {
    let file = Ram::tmpfs(RAM_BYTES, "size=4M");
    let ram = target(&file);
    let failed = std::thread::scope(|scope| {
        let halves = [0, PAGES / 2].map(|first| {
            let ram = &ram;
            scope.spawn(move || {
                let written = (first..first + PAGES / 2).try_for_each(|page| {
                    let range = PageRange::new(page, 1);
                    ram.write(REGION, range, &bytes_of(range, 7))
                });
                match written {
                    Ok(()) => 0,
                    Err(VmmError::Io { source, .. }) => {
                        assert_eq!(source.kind(), ErrorKind::StorageFull);
                        1
                    }
                    Err(other) => panic!("{other:?}"),
                }
            })
        });
        halves.into_iter().map(|it| it.join().unwrap()).sum::<u32>()
    });
    assert!(failed > 0);
}

#[test]
fn refuses_what_is_outside() {
    let backing = Ram::memfd(RAM_BYTES);
    let ram = target(&backing);
    let mut page = vec![0; PAGE_SIZE];
    let past_the_end = PageRange::new(PAGES, 1);
    assert!(ram.read(REGION, past_the_end, &mut page).is_err());
    assert!(ram.write(REGION, past_the_end, &page).is_err());
    assert!(ram.zero(REGION, past_the_end).is_err());
    assert!(
        ram.write(RegionIndex(1), PageRange::new(0, 1), &page)
            .is_err()
    );
    assert!(ram.write(REGION, PageRange::new(0, 2), &page).is_err());
    let huge = PageRange::new(u64::MAX, u64::MAX);
    assert!(ram.zero(REGION, huge).is_err());
    assert_eq!(backing.allocated(), 0);
    let too_long = part(&backing, 0..RAM_BYTES + PAGE_SIZE as u64);
    assert!(SharedRam::new(vec![too_long], Access::Read).is_err());
    let odd = part(&backing, 0..100);
    assert!(SharedRam::new(vec![odd], Access::Read).is_err());
}

/// Where the source has zeros the target's holes stay holes, whatever the source has allocated.
#[test]
fn fetching_zeros_allocates_nothing() {
    for (kind, backing) in kinds() {
        let ram = target(&backing);
        ram.blank().unwrap();
        let source = Ram::memfd(RAM_BYTES + SOURCE_START);
        let zeros = vec![0; usize::try_from(RAM_BYTES).unwrap()];
        source.file.write_all_at(&zeros, SOURCE_START).unwrap();
        let all = PageRange::new(0, PAGES);
        ram.fetch(REGION, all, &window(&source)).unwrap();
        assert_eq!(backing.allocated(), 0, "{kind}");
        assert!(source.allocated() >= RAM_BYTES);
    }
}

/// The peer may do to its file what it likes.
#[test]
fn a_source_that_is_cut_short_is_an_error() {
    for (kind, backing) in kinds() {
        let ram = target(&backing);
        let half = PageRange::new(0, PAGES / 2);
        ram.write(REGION, half, &bytes_of(half, 9)).unwrap();
        ram.blank().unwrap();
        let source = source_of(PageRange::new(0, PAGES), 1);
        let window = window(&source);
        source.file.set_len(SOURCE_START + (5 << 12)).unwrap();
        for first in [3, PAGES - 9] {
            let fetched = ram.fetch(REGION, PageRange::new(first, 8), &window);
            match fetched {
                Err(VmmError::Io { what, source }) => {
                    assert_eq!(source.kind(), ErrorKind::UnexpectedEof, "{kind}");
                    assert!(what.contains("\"ram0\""), "{what}");
                }
                other => panic!("{kind}: {other:?}"),
            }
        }
        ram.fetch(REGION, PageRange::new(0, 5), &window).unwrap();
        let smaller = RamWindow::new(window.file, 0..PAGE_SIZE as u64);
        let fetched = ram.fetch(REGION, PageRange::new(1, 1), &smaller);
        assert!(matches!(fetched, Err(VmmError::Unfit { .. })), "{kind}");
    }
}

/// Only what cannot be written is given away, each region where it lies.
#[test]
fn shares_what_is_open_for_reading_alone() {
    let backing = Ram::tmpfs(RAM_BYTES, "size=64M");
    let page = PAGE_SIZE as u64;
    assert!(target(&backing).windows().is_none());
    let opened = |bytes: Range<u64>, name: &str| RamPart {
        name: name.into(),
        file: RamFile::from_file(std::fs::File::open(backing.path()).unwrap()).unwrap(),
        bytes,
    };
    let parts = vec![opened(page..3 * page, "b"), opened(5 * page..6 * page, "a")];
    let ram = SharedRam::new(parts, Access::Read).unwrap();
    let windows = ram.windows().unwrap();
    let places: Vec<_> = windows.iter().map(|window| window.bytes.clone()).collect();
    assert_eq!(places, [5 * page..6 * page, page..3 * page]);
    let written = windows[0].file.write_all_at(&[1], 0);
    assert!(written.is_err(), "it can be written");
}

#[test]
fn a_stream_that_ends_early_is_an_error() {
    let backing = Ram::memfd(RAM_BYTES);
    let ram = target(&backing);
    let short = vec![1; PAGE_SIZE + 1];
    let hasher = crc32fast::Hasher::new();
    let received = ram.receive(REGION, PageRange::new(0, 2), &mut &short[..], hasher);
    assert!(matches!(received, Err(VmmError::Io { .. })));
}

/// Several regions, given out of order, one of them in the middle of its file.
#[test]
fn puts_every_region_in_its_place() {
    let (first, second) = (Ram::memfd(RAM_BYTES), Ram::memfd(RAM_BYTES));
    let page = PAGE_SIZE as u64;
    let later = RamPart {
        name: "b".into(),
        ..part(&second, page..3 * page)
    };
    let earlier = RamPart {
        name: "a".into(),
        ..part(&first, 0..RAM_BYTES)
    };
    let ram = SharedRam::new(vec![later, earlier], Access::ReadWrite).unwrap();
    let written = PageRange::new(1, 1);
    ram.write(RegionIndex(1), written, &bytes_of(written, 3))
        .unwrap();
    let mut found = vec![0; PAGE_SIZE];
    second.file.read_exact_at(&mut found, 2 * page).unwrap();
    assert_eq!(found, bytes_of(written, 3));
    assert_eq!((first.allocated(), second.allocated()), (0, page));
    let mut extents = Vec::new();
    let all = PageRange::new(0, 2);
    ram.populated(RegionIndex(1), all, &mut |range| extents.push(range))
        .unwrap();
    assert_eq!(extents, [written]);
}

/// The file is found by what it is, and stays readable when the process has died.
#[test]
fn opens_the_very_file_that_is_mapped() {
    for (kind, backing) in kinds() {
        let mut child = Tracked::start(backing.path());
        let mapping = child.ram();
        assert_eq!(mapping.is_shared_named_file(), kind != "memfd");
        if kind != "memfd" {
            // Another file takes its name.
            std::fs::remove_file(backing.path()).unwrap();
            std::fs::write(backing.path(), "").unwrap();
        }
        child.ask("write 4711 1");
        for access in [Access::Read, Access::ReadWrite] {
            let file = RamFile::open(&child.process, &mapping, access).unwrap();
            assert_eq!(file.byte_len(), RAM_BYTES, "{kind}");
            let page_bytes = if kind == "hugetlb" {
                HUGE_PAGE
            } else {
                PAGE_SIZE as u64
            };
            assert_eq!(u64::from(file.backing_page_bytes()), page_bytes);
            let mut word = [0; 8];
            file.read(PAGE_SIZE as u64, &mut word).unwrap();
            assert_eq!(u64::from_le_bytes(word), 4711, "{kind}");
            let written = file.write(0, &[1; PAGE_SIZE]);
            let may_write = access == Access::ReadWrite && kind != "hugetlb";
            assert_eq!(written.is_ok(), may_write, "{kind}, {access:?}");
        }
        let file = RamFile::open(&child.process, &mapping, Access::Read).unwrap();
        child.kill();
        let mut word = [0; 8];
        file.read(PAGE_SIZE as u64, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 4711, "{kind}");
        let gone = RamFile::open(&child.process, &mapping, Access::Read);
        assert!(matches!(gone, Err(Error::Gone { .. })), "{gone:?}");
    }
}

/// Without any descriptor left, the way goes through the mapping.
#[test]
fn opens_a_file_whose_descriptors_are_closed() {
    let backing = Ram::tmpfs(RAM_BYTES, "size=64M");
    let mut child = Tracked::start(backing.path());
    let mut mapping = child.ram();
    child.ask("close");
    assert!(RamFile::open(&child.process, &mapping, Access::Read).is_ok());
    mapping.inode += 1;
    let wrong = RamFile::open(&child.process, &mapping, Access::Read);
    assert!(matches!(wrong, Err(Error::NoSuchFile { .. })), "{wrong:?}");
}
