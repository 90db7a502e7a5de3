//! The parts of which a move's time is made, each by itself: `cargo bench -p ferry-benches`.
//!
//! Scans look at a real QEMU: they need what `benches/run` needs. The rest runs anywhere. A name after
//! `--` picks some: `cargo bench -p ferry-benches -- codec`.

use ferry_engine::core::layout::{Layout, PageRange, Region, RegionIndex};
use ferry_engine::core::pageset::PageSet;

/// Pages in a full frame.
const FRAME_PAGES: u32 = ferry_stream::limits::MAX_RAW_PAGES;

/// Bytes in a full frame.
const FRAME_BYTES: usize = FRAME_PAGES as usize * ferry_testbed::PAGE_SIZE;

fn main() {
    divan::main();
}

/// Bytes that no page has by chance.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let words = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// Bytes such as logs and documents have: words, some of them often.
fn text(length: usize) -> Vec<u8> {
    let numbers = noise(2 * length);
    let words = numbers.chunks_exact(2).flat_map(|pair| {
        // The smaller of two numbers: common words and rare ones.
        let word = u64::from(pair[0].min(pair[1]));
        let letters = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let count = 3 + usize::from(letters[7] % 5);
        let letters = letters.map(|byte| b'a' + byte % 26);
        letters.into_iter().take(count).chain([b' '])
    });
    words.take(length).collect()
}

/// Frames of pages: made from memory into a stream, and read from it into memory.
mod codec {

    use divan::Bencher;
    use divan::counter::BytesCount;
    use ferry_stream::lane::{Incoming, PageLaneReader, PageLaneWriter};
    use ferry_stream::message::{LaneId, LaneIndex, Round};
    use ferry_stream::pages::{PageFrame, PageRun, Zeros};

    use super::{FRAME_BYTES, FRAME_PAGES, noise};

    const LANE: LaneId = LaneId::first(LaneIndex(1));

    const RUN: PageRun = PageRun {
        region: 0,
        first: 0,
        count: FRAME_PAGES,
    };

    pub(super) fn build(frame: &mut PageFrame, memory: &[u8]) {
        frame.begin(Round(1));
        let room = frame.push_raw(RUN).expect("the frame is empty");
        room.copy_from_slice(memory);
        frame.elide_zeros(Zeros::Tell);
    }

    /// Copied from memory, searched for zeros, summed up, and written.
    #[divan::bench]
    fn build_and_send(bencher: Bencher<'_, '_>) {
        let memory = noise(FRAME_BYTES);
        let mut frame = PageFrame::new(FRAME_PAGES);
        let mut writer = PageLaneWriter::new(LANE);
        bencher
            .counter(BytesCount::new(FRAME_BYTES))
            .bench_local(|| {
                build(&mut frame, &memory);
                writer.send(&mut std::io::sink(), &mut frame)
            });
    }

    /// Read into place, and the sum checked.
    #[divan::bench]
    fn receive_and_place(bencher: Bencher<'_, '_>) {
        let mut frame = PageFrame::new(FRAME_PAGES);
        build(&mut frame, &noise(FRAME_BYTES));
        receive(bencher, &mut frame);
    }

    /// Receives the same frame again and again.
    pub(super) fn receive(bencher: Bencher<'_, '_>, frame: &mut PageFrame) {
        let mut wire = Vec::new();
        let sent = PageLaneWriter::new(LANE).send(&mut wire, frame);
        sent.expect("memory takes everything");
        let mut place = vec![0; FRAME_BYTES];
        bencher
            .counter(BytesCount::new(FRAME_BYTES))
            .with_inputs(|| PageLaneReader::new(LANE))
            .bench_local_values(|mut reader| {
                let mut from = &wire[..];
                let Ok(Incoming::Pages(body)) = reader.next(&mut from) else {
                    panic!("a frame of pages was sent");
                };
                body.place(|_, data, mut hasher| {
                    data.read_exact(&mut place).map_err(|_| CutShort)?;
                    hasher.update(&place);
                    Ok::<_, CutShort>(hasher)
                })
                .expect("the frame is whole")
            });
    }

    #[derive(Debug)]
    struct CutShort;

    impl From<ferry_stream::Error> for CutShort {
        fn from(_: ferry_stream::Error) -> Self {
            Self
        }
    }
}

/// Frames packed, and unpacked, in every way that a source chooses from.
mod packing {
    use divan::Bencher;
    use divan::counter::BytesCount;
    use ferry_stream::pages::{Effort, Packer, PageFrame};

    use super::{FRAME_BYTES, FRAME_PAGES, codec, noise, text};

    const EFFORTS: [Effort; 4] = [
        Effort::Lz4,
        Effort::Zstd(1),
        Effort::Zstd(3),
        Effort::Zstd(6),
    ];

    fn pack(bencher: Bencher<'_, '_>, effort: Effort, memory: &[u8]) {
        let mut packer = Packer::new();
        bencher
            .counter(BytesCount::new(FRAME_BYTES))
            .bench_local(|| packer.pack(effort, memory).map(<[u8]>::len));
    }

    /// What becomes smaller.
    #[divan::bench(args = EFFORTS)]
    fn pack_text(bencher: Bencher<'_, '_>, effort: Effort) {
        pack(bencher, effort, &text(FRAME_BYTES));
    }

    /// What does not, as it turns out.
    #[divan::bench(args = EFFORTS)]
    fn pack_noise(bencher: Bencher<'_, '_>, effort: Effort) {
        pack(bencher, effort, &noise(FRAME_BYTES));
    }

    /// Read, its sum checked, unpacked and placed: beside `receive_and_place` of `codec`.
    #[divan::bench(args = EFFORTS)]
    fn unpack_text_and_place(bencher: Bencher<'_, '_>, effort: Effort) {
        let mut frame = PageFrame::new(FRAME_PAGES);
        codec::build(&mut frame, &text(FRAME_BYTES));
        assert!(frame.pack(&mut Packer::new(), effort), "text packs");
        codec::receive(bencher, &mut frame);
    }
}

/// Whether a page is zero: the pages of a frame, as the sender looks at them.
mod zero_test {
    use divan::Bencher;
    use divan::counter::BytesCount;
    use ferry_stream::message::Round;
    use ferry_stream::pages::{PageFrame, PageRun, Zeros};

    use super::{FRAME_BYTES, FRAME_PAGES, noise};

    fn look_at(bencher: Bencher<'_, '_>, memory: &[u8]) {
        let mut frame = PageFrame::new(FRAME_PAGES);
        let run = PageRun {
            region: 0,
            first: 0,
            count: FRAME_PAGES,
        };
        bencher
            .counter(BytesCount::new(FRAME_BYTES))
            .bench_local(|| {
                frame.begin(Round(1));
                let room = frame.push_raw(run).expect("the frame is empty");
                room.copy_from_slice(memory);
                frame.elide_zeros(Zeros::Skip)
            });
    }

    /// Copied and read to the end.
    #[divan::bench]
    fn of_zeros(bencher: Bencher<'_, '_>) {
        look_at(bencher, &vec![0; FRAME_BYTES]);
    }

    /// Copied; the first bytes tell.
    #[divan::bench]
    fn of_noise(bencher: Bencher<'_, '_>) {
        look_at(bencher, &noise(FRAME_BYTES));
    }

    /// What the copy alone takes of both.
    #[divan::bench]
    fn the_copy_alone(bencher: Bencher<'_, '_>) {
        let memory = noise(FRAME_BYTES);
        let mut place = vec![0; FRAME_BYTES];
        bencher
            .counter(BytesCount::new(FRAME_BYTES))
            .bench_local(|| divan::black_box(&mut place).copy_from_slice(&memory));
    }
}

/// The checksum of a frame.
#[divan::bench]
fn crc32(bencher: divan::Bencher<'_, '_>) {
    let memory = noise(FRAME_BYTES);
    bencher
        .counter(divan::counter::BytesCount::new(FRAME_BYTES))
        .bench_local(|| crc32fast::hash(divan::black_box(&memory)));
}

/// Sets of pages of a guest of 64 GiB.
mod page_set {
    use divan::Bencher;
    use divan::counter::ItemsCount;

    use super::{Layout, PageRange, PageSet, Region, RegionIndex};

    const GUEST_BYTES: u64 = 64 << 30;
    const RAM: RegionIndex = RegionIndex(0);
    /// A second of a guest that writes 5,000 pages.
    const SCATTERED: u64 = 5000;

    fn layout() -> Layout {
        let region = Region {
            name: "ram0".into(),
            bytes: GUEST_BYTES,
            backing_page_bytes: 4096,
        };
        Layout::new(vec![region]).expect("one region of whole pages")
    }

    fn scatter(set: &mut PageSet) {
        let pages = layout().pages();
        for at in 0..SCATTERED {
            // An odd number of steps: no page comes twice.
            let page = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % pages;
            let inserted = set.insert(RAM, PageRange::new(page, 1));
            inserted.expect("the page is within the guest");
        }
    }

    fn scattered() -> PageSet {
        let mut set = PageSet::empty(&layout());
        scatter(&mut set);
        set
    }

    #[divan::bench]
    fn insert_and_clear_scattered(bencher: Bencher<'_, '_>) {
        let mut set = PageSet::empty(&layout());
        bencher.counter(ItemsCount::new(SCATTERED)).bench_local(|| {
            scatter(&mut set);
            set.clear();
        });
    }

    #[divan::bench]
    fn walk_scattered(bencher: Bencher<'_, '_>) {
        let set = scattered();
        bencher
            .counter(ItemsCount::new(SCATTERED))
            .bench_local(|| set.ranges().count());
    }

    #[divan::bench]
    fn walk_everything(bencher: Bencher<'_, '_>) {
        let set = PageSet::full(&layout());
        bencher
            .counter(ItemsCount::new(GUEST_BYTES >> 12))
            .bench_local(|| set.ranges().count());
    }

    #[divan::bench]
    fn unite_scattered(bencher: Bencher<'_, '_>) {
        let (mut all, some) = (PageSet::empty(&layout()), scattered());
        bencher.bench_local(|| all.union(&some));
    }
}

/// `PAGEMAP_SCAN` of a QEMU with 1 GiB of RAM, all of it there, by the engine's tracker.
mod scan {
    use std::time::Duration;

    use divan::Bencher;
    use divan::counter::BytesCount;
    use ferry_benches::clean_round::with_tracker;
    use ferry_engine::vmm::Rearm;
    use ferry_testbed::tiny::{Control, FIRST_HIGH_PAGE, Order};
    use ferry_testbed::{Machine, Populate, Qemu, QemuVersion, Turn};

    const GUEST_MIB: u64 = 1024;
    const BOUND: Duration = Duration::from_secs(60);

    fn guest() -> (Turn, Qemu, Control) {
        let turn = Turn::take().expect("the lock is a file below target");
        let machine = Machine::new(QemuVersion::V10_0, GUEST_MIB);
        let machine = machine.populate(Populate::AtStart).tiny();
        let qemu = machine.start().expect("testbed/setup has run");
        let control = Control::attach(qemu.ram(), BOUND).expect("the guest obeys");
        (turn, qemu, control)
    }

    /// Nothing written, but for the one page on which the guest counts.
    #[divan::bench]
    fn clean(bencher: Bencher<'_, '_>) {
        let (_turn, qemu, _control) = guest();
        let scanned = with_tracker(&qemu, |tracker| {
            tracker.start(&mut |_| ())?;
            tracker.collect(Rearm::Yes, &mut |_| ())?;
            bencher
                .counter(BytesCount::new(GUEST_MIB << 20))
                .bench_local(|| tracker.collect(Rearm::Yes, &mut |_| ()));
            Ok(())
        });
        scanned.expect("the tracker works on this machine");
    }

    /// A quarter of the pages written since the last scan.
    #[divan::bench(args = [Rearm::Yes, Rearm::No], sample_count = 20, sample_size = 1)]
    fn quarter_written(bencher: Bencher<'_, '_>, rearm: Rearm) {
        let (_turn, qemu, mut control) = guest();
        let order = Order {
            first: u32::try_from(FIRST_HIGH_PAGE).expect("a low page"),
            pages: u32::try_from(GUEST_MIB << 6).expect("few pages") - 1024,
            stride: 4,
        };
        let scanned = with_tracker(&qemu, |tracker| {
            tracker.start(&mut |_| ())?;
            let tracker = std::cell::RefCell::new(tracker);
            bencher
                .counter(BytesCount::new(GUEST_MIB << 20))
                .with_inputs(|| {
                    let protected = tracker.borrow_mut().collect(Rearm::Yes, &mut |_| ());
                    protected.expect("the tracker works on this machine");
                    control.carry_out(order, BOUND).expect("the guest obeys");
                })
                .bench_local_values(|()| tracker.borrow_mut().collect(rearm, &mut |_| ()));
            Ok(())
        });
        scanned.expect("the tracker works on this machine");
    }
}
