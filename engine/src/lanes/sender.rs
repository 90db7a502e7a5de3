//! A sending lane's thread: takes chunks, reads them, and writes them to its connection.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use ferry_stream::lane::PageLaneWriter;
use ferry_stream::link::Lane;
use ferry_stream::message::{LaneId, Round};
use ferry_stream::pages::{PageFrame, PageRun, Zeros};

use super::encode::OnLane;
use super::fresh::Looks;
use super::log::Log;
use super::send::{CHUNK_PAGES, CHUNK_RUNS, Dealt, Outfit, Queue, Run};
use super::{PanicWatch, is_death};
use crate::core::message::{Failure, Input, Pace, Rewritten, Step, ZeroPages};
use crate::core::outcome::in_full;
use crate::pacer::Account;
use crate::vmm::VmmError;

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
pub(super) struct Sender {
    id: LaneId,
    lane: Box<dyn Lane>,
    writer: PageLaneWriter,
    frame: PageFrame,
    outfit: Outfit,
    log: Log,
    looks: Looks,
    /// What it has sent under a limit.
    account: Account,
    /// Set when this side ends the lane: that it ends is no news then.
    cut: Arc<AtomicBool>,
}

impl Sender {
    pub(super) fn new(
        id: LaneId,
        lane: Box<dyn Lane>,
        outfit: Outfit,
        cut: Arc<AtomicBool>,
    ) -> Self {
        Self {
            id,
            lane,
            writer: PageLaneWriter::new(id),
            frame: PageFrame::new(CHUNK_PAGES),
            looks: Looks::new(Arc::clone(&outfit.fresh)),
            outfit,
            log: Log::default(),
            account: Account::default(),
            cut,
        }
    }

    /// Sends round after round. Whatever ends it, its log says what it had taken.
    pub(super) fn run(mut self, rounds: &mpsc::Receiver<Arc<Queue>>) -> Log {
        let facts = self.outfit.facts.clone();
        let _watch = PanicWatch(facts.clone());
        let mut runs = Vec::with_capacity(CHUNK_RUNS);
        for queue in rounds {
            if let Err(broken) = self.round(&queue, &mut runs) {
                match broken {
                    _ if self.is_cut() => {}
                    Broken::Wire(error) if is_death(&error) => facts.tell(Input::LaneLost {
                        lane: self.id,
                        what: in_full(&error),
                    }),
                    Broken::Wire(error) => {
                        facts.tell(Input::Failed(Failure::new(Step::Pages, error)));
                    }
                    Broken::Vmm(error) => {
                        facts.tell(Input::Failed(Failure::new(Step::Pages, error)));
                    }
                }
                break;
            }
        }
        self.log
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    fn round(&mut self, queue: &Arc<Queue>, runs: &mut Vec<Run>) -> Result<(), Broken> {
        self.log.begin(queue, self.writer.frames());
        while let Some(at) = queue.take(runs) {
            // Before anything can fail: from here on the chunk is nobody else's.
            self.log.take(at);
            if queue.rewritten == Rewritten::LeaveOut {
                let left_out = self.looks.leave_out(runs)?;
                let counter = &self.outfit.counters.fresh_pages;
                counter.fetch_add(left_out, Ordering::AcqRel);
            }
            let dealt = self.fill(queue, runs)?;
            self.encode(queue.round);
            self.log.tell(dealt.pages);
            if queue.pace == Pace::Limited {
                self.pay();
            }
            self.go_on()?;
            let bytes = self.writer.send(&mut *self.lane, &mut self.frame)?;
            self.outfit.counters.count(dealt, bytes);
        }
        self.go_on()?;
        let bytes = self.writer.end_round(&mut *self.lane, queue.round)?;
        let counters = &self.outfit.counters;
        counters.bytes.fetch_add(bytes, Ordering::AcqRel);
        self.outfit.facts.tell(Input::LaneSent {
            lane: self.id,
            round: queue.round,
            pages: self.log.told(),
            totals: counters.totals(),
        });
        Ok(())
    }

    fn encode(&mut self, round: Round) {
        let lane = OnLane {
            index: usize::from(self.id.index.0),
            round,
            socket: self.lane.socket(),
            bandwidth: self.outfit.pacer.limit(),
        };
        self.outfit.encoder.encode(&mut self.frame, lane);
    }

    fn pay(&mut self) {
        let bytes = self.frame.wire_bytes();
        let pacer = &self.outfit.pacer;
        let waited = pacer.pay(&mut self.account, bytes, &self.cut);
        if !waited.is_zero() {
            let nanos = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
            let counters = &self.outfit.counters;
            counters.waited_ns.fetch_add(nanos, Ordering::AcqRel);
        }
    }

    /// A lane that was cut takes no further chunk.
    fn go_on(&self) -> Result<(), Broken> {
        if self.is_cut() {
            return Err(Broken::Wire(
                io::Error::from(io::ErrorKind::ConnectionAborted).into(),
            ));
        }
        Ok(())
    }

    /// Copies the runs from guest RAM into the frame, without their zero pages.
    fn fill(&mut self, queue: &Queue, runs: &[Run]) -> Result<Dealt, Broken> {
        self.frame.begin(queue.round);
        let mut dealt = Dealt::default();
        let zeros = match queue.zeros {
            ZeroPages::Tell => Zeros::Tell,
            ZeroPages::Skip => Zeros::Skip,
        };
        for &Run { region, range } in runs {
            let count = u32::try_from(range.count).expect("a chunk has at most CHUNK_PAGES pages");
            let run = PageRun {
                region: region.0,
                first: range.first.0,
                count,
            };
            self.outfit
                .ram
                .read(region, range, self.frame.push_raw(run)?)?;
            dealt.zero += self.frame.elide_zeros(zeros);
        }
        if zeros == Zeros::Skip {
            dealt.skipped = dealt.zero;
        }
        dealt.pages = self.frame.pages();
        Ok(dealt)
    }
}
