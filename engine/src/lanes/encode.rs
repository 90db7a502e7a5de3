//! Packing page frames on their way to the link, as [`Chooser`] says.

use std::mem;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use ferry_stream::message::{Features, Round};
use ferry_stream::pages::{Effort, Packer, PageFrame};
use nix::time::{ClockId, clock_gettime};

use super::deltas::{Thrift, Told};
use crate::core::encoding::{
    Advice, Chooser, Compression, EncodingTotals, Haste, PROBE_BYTES, Sending, Trial,
};
use crate::core::layout::PAGE_SIZE;
use crate::linux::socket::queued_bytes;
use crate::worker::Clock;

/// Most chunks that are packed at a time, whatever the number of cores. A packer has about 1.5 MiB, and
/// eight of them pack more than a link of 10 Gbit/s carries.
const MAX_PACKERS: usize = 8;

/// Pages of a chunk that are looked at before it is packed, evenly spread.
const SAMPLE_PAGES: usize = 4;

/// What the features of both sides let through.
fn allowed(features: Features) -> impl Fn(Effort) -> bool {
    move |effort| match effort {
        Effort::Lz4 => features.contains(Features::LZ4),
        Effort::Zstd(_) => features.contains(Features::ZSTD),
    }
}

/// Packs for all lanes of a migration.
#[derive(Debug)]
pub(crate) struct Encoder {
    chooser: Mutex<Chooser>,
    /// Those not at work. How many there are bounds both the memory and the cores that packing takes.
    packers: Mutex<Vec<Packer>>,
    returned: Condvar,
    compression: Compression,
    /// The guest is stopped.
    hurried: AtomicBool,
    clock: Clock,
    tally: Tally,
}

#[derive(Debug, Default)]
struct Tally {
    raw_pages: AtomicU64,
    lz4_pages: AtomicU64,
    zstd_pages: AtomicU64,
    delta_pages: AtomicU64,
    delta_saved_bytes: AtomicU64,
    data_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    cpu_nanos: AtomicU64,
}

impl Encoder {
    /// Packs nothing before [`Encoder::agree`].
    pub(crate) fn new(compression: Compression, clock: Clock) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let packers = cores.min(MAX_PACKERS);
        Self {
            chooser: Mutex::new(Chooser::new(Compression::None, packers, |_| false)),
            compression,
            hurried: AtomicBool::new(false),
            packers: Mutex::new((0..packers).map(|_| Packer::new()).collect()),
            returned: Condvar::new(),
            clock,
            tally: Tally::default(),
        }
    }

    /// From now on packs what a target with `features` can unpack.
    pub(crate) fn agree(&self, features: Features) {
        let packers = lock(&self.packers).len();
        *lock(&self.chooser) = Chooser::new(self.compression, packers, allowed(features));
    }

    /// From now on the guest is stopped, and waits for every page.
    pub(crate) fn hurry(&self) {
        self.hurried.store(true, Ordering::Release);
    }

    /// Whether pages would arrive earlier if there were fewer bytes, with all lanes held to `bandwidth`.
    pub(super) fn thrift(&self, bandwidth: Option<u64>) -> Thrift {
        let mut chooser = lock(&self.chooser);
        chooser.limit(bandwidth);
        if chooser.is_slower_than_deltas() {
            Thrift::Pays
        } else {
            Thrift::IsIdle
        }
    }

    /// Packs `frame`, of which some pages are `told` as deltas, and which goes to `lane` next, where
    /// that lets its pages arrive earlier.
    pub(super) fn encode(&self, frame: &mut PageFrame, told: Told, lane: OnLane<'_>) {
        let data_bytes = frame.data().len() as u64;
        if data_bytes == 0 {
            return;
        }
        let began = cpu_time();
        let mut packing = None;
        if !lock(&self.chooser).is_idle() {
            packing = self.pack(frame, &lane);
        }
        let pages = data_bytes.saturating_sub(told.bytes) / PAGE_SIZE as u64;
        let tally = &self.tally;
        let saved_bytes = told.saved_bytes();
        tally.delta_pages.fetch_add(told.pages, Ordering::Relaxed);
        tally
            .delta_saved_bytes
            .fetch_add(saved_bytes, Ordering::Relaxed);
        let packed_pages = match packing {
            None => &tally.raw_pages,
            Some(Effort::Lz4) => &tally.lz4_pages,
            Some(Effort::Zstd(_)) => &tally.zstd_pages,
        };
        packed_pages.fetch_add(pages, Ordering::Relaxed);
        tally
            .data_bytes
            .fetch_add(data_bytes + saved_bytes, Ordering::Relaxed);
        let sent_bytes = frame.data().len() as u64;
        tally.sent_bytes.fetch_add(sent_bytes, Ordering::Relaxed);
        let spent = cpu_time().saturating_sub(began).as_nanos();
        let spent = u64::try_from(spent).unwrap_or(u64::MAX);
        tally.cpu_nanos.fetch_add(spent, Ordering::Relaxed);
    }

    fn pack(&self, frame: &mut PageFrame, lane: &OnLane<'_>) -> Option<Effort> {
        let data_bytes = frame.data().len() as u64;
        let haste = if self.hurried.load(Ordering::Acquire) {
            Haste::Latency
        } else {
            Haste::Throughput
        };
        let queued = || lane.socket.and_then(|socket| queued_bytes(socket).ok());
        let before = queued().filter(|_| haste == Haste::Throughput);
        let mut chooser = lock(&self.chooser);
        chooser.limit(lane.bandwidth);
        let mut advice = chooser.advise(self.clock.now(), haste);
        if let (Advice::Pack(effort), Some(queued)) = (&mut advice, before) {
            *effort = chooser.relieve(*effort, data_bytes, queued);
        }
        drop(chooser);
        let mut packing = None;
        match advice {
            Advice::Raw => {}
            Advice::Probe(effort) => self.with_packer(|packer| {
                let data = frame.data();
                self.probe(packer, effort, &data[..data.len().min(PROBE_BYTES)]);
            }),
            Advice::Pack(effort) => self.with_packer(|packer| {
                if becomes_smaller(packer, frame.data()) && self.try_pack(packer, effort, frame) {
                    packing = Some(effort);
                }
            }),
        }
        if let Some(queued) = queued() {
            let sending = Sending {
                round: lane.round,
                lane: lane.index,
                data_bytes,
                wire_bytes: frame.wire_bytes(),
                queued,
            };
            let mut chooser = lock(&self.chooser);
            let before = chooser.current();
            chooser.sending(self.clock.now(), sending);
            if chooser.current() != before {
                tracing::debug!(?before, ?chooser, "packing changes");
            }
        }
        packing
    }

    /// Runs `work` with a packer, waiting for one as long as others pack.
    fn with_packer(&self, work: impl FnOnce(&mut Packer)) {
        let mut packers = self
            .returned
            .wait_while(lock(&self.packers), |packers| packers.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let packer = packers.pop().unwrap_or_default();
        drop(packers);
        let mut taken = Taken {
            packer,
            encoder: self,
        };
        work(&mut taken.packer);
    }

    fn try_pack(&self, packer: &mut Packer, effort: Effort, frame: &mut PageFrame) -> bool {
        let before = frame.data().len();
        let mut packed = false;
        self.measure(effort, before, || {
            packed = frame.pack(packer, effort);
            frame.data().len()
        });
        packed
    }

    fn probe(&self, packer: &mut Packer, effort: Effort, data: &[u8]) {
        self.measure(effort, data.len(), || {
            packer.pack(effort, data).map_or(data.len(), <[u8]>::len)
        });
    }

    /// Lets the chooser know how `pack` did with `before` bytes, of which it says how many are left. A
    /// few, as of a chunk of deltas, tell more of how a packer begins than of how it goes on.
    fn measure(&self, effort: Effort, before: usize, pack: impl FnOnce() -> usize) {
        let (began, cpu) = (self.clock.now(), cpu_time());
        let after = pack();
        if before < PROBE_BYTES {
            return;
        }
        let trial = Trial {
            effort,
            before: before as u64,
            after: after as u64,
            cpu: cpu_time().saturating_sub(cpu),
            took: self.clock.now().since(began),
        };
        lock(&self.chooser).tried(trial);
    }

    /// What was packed so far.
    pub(crate) fn totals(&self) -> EncodingTotals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let tally = &self.tally;
        EncodingTotals {
            raw_pages: read(&tally.raw_pages),
            lz4_pages: read(&tally.lz4_pages),
            zstd_pages: read(&tally.zstd_pages),
            delta_pages: read(&tally.delta_pages),
            delta_saved_bytes: read(&tally.delta_saved_bytes),
            data_bytes: read(&tally.data_bytes),
            sent_bytes: read(&tally.sent_bytes),
            cpu: Duration::from_nanos(read(&tally.cpu_nanos)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A packer at work. Comes back also from a lane that panics with it: others would wait for ever.
struct Taken<'a> {
    packer: Packer,
    encoder: &'a Encoder,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let packer = mem::take(&mut self.packer);
        lock(&self.encoder.packers).push(packer);
        self.encoder.returned.notify_one();
    }
}

/// The lane that a frame goes to.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnLane<'a> {
    /// Its number.
    pub(crate) index: usize,
    /// The round at work.
    pub(crate) round: Round,
    /// Its socket, where there is one.
    pub(crate) socket: Option<BorrowedFd<'a>>,
    /// What all lanes are held to, in bytes a second.
    pub(crate) bandwidth: Option<u64>,
}

/// Whether a few pages of `data` become smaller: the fastest way to pack tells that of all of them.
fn becomes_smaller(packer: &mut Packer, data: &[u8]) -> bool {
    let mut sample = [0; SAMPLE_PAGES * PAGE_SIZE];
    let pages = data.len() / PAGE_SIZE;
    if pages <= SAMPLE_PAGES {
        return packer.pack(Effort::Lz4, data).is_some();
    }
    for (at, page) in sample.chunks_exact_mut(PAGE_SIZE).enumerate() {
        let from = at * pages / SAMPLE_PAGES * PAGE_SIZE;
        page.copy_from_slice(&data[from..from + PAGE_SIZE]);
    }
    packer.pack(Effort::Lz4, &sample).is_some()
}

/// Time that this thread has had a core.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Into::into)
}
