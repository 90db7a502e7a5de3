//! What lies between the two: bytes in order on every connection, and cuts.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::Duration;

use ferry_engine::core::layout::{PageRange, RegionIndex};
use ferry_engine::core::message::ZeroPages;
use ferry_stream::message::Round;

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

    /// True when what comes in at `now` came before the cut.
    pub(super) fn delivers(&self, now: Duration) -> bool {
        self.ends.is_none_or(|ends| now <= ends)
    }
}

/// What travels on a page lane.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    /// Pages with what they hold.
    Pages {
        /// Their region.
        region: RegionIndex,
        /// Each page that is told.
        told: Vec<(u64, Content)>,
    },
    /// The lane's end of a round.
    End {
        /// The round.
        round: Round,
        /// Pages told on the lane in it.
        pages: u64,
    },
}

/// What a lane's worker has to do at the source.
#[derive(Clone, Debug)]
pub(super) enum LaneJob {
    /// Read these pages and send them.
    Copy(RegionIndex, PageRange, ZeroPages),
    /// End the round.
    End(Round),
}

/// A page lane with its workers at both ends.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// What the source's worker has still to do.
    pub(super) jobs: VecDeque<LaneJob>,
    /// What it is at, with the pages as they were when it began to read.
    pub(super) current: Option<(LaneJob, Vec<Content>)>,
    /// The connection.
    pub(super) pipe: Pipe,
    /// Pages told in this round.
    pub(super) told: u64,
    /// When the target's worker will have done all that has arrived.
    pub(super) placed: Duration,
}
