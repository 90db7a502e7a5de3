//! Pages told by how they differ: what the source keeps of what it sent, and what the target makes of
//! it. What is kept, and what is told so, is up to chance; whether it may be, to the machines.

use std::collections::BTreeMap;

use ferry_engine::core::layout::{PageNumber, RegionIndex};
use ferry_engine::core::message::{Deltas, Input};
use ferry_stream::message::Round;

use super::checks::Violation;
use super::flaw::Flaw;
use super::guest::{Content, RunBy};
use super::link::Told;
use super::plan::Side;
use super::worker::Thread;
use super::world::World;

/// How many of a hundred pages that are sent are kept.
const KEPT: u64 = 80;

/// How many of a hundred pages that are kept are told as deltas.
const AS_DELTAS: u64 = 80;

/// What is made of one kept page in so many, once the memory of them has gone bad.
const SPOILT: Content = Content(u64::MAX >> 2);
const GOES_BAD: u64 = 2;

/// What was sent of pages, and in which round.
#[derive(Debug, Default)]
pub(super) struct Bases {
    kept: BTreeMap<(RegionIndex, u64), (Content, Round)>,
    /// The source's memory of what it sent has gone bad.
    pub(super) spoilt: bool,
    /// Pages told as deltas.
    pub(super) told: u64,
    /// Those that did not fit.
    pub(super) mismatched: u64,
}

impl World {
    /// A round begins.
    pub(super) fn begin_deltas(&mut self, deltas: Deltas) {
        if deltas == Deltas::Off || deltas == Deltas::Anew && self.flaw != Some(Flaw::BasesKept) {
            self.bases.kept.clear();
        }
    }

    /// How a page is told that holds `content`, and what is kept of it.
    pub(super) fn tell_page(
        &mut self,
        lane: usize,
        place: (RegionIndex, u64),
        content: Content,
    ) -> Told {
        let round = self.lanes[lane].sender.round;
        let deltas = self
            .queue
            .as_ref()
            .map_or(Deltas::Off, |queue| queue.deltas);
        let before = self.bases.kept.remove(&place);
        if deltas == Deltas::Off || content == Content::ZERO {
            return Told::Whole(content);
        }
        if self.rng.percent(KEPT) {
            self.bases.kept.insert(place, (content, round));
        }
        match before {
            Some((base, sent)) if sent < round && self.rng.percent(AS_DELTAS) => {
                self.bases.told += 1;
                let is_bad = self.bases.spoilt && self.rng.once_in(GOES_BAD);
                let base = if is_bad { SPOILT } else { base };
                Told::Delta { base, content }
            }
            _ => Told::Whole(content),
        }
    }

    /// Puts pages where they belong; those whose deltas do not fit are left as they are, and returned.
    pub(super) fn place(
        &mut self,
        region: RegionIndex,
        told: &[(u64, Told)],
    ) -> Result<Vec<u64>, Violation> {
        let vm = &self.at(Side::Target).vm;
        if vm.has_run && vm.run_by == RunBy::Engine {
            return Err(Violation::PlacedAfterRun);
        }
        let mut mismatched = Vec::new();
        for &(page, told) in told {
            let content = match told {
                Told::Delta { base, .. }
                    if self.at(Side::Target).vm.ram.page(region, page) != base =>
                {
                    mismatched.push(page);
                    continue;
                }
                Told::Whole(content) | Told::Delta { content, .. } => content,
                Told::Shared => self.take_shared(region, page),
            };
            self.end(Side::Target).vm.ram.fill(region, page, content);
        }
        match mismatched.first() {
            Some(&page) if !self.bases.spoilt => Err(Violation::UnfitDelta { region, page }),
            _ => Ok(mismatched),
        }
    }

    /// What the target copies of the source's RAM. While the guest writes, that may be neither the old
    /// nor the new.
    fn take_shared(&mut self, region: RegionIndex, page: u64) -> Content {
        self.shared += 1;
        let vm = &self.at(Side::Source).vm;
        let (content, runs) = (vm.ram.page(region, page), vm.runs());
        let is_written = runs && self.tracker.is_written(region, page);
        if is_written && self.rng.once_in(2) {
            content.torn()
        } else {
            content
        }
    }

    /// The target's worker has found that deltas do not fit.
    pub(super) fn tell_mismatched(
        &mut self,
        lane: usize,
        round: Round,
        region: RegionIndex,
        pages: &[u64],
    ) {
        if self.flaw == Some(Flaw::MismatchUntold) {
            return;
        }
        let id = self.lanes[lane].id;
        for &page in pages {
            self.bases.mismatched += 1;
            let fact = Input::Mismatched {
                lane: id,
                round,
                region,
                page: PageNumber(page),
            };
            self.report(Side::Target, Thread::Lanes, fact);
        }
    }

    /// Nothing follows the last round in which a page could be sent again.
    pub(super) fn check_last_round(&self) -> Result<(), Violation> {
        match &self.queue {
            Some(queue) if queue.deltas != Deltas::Off => Err(Violation::DeltasInTheLastRound),
            _ => Ok(()),
        }
    }
}
