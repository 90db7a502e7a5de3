//! The sending side of the page lanes.
//!
//! A round is one queue of dirty runs. Lanes take chunks from it until it is empty, so that a slow
//! lane holds nobody up, and then each writes its end of the round.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::{io, thread};

use ferry_stream::lane::PageLaneWriter;
use ferry_stream::limits::MAX_RECORDS;
use ferry_stream::link::Lane;
use ferry_stream::message::{LaneId, LaneIndex, Round};
use ferry_stream::pages::{PageFrame, PageRun, Zeros};

use super::encode::{Encoder, OnLane};
use super::{Closers, tell_lost};
use crate::core::layout::{PageRange, RegionIndex};
use crate::core::message::{Failure, Input, LaneTotals, Step, ZeroPages};
use crate::core::pageset::{Cursor, PageSet};
use crate::pacer::Pacer;
use crate::vmm::{Ram, VmmError};
use crate::worker::Facts;

/// Pages that a lane takes from the queue at a time: large enough that system calls do not count,
/// small enough that lanes end a round together.
const CHUNK_PAGES: u32 = 128;

/// Most runs in a chunk. Each may break into pieces where zero pages are left out, and every piece is
/// a record of the frame.
const CHUNK_RUNS: usize = MAX_RECORDS / 4;

/// What all lanes have done, counted by all of them.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pages: AtomicU64,
    zero_pages: AtomicU64,
    skipped_pages: AtomicU64,
    bytes: AtomicU64,
}

impl Counters {
    pub(crate) fn totals(&self) -> LaneTotals {
        LaneTotals {
            pages: self.pages.load(Ordering::Acquire),
            zero_pages: self.zero_pages.load(Ordering::Acquire),
            skipped_pages: self.skipped_pages.load(Ordering::Acquire),
            bytes: self.bytes.load(Ordering::Acquire),
        }
    }
}

/// What every lane works with.
#[derive(Clone)]
pub(crate) struct Outfit {
    pub(crate) ram: Arc<dyn Ram>,
    pub(crate) pacer: Arc<Pacer>,
    pub(crate) encoder: Arc<Encoder>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) facts: Facts,
}

/// A round, shared by the lanes.
struct Queue {
    round: Round,
    pages: Arc<PageSet>,
    zeros: ZeroPages,
    cursor: Mutex<Cursor>,
    lanes_left: AtomicUsize,
}

impl Queue {
    /// Replaces `runs` by the next chunk; leaves it empty at the end of the round.
    fn take(&self, runs: &mut Vec<(RegionIndex, PageRange)>) {
        runs.clear();
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let mut room = u64::from(CHUNK_PAGES);
        while room > 0 && runs.len() < CHUNK_RUNS {
            let Some((region, range)) = self.pages.next_run(&mut cursor, room) else {
                break;
            };
            room -= range.count;
            runs.push((region, range));
        }
    }
}

/// The sending lanes of a migration.
#[derive(Default)]
pub(crate) struct Senders {
    queues: Vec<mpsc::Sender<Arc<Queue>>>,
    threads: Vec<thread::JoinHandle<()>>,
    closers: Closers,
}

impl Senders {
    /// Starts a thread for each of `lanes`, numbered from 1.
    pub(crate) fn start(lanes: Vec<Box<dyn Lane>>, outfit: &Outfit) -> io::Result<Self> {
        let mut senders = Self::default();
        for (index, lane) in (1..).zip(lanes) {
            senders.closers.add(lane.closer()?);
            let (queue, rounds) = mpsc::channel();
            let outfit = outfit.clone();
            let thread = thread::Builder::new()
                .name(format!("ferry-lane-{index}"))
                .spawn(move || Sender::new(LaneIndex(index), lane, outfit).run(&rounds))?;
            senders.queues.push(queue);
            senders.threads.push(thread);
        }
        Ok(senders)
    }

    /// Sends `pages` as `round`, over all lanes.
    pub(crate) fn copy(&self, round: Round, pages: Arc<PageSet>, zeros: ZeroPages) {
        let queue = Arc::new(Queue {
            round,
            pages,
            zeros,
            cursor: Mutex::default(),
            lanes_left: AtomicUsize::new(self.queues.len()),
        });
        for lane in &self.queues {
            // A lane that ended has told so.
            drop(lane.send(Arc::clone(&queue)));
        }
    }

    /// Ends every lane, whatever it is doing.
    pub(crate) fn close(&mut self) {
        self.closers.close();
        self.queues.clear();
    }

    /// Waits for the threads, which end once closed.
    pub(crate) fn join(mut self) {
        self.close();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// Why a lane's thread ends.
enum Broken {
    Wire(ferry_stream::Error),
    Vmm(VmmError),
}

impl From<ferry_stream::Error> for Broken {
    fn from(error: ferry_stream::Error) -> Self {
        Self::Wire(error)
    }
}

impl From<VmmError> for Broken {
    fn from(error: VmmError) -> Self {
        Self::Vmm(error)
    }
}

/// One lane's thread.
struct Sender {
    index: LaneIndex,
    lane: Box<dyn Lane>,
    writer: PageLaneWriter,
    frame: PageFrame,
    outfit: Outfit,
}

impl Sender {
    fn new(index: LaneIndex, lane: Box<dyn Lane>, outfit: Outfit) -> Self {
        let writer = PageLaneWriter::new(LaneId::first(index));
        Self {
            index,
            lane,
            writer,
            frame: PageFrame::new(CHUNK_PAGES),
            outfit,
        }
    }

    fn run(mut self, rounds: &mpsc::Receiver<Arc<Queue>>) {
        let facts = self.outfit.facts.clone();
        let _watch = PanicWatch(facts.clone());
        let mut runs = Vec::with_capacity(CHUNK_RUNS);
        for queue in rounds {
            if let Err(broken) = self.round(&queue, &mut runs) {
                match broken {
                    Broken::Vmm(error) => {
                        facts.tell(Input::Failed(Failure::new(Step::Pages, error)));
                    }
                    Broken::Wire(error) => tell_lost(&facts, self.index, &error),
                }
                return;
            }
        }
    }

    fn round(
        &mut self,
        queue: &Queue,
        runs: &mut Vec<(RegionIndex, PageRange)>,
    ) -> Result<(), Broken> {
        loop {
            queue.take(runs);
            if runs.is_empty() {
                break;
            }
            self.fill(queue, runs)?;
            self.encode(queue.round);
            self.outfit.pacer.pay(self.frame.wire_bytes());
            let pages = self.frame.pages();
            let bytes = self.writer.send(&mut *self.lane, &mut self.frame)?;
            let counters = &self.outfit.counters;
            counters.pages.fetch_add(pages, Ordering::AcqRel);
            counters.bytes.fetch_add(bytes, Ordering::AcqRel);
        }
        let bytes = self.writer.end_round(&mut *self.lane, queue.round)?;
        self.outfit
            .counters
            .bytes
            .fetch_add(bytes, Ordering::AcqRel);
        if queue.lanes_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let totals = self.outfit.counters.totals();
            self.outfit.facts.tell(Input::RoundSent {
                round: queue.round,
                totals,
            });
        }
        Ok(())
    }

    fn encode(&mut self, round: Round) {
        let lane = OnLane {
            index: usize::from(self.index.0),
            round,
            socket: self.lane.socket(),
            bandwidth: self.outfit.pacer.limit(),
        };
        self.outfit.encoder.encode(&mut self.frame, lane);
    }

    /// Copies the runs from guest RAM into the frame, without their zero pages.
    fn fill(&mut self, queue: &Queue, runs: &[(RegionIndex, PageRange)]) -> Result<(), Broken> {
        self.frame.begin(queue.round);
        for &(region, range) in runs {
            let count = u32::try_from(range.count).expect("a chunk has at most CHUNK_PAGES pages");
            let run = PageRun {
                region: region.0,
                first: range.first.0,
                count,
            };
            self.outfit
                .ram
                .read(region, range, self.frame.push_raw(run)?)?;
            let zeros = match queue.zeros {
                ZeroPages::Tell => Zeros::Tell,
                ZeroPages::Skip => Zeros::Skip,
            };
            let zero_pages = self.frame.elide_zeros(zeros);
            self.outfit
                .counters
                .zero_pages
                .fetch_add(zero_pages, Ordering::AcqRel);
            if zeros == Zeros::Skip {
                self.outfit
                    .counters
                    .skipped_pages
                    .fetch_add(zero_pages, Ordering::AcqRel);
            }
        }
        Ok(())
    }
}

/// Tells of a thread that panicked: the migration ends, and the guest is kept.
pub(super) struct PanicWatch(pub(super) Facts);

impl Drop for PanicWatch {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.tell(Input::Failed(Failure::new(
                Step::Pages,
                "a page worker panicked",
            )));
        }
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
