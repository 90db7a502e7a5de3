//! The sending side of the page lanes.
//!
//! A round is one queue of dirty runs, its [`Feed`]. Lanes take chunks from it until it is empty and
//! closed, so that a slow lane holds nobody up, and then each writes its end of the round. When a lane
//! dies, the others take what is left of the queue, and what it took and did not bring is found in its
//! log.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;
use std::{io, thread};

use ferry_stream::limits::MAX_RECORDS;
use ferry_stream::link::{Closer, Lane};
use ferry_stream::message::{LaneId, Round};

use super::bases::Bases;
use super::deltas::Told;
use super::encode::Encoder;
use super::feed::Feed;
use super::log::{Log, ReclaimError};
use super::sender::Sender;
use crate::core::layout::{PAGE_SIZE, PageRange, RegionIndex};
use crate::core::message::{Deltas, LaneTotals, Pace, Reclaimed, Rewritten, ZeroPages};
use crate::core::pageset::PageSet;
use crate::pacer::Pacer;
use crate::vmm::{Fresh, Ram};
use crate::worker::Facts;

/// Pages that a lane takes from the queue at a time: large enough that system calls do not count,
/// small enough that lanes end a round together.
pub(super) const CHUNK_PAGES: u32 = 128;

/// Chunks that each lane sends in a second under a limit, at least. A lane pays for a chunk before it
/// sends it, and the last of many to have its turn would else seem dead.
const CHUNKS_PER_S: u64 = 8;

/// Pages that `lanes` lanes take at a time, which are held to `limit` bytes a second.
pub(crate) fn chunk_pages(limit: Option<u64>, lanes: usize) -> u32 {
    let Some(limit) = limit else {
        return CHUNK_PAGES;
    };
    let chunks = (lanes.max(1) as u64).saturating_mul(CHUNKS_PER_S);
    let pages = limit / chunks / PAGE_SIZE as u64;
    u32::try_from(pages).map_or(CHUNK_PAGES, |pages| pages.clamp(1, CHUNK_PAGES))
}

/// Most runs in a chunk. Each may break into pieces where zero pages are left out, and every piece is
/// a record of the frame.
pub(super) const CHUNK_RUNS: usize = MAX_RECORDS / 4;

/// What all lanes have done, counted by all of them.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pages: AtomicU64,
    zero_pages: AtomicU64,
    skipped_pages: AtomicU64,
    shared_pages: AtomicU64,
    pub(super) fresh_pages: AtomicU64,
    saved_bytes: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) waited_ns: AtomicU64,
}

/// What became of the pages of a chunk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Dealt {
    /// Told.
    pub(super) pages: u64,
    /// Zero, told or not.
    pub(super) zero: u64,
    /// Zero, and not told.
    pub(super) skipped: u64,
    /// Told as deltas.
    pub(super) told: Told,
    /// Told without bytes: the target takes them from here.
    pub(super) shared: u64,
}

impl Counters {
    /// A frame has left, or a chunk of which nothing is told was looked at. Zero pages and deltas come
    /// last, and are read first: they never seem to be more than the pages that they are among.
    pub(super) fn count(&self, dealt: Dealt, bytes: u64) {
        self.skipped_pages
            .fetch_add(dealt.skipped, Ordering::AcqRel);
        self.pages.fetch_add(dealt.pages, Ordering::AcqRel);
        self.zero_pages.fetch_add(dealt.zero, Ordering::AcqRel);
        self.saved_bytes
            .fetch_add(dealt.told.saved_bytes(), Ordering::AcqRel);
        self.shared_pages.fetch_add(dealt.shared, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Pages that the target was told to take from the source's RAM.
    pub(crate) fn shared_pages(&self) -> u64 {
        self.shared_pages.load(Ordering::Relaxed)
    }

    pub(crate) fn totals(&self) -> LaneTotals {
        let zero_pages = self.zero_pages.load(Ordering::Acquire);
        LaneTotals {
            zero_pages,
            saved_bytes: self.saved_bytes.load(Ordering::Acquire),
            pages: self.pages.load(Ordering::Acquire),
            skipped_pages: self.skipped_pages.load(Ordering::Acquire),
            fresh_pages: self.fresh_pages.load(Ordering::Acquire),
            bytes: self.bytes.load(Ordering::Acquire),
            waited: Duration::from_nanos(self.waited_ns.load(Ordering::Acquire)),
        }
    }
}

/// What every lane works with.
#[derive(Clone)]
pub(crate) struct Outfit {
    pub(crate) ram: Arc<dyn Ram>,
    pub(crate) pacer: Arc<Pacer>,
    pub(crate) encoder: Arc<Encoder>,
    pub(crate) bases: Arc<Bases>,
    pub(crate) counters: Arc<Counters>,
    /// Set when tracking has begun.
    pub(crate) fresh: Arc<OnceLock<Arc<dyn Fresh>>>,
    /// Whether the target takes pages from the source's RAM. Said before the first lane stands.
    pub(crate) shares: Arc<AtomicBool>,
    pub(crate) facts: Facts,
}

/// Pages of one region, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) region: RegionIndex,
    pub(super) range: PageRange,
}

/// A round, as it is ordered, and shared by the lanes.
pub(crate) struct RoundOrder {
    pub(crate) round: Round,
    pub(crate) feed: Arc<Feed>,
    pub(crate) zeros: ZeroPages,
    pub(crate) rewritten: Rewritten,
    pub(crate) deltas: Deltas,
    pub(crate) pace: Pace,
}

/// The sending lanes of a migration.
#[derive(Default)]
pub(crate) struct Senders {
    lanes: Vec<SendingLane>,
    /// The open round.
    open: Option<Arc<RoundOrder>>,
    /// Lanes that were cut before they stood.
    unwanted: Vec<LaneId>,
    closed: bool,
}

/// A lane, as its owner holds it.
pub(crate) struct SendingLane {
    id: LaneId,
    rounds: Option<mpsc::Sender<Arc<RoundOrder>>>,
    joined: bool,
    closer: Box<dyn Closer>,
    cut: Arc<AtomicBool>,
    thread: thread::JoinHandle<Log>,
}

impl Senders {
    /// Starts a thread for a lane that was welcomed. One that is not wanted any more is closed.
    pub(crate) fn add(
        &mut self,
        id: LaneId,
        lane: Box<dyn Lane>,
        outfit: &Outfit,
    ) -> io::Result<()> {
        if self.closed || self.unwanted.contains(&id) {
            return Ok(());
        }
        let closer = lane.closer()?;
        let (queue, rounds) = mpsc::channel();
        let cut = Arc::new(AtomicBool::new(false));
        let sender = Sender::new(id, lane, outfit.clone(), Arc::clone(&cut));
        let thread = thread::Builder::new()
            .name(format!("ferry-lane-{}", id.index.0))
            .spawn(move || sender.run(&rounds))?;
        self.lanes.push(SendingLane {
            id,
            rounds: Some(queue),
            joined: false,
            closer,
            cut,
            thread,
        });
        Ok(())
    }

    /// Gives a lane its part in the open round and in those that follow.
    pub(crate) fn join_in(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.id == id) {
            lane.joined = true;
            if let Some(round) = &self.open {
                lane.send(round);
            }
        }
    }

    /// Lanes that take part in rounds.
    pub(crate) fn joined(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.joined).count()
    }

    /// Sends a round over all lanes that have joined.
    pub(crate) fn copy(&mut self, order: RoundOrder) {
        let round = Arc::new(order);
        for lane in self.lanes.iter().filter(|lane| lane.joined) {
            lane.send(&round);
        }
        self.open = Some(round);
    }

    /// Ends a lane, whatever it is doing, or sees to it that it never begins.
    pub(crate) fn cut(&mut self, id: LaneId, pacer: &Pacer) {
        match self.lanes.iter_mut().find(|lane| lane.id == id) {
            Some(lane) => lane.close(),
            None => self.unwanted.push(id),
        }
        pacer.wake();
        self.wake();
    }

    /// Lets a lane notice that waits for pages and was cut.
    fn wake(&self) {
        if let Some(round) = &self.open {
            round.feed.wake();
        }
    }

    /// Gives away a lane that was cut, to be waited for.
    pub(crate) fn remove(&mut self, id: LaneId) -> Option<SendingLane> {
        let at = self.lanes.iter().position(|lane| lane.id == id)?;
        Some(self.lanes.swap_remove(at))
    }

    /// Ends every lane, whatever it is doing.
    pub(crate) fn close(&mut self, pacer: &Pacer) {
        self.closed = true;
        self.lanes.iter_mut().for_each(SendingLane::close);
        pacer.wake();
        self.wake();
    }

    /// Waits for the threads, which end once closed.
    pub(crate) fn join(mut self, pacer: &Pacer) {
        self.close(pacer);
        for lane in self.lanes.drain(..) {
            drop(lane.thread.join());
        }
    }
}

impl SendingLane {
    fn send(&self, round: &Arc<RoundOrder>) {
        if let Some(rounds) = &self.rounds {
            // A lane that ended has told so.
            drop(rounds.send(Arc::clone(round)));
        }
    }

    fn close(&mut self) {
        self.cut.store(true, Ordering::Release);
        self.rounds = None;
        // One that cannot be closed is ended already.
        drop(self.closer.close());
    }

    /// Waits until the thread has ended, and finds out what is not in place. None of a lane that
    /// broke down: it has told so, and the migration ends.
    pub(crate) fn reclaim(
        mut self,
        frames: u64,
        into: PageSet,
    ) -> Option<Result<Reclaimed, ReclaimError>> {
        self.close();
        let log = self.thread.join().ok()?;
        Some(log.reclaim(frames, into))
    }
}
