//! What lies between the two: bytes in order on every connection, and cuts.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::Duration;

use ferry_engine::core::layout::{PageRange, RegionIndex};
use ferry_engine::core::message::{Deltas, Rewritten, ZeroPages};
use ferry_stream::message::{LaneId, Round};

use super::guest::Content;
use super::rng::Rng;

/// One direction of a connection: late, in order, and perhaps cut.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    last: Duration,
    cut: bool,
    /// What would arrive after this moment is lost.
    ends: Option<Duration>,
}

impl Pipe {
    /// Sends something, and tells when it arrives; `None` when it goes nowhere.
    pub(super) fn send(
        &mut self,
        now: Duration,
        rng: &mut Rng,
        wire_us: &RangeInclusive<u64>,
    ) -> Option<Duration> {
        if self.cut {
            return None;
        }
        self.last = self.last.max(now + rng.micros(wire_us.clone()));
        Some(self.last)
    }

    /// Cuts it. Of what is on its way, a part at the front may still arrive. Returns when the end
    /// can be noticed by whoever reads.
    pub(super) fn cut(&mut self, now: Duration, rng: &mut Rng) -> Duration {
        self.cut = true;
        let on_its_way = self.last.saturating_sub(now);
        let survives = rng.pick(&[Duration::ZERO, on_its_way / 2, on_its_way]);
        let ends = now + survives;
        *self.ends.get_or_insert(ends)
    }

    /// Closes it in order: everything arrives, and then its end.
    pub(super) fn close(&mut self, now: Duration) -> Duration {
        self.cut = true;
        self.last.max(now)
    }

    /// True as long as it was neither cut nor closed.
    pub(super) fn stands(&self) -> bool {
        !self.cut
    }

    /// True when what comes in at `now` came before the cut.
    pub(super) fn delivers(&self, now: Duration) -> bool {
        self.ends.is_none_or(|ends| now <= ends)
    }
}

/// How a page is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Told {
    /// By what it holds.
    Whole(Content),
    /// By its name alone: the target takes it from the source's RAM when it comes to it.
    Shared,
    /// By how that differs from what it held.
    Delta {
        /// What the source believes that the target has.
        base: Content,
        /// What it holds.
        content: Content,
    },
}

/// What travels on a page lane.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    /// Pages with what they hold.
    Pages {
        /// The round.
        round: Round,
        /// Their region.
        region: RegionIndex,
        /// Each page that is told.
        told: Vec<(u64, Told)>,
    },
    /// The lane's end of a round.
    End {
        /// The round.
        round: Round,
        /// Pages told on the lane in it.
        pages: u64,
    },
}

/// Pages that lie side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    /// Their region.
    pub(super) region: RegionIndex,
    /// Which.
    pub(super) range: PageRange,
}

/// A round, shared by the lanes.
#[derive(Debug)]
pub(super) struct Queue {
    /// Which.
    pub(super) round: Round,
    /// Whether zeros are told.
    pub(super) zeros: ZeroPages,
    /// Whether pages may be left out.
    pub(super) rewritten: Rewritten,
    /// Whether pages may be told as deltas.
    pub(super) deltas: Deltas,
    /// What nobody has taken yet.
    pub(super) feed: Feed,
}

/// Pages of a round: all of them, or as far as a scan has handed them on.
#[derive(Debug)]
pub(super) struct Feed {
    pub(super) chunks: VecDeque<Chunk>,
    /// Whether a scan goes on.
    pub(super) open: bool,
    /// Pages that were handed on.
    pub(super) pages: u64,
}

/// Most pages that a worker reads at once.
const CHUNK_PAGES: u64 = 5;

impl Feed {
    pub(super) fn open() -> Self {
        Self {
            chunks: VecDeque::new(),
            open: true,
            pages: 0,
        }
    }

    /// Adds pages, in chunks.
    pub(super) fn add(&mut self, region: RegionIndex, mut rest: PageRange) {
        self.pages += rest.count;
        while !rest.is_empty() {
            let mut range = rest;
            range.count = rest.count.min(CHUNK_PAGES);
            rest.first.0 += range.count;
            rest.count -= range.count;
            self.chunks.push_back(Chunk { region, range });
        }
    }
}

/// What a lane's worker at the source is at.
#[derive(Debug)]
pub(super) enum LaneJob {
    /// Reading these pages, which held this when it began.
    Copy(Chunk, ZeroPages, Vec<Reading>),
    /// Ending the round.
    End(Round),
}

/// A page that a worker reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// What it held before.
    pub(super) before: Content,
    /// Whether it is left out.
    pub(super) left_out: bool,
}

/// A frame in the log of the source's worker.
#[derive(Debug)]
pub(super) struct Logged {
    /// What was taken for it.
    pub(super) chunk: Chunk,
    /// Pages told of it.
    pub(super) told: u64,
}

/// One connection of a page lane, with its workers at both ends.
#[derive(Debug)]
pub(super) struct Lane {
    /// Which.
    pub(super) id: LaneId,
    /// The connection.
    pub(super) pipe: Pipe,
    /// The source's worker.
    pub(super) sender: Sender,
    /// The target's worker.
    pub(super) receiver: Receiver,
}

/// The source's worker of a lane.
#[derive(Debug, Default)]
pub(super) struct Sender {
    /// It takes part.
    pub(super) joined: bool,
    /// It was ended.
    pub(super) cut: bool,
    /// What it is at.
    pub(super) job: Option<LaneJob>,
    /// The round it is in, or was last.
    pub(super) round: Round,
    /// Whether it has ended that round.
    pub(super) ended: bool,
    /// The number of that round's first frame.
    pub(super) first: u64,
    /// The frames of that round.
    pub(super) log: Vec<Logged>,
    /// Frames sent.
    pub(super) frames: u64,
}

/// The target's worker of a lane.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    /// It was told to end.
    pub(super) ending: bool,
    /// It has ended.
    pub(super) over: bool,
    /// Arrived and not in place yet.
    pub(super) arrived: VecDeque<Frame>,
    /// Frames that have arrived, in place or not.
    pub(super) seen: u64,
    /// Frames in place.
    pub(super) frames: u64,
    /// Pages of those after the last end of a round.
    pub(super) pages: u64,
    /// When it will have placed all that has arrived.
    pub(super) placed: Duration,
}

impl Lane {
    pub(super) fn new(id: LaneId) -> Self {
        Self {
            id,
            pipe: Pipe::default(),
            sender: Sender::default(),
            receiver: Receiver::default(),
        }
    }
}
