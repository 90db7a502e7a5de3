//! A sending lane's thread: takes chunks, reads them, and writes them to its connection.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use ferry_stream::lane::PageLaneWriter;
use ferry_stream::link::Lane;
use ferry_stream::message::LaneId;
use ferry_stream::pages::{PageFrame, PageRun, Zeros};

use super::deltas::{Differ, Told};
use super::encode::OnLane;
use super::fresh::Looks;
use super::log::Log;
use super::send::{CHUNK_PAGES, CHUNK_RUNS, Dealt, Outfit, RoundOrder, Run};
use super::{PanicWatch, is_death};
use crate::core::layout::{PAGE_SIZE, PageRange};
use crate::core::message::{Failure, Input, Pace, Rewritten, Step, ZeroPages};
use crate::core::outcome::in_full;
use crate::pacer::{Account, Paid};
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
    differ: Differ,
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
            differ: Differ::new(Arc::clone(&outfit.bases)),
            outfit,
            log: Log::default(),
            account: Account::default(),
            cut,
        }
    }

    /// Sends round after round. Whatever ends it, its log says what it had taken.
    pub(super) fn run(mut self, rounds: &mpsc::Receiver<Arc<RoundOrder>>) -> Log {
        let facts = self.outfit.facts.clone();
        let _watch = PanicWatch(facts.clone());
        let mut runs = Vec::with_capacity(CHUNK_RUNS);
        for round in rounds {
            if let Err(broken) = self.round(&round, &mut runs) {
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

    fn round(&mut self, order: &Arc<RoundOrder>, runs: &mut Vec<Run>) -> Result<(), Broken> {
        self.log.begin(order, self.writer.frames());
        order.feed.join();
        while let Some(at) = order.feed.take(runs, &self.cut) {
            // Before anything can fail: from here on the chunk is nobody else's.
            self.log.take(at);
            // Before it is looked at and read: what is written while it waits for its turn is sent so.
            let paid = self.pay(order, runs);
            self.go_on()?;
            if order.rewritten == Rewritten::LeaveOut {
                let left_out = self.looks.leave_out(runs)?;
                let counter = &self.outfit.counters.fresh_pages;
                counter.fetch_add(left_out, Ordering::AcqRel);
            }
            let dealt = self.fill(order, runs)?;
            self.encode(order, dealt.told);
            self.log.tell(dealt.pages);
            if let Some(paid) = paid {
                self.settle(paid, dealt);
            }
            self.go_on()?;
            let bytes = self.writer.send(&mut *self.lane, &mut self.frame)?;
            self.outfit.counters.count(dealt, bytes);
        }
        self.go_on()?;
        let bytes = self.writer.end_round(&mut *self.lane, order.round)?;
        let counters = &self.outfit.counters;
        counters.bytes.fetch_add(bytes, Ordering::AcqRel);
        self.outfit.facts.tell(Input::LaneSent {
            lane: self.id,
            round: order.round,
            pages: self.log.told(),
            totals: counters.totals(),
        });
        Ok(())
    }

    /// What lanes are held to in this round.
    fn limit(&self, order: &RoundOrder) -> Option<u64> {
        match order.pace {
            Pace::Limited => self.outfit.pacer.limit(),
            Pace::Free => None,
        }
    }

    fn encode(&mut self, order: &RoundOrder, told: Told) {
        if self.frame.data().is_empty() {
            return;
        }
        let lane = OnLane {
            index: usize::from(self.id.index.0),
            round: order.round,
            socket: self.lane.socket(),
            bandwidth: self.limit(order),
        };
        self.outfit.encoder.encode(&mut self.frame, told, lane);
    }

    /// Pays for a chunk as if all of it were sent as it is. None where there is nothing to pay.
    fn pay(&mut self, order: &RoundOrder, runs: &[Run]) -> Option<Paid> {
        if order.pace != Pace::Limited {
            return None;
        }
        let pages: u64 = runs.iter().map(|run| run.range.count).sum();
        let pacer = &self.outfit.pacer;
        let paid = pacer.pay(&mut self.account, pages * PAGE_SIZE as u64, &self.cut);
        let nanos = u64::try_from(paid.waited.as_nanos()).unwrap_or(u64::MAX);
        let counters = &self.outfit.counters;
        counters.waited_ns.fetch_add(nanos, Ordering::AcqRel);
        Some(paid)
    }

    /// Settles for what leaves, and for shared pages as if they did: whoever asks for a limit wants the
    /// host to have rest, and the frame that tells of them is next to nothing.
    fn settle(&mut self, paid: Paid, dealt: Dealt) {
        let sent = if self.frame.is_empty() {
            0
        } else {
            self.frame.wire_bytes() + dealt.shared * PAGE_SIZE as u64
        };
        self.outfit.pacer.settle(&mut self.account, paid, sent);
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

    /// Tells the runs by a frame.
    fn fill(&mut self, order: &RoundOrder, runs: &[Run]) -> Result<Dealt, Broken> {
        self.frame.begin(order.round);
        if self.outfit.shares.load(Ordering::Acquire) {
            self.fill_shared(runs)
        } else {
            self.fill_copied(order, runs)
        }
    }

    /// The target takes the runs from here, and finds the zero pages among them.
    fn fill_shared(&mut self, runs: &[Run]) -> Result<Dealt, Broken> {
        for &run in runs {
            self.frame.push_shared(page_run(run))?;
        }
        let pages = self.frame.pages();
        Ok(Dealt {
            pages,
            shared: pages,
            ..Dealt::default()
        })
    }

    /// Copies the runs from guest RAM into the frame, without their zero pages, and with what changed of
    /// those of which something is kept.
    fn fill_copied(&mut self, order: &RoundOrder, runs: &[Run]) -> Result<Dealt, Broken> {
        let mut dealt = Dealt::default();
        let zeros = match order.zeros {
            ZeroPages::Tell => Zeros::Tell,
            ZeroPages::Skip => Zeros::Skip,
        };
        let (encoder, limit) = (&self.outfit.encoder, self.limit(order));
        self.differ
            .begin(order.round, order.deltas, || encoder.thrift(limit));
        for &run in runs {
            let mut rest = run.range;
            while !rest.is_empty() {
                let piece = self.differ.piece(Run { range: rest, ..run });
                rest = PageRange::new(piece.end().0, rest.count - piece.count);
                let piece = Run {
                    range: piece,
                    ..run
                };
                dealt.zero += self.fill_piece(piece, zeros)?;
            }
        }
        dealt.told = self.differ.finish();
        if zeros == Zeros::Skip {
            dealt.skipped = dealt.zero;
        }
        dealt.pages = self.frame.pages();
        Ok(dealt)
    }

    /// Copies pages that are told alike; returns how many of them are zero.
    fn fill_piece(&mut self, piece: Run, zeros: Zeros) -> Result<u64, Broken> {
        let Run { region, range } = piece;
        let bytes = self.frame.push_raw(page_run(piece))?;
        self.outfit.ram.read(region, range, bytes)?;
        self.differ.note(piece, bytes);
        let zero = self.frame.elide_zeros(zeros);
        self.differ.tell(&mut self.frame);
        Ok(zero)
    }
}

fn page_run(Run { region, range }: Run) -> PageRun {
    PageRun {
        region: region.0,
        first: range.first.0,
        count: u32::try_from(range.count).expect("a chunk has at most CHUNK_PAGES pages"),
    }
}
