//! What the target lacks: pages that its guest runs without.

use std::collections::HashMap;
use std::time::Duration;

use super::latency::{FaultFigures, Latencies};
use crate::core::layout::{PageNumber, PageRange, RegionIndex};
use crate::core::message::Moment;
use crate::core::pageset::{Cursor, OutsideRam, PageSet};
use crate::vmm::Fault;

/// Pages that a guest runs without, as its target sees them.
///
/// Each is missing, or being placed by the one who claimed it, or there. Nobody places a page without
/// having claimed it, and it is claimed once.
#[derive(Debug)]
pub struct Lacking {
    /// Neither being placed nor there.
    missing: PageSet,
    placing: PageSet,
    /// Who waits for what, since when.
    waiting: HashMap<(RegionIndex, PageNumber), Vec<(u32, Moment)>>,
    latencies: Latencies,
    stalls: HashMap<u32, Stalls>,
}

/// How the faults of a guest were served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FetchFigures {
    /// Of all of them.
    pub faults: FaultFigures,
    /// Of each thread of the VMM, by its number, those that waited longest first.
    pub stalls: Vec<(u32, Stalls)>,
    /// Pages that are not there yet.
    pub missing_pages: u64,
}

/// How one thread of the VMM fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalls {
    /// How often it waited for a page.
    pub count: u64,
    /// How long, all together.
    pub total: Duration,
}

/// What is to be done about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Ask the source for the page.
    Ask,
    /// It is asked for, or being placed: whoever waits is woken then.
    Wait,
    /// It is not missing. It has no memory, if it has none: it reads as zeros.
    There,
}

impl Lacking {
    /// All of `missing` is missing.
    pub fn new(missing: PageSet, nothing: PageSet) -> Self {
        Self {
            missing,
            placing: nothing,
            waiting: HashMap::new(),
            latencies: Latencies::default(),
            stalls: HashMap::new(),
        }
    }

    /// True when every page is there.
    pub fn is_whole(&self) -> bool {
        self.missing.is_empty() && self.placing.is_empty()
    }

    /// How many pages are not there.
    pub fn pages(&self) -> u64 {
        self.missing.len() + self.placing.len()
    }

    /// Somebody waits for a page.
    pub fn fault(&mut self, now: Moment, fault: Fault) -> Answer {
        let Fault {
            region,
            page,
            thread,
        } = fault;
        let is_missing = self.missing.contains(region, page);
        if !is_missing && !self.placing.contains(region, page) {
            return Answer::There;
        }
        let waiting = self.waiting.entry((region, page)).or_default();
        let was_asked_for = !waiting.is_empty();
        // The same access may be told again.
        if !waiting.iter().any(|(waits, _)| *waits == thread) {
            waiting.push((thread, now));
        }
        if is_missing && !was_asked_for {
            Answer::Ask
        } else {
            Answer::Wait
        }
    }

    /// What the guest waits for and is missing, for a lane that joins: whoever was asked before may be
    /// gone.
    pub fn wanted(&self) -> Vec<(RegionIndex, PageNumber)> {
        let mut wanted: Vec<_> = self
            .waiting
            .keys()
            .filter(|(region, page)| self.missing.contains(*region, *page))
            .copied()
            .collect();
        wanted.sort_unstable();
        wanted
    }

    /// The pages that are missing.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// Claims what of `range` is missing, to be placed by the caller and by nobody else.
    pub fn claim(
        &mut self,
        region: RegionIndex,
        range: PageRange,
    ) -> Result<Vec<PageRange>, OutsideRam> {
        let piece = self.missing.take(region, range)?;
        let mut claimed = Vec::new();
        let mut at = range.first;
        while let Some((_, run)) = piece.next_run(at, u64::MAX) {
            at = run.end();
            self.placing.insert(region, run)?;
            claimed.push(run);
        }
        Ok(claimed)
    }

    /// What was claimed is there, and whoever waited was woken.
    pub fn placed(&mut self, now: Moment, region: RegionIndex, range: PageRange) {
        self.unclaim(region, range);
        if self.waiting.is_empty() {
            return;
        }
        for page in range.first.0..range.end().0 {
            let waited = self.waiting.remove(&(region, PageNumber(page)));
            for (thread, since) in waited.into_iter().flatten() {
                let took = now.since(since);
                self.latencies.add(took);
                let stalls = self.stalls.entry(thread).or_default();
                stalls.count += 1;
                stalls.total += took;
            }
        }
    }

    /// What was claimed could not be placed: it is missing again.
    pub fn failed(&mut self, region: RegionIndex, range: PageRange) {
        self.unclaim(region, range);
        self.missing
            .insert(region, range)
            .expect("what was claimed is within the layout");
    }

    fn unclaim(&mut self, region: RegionIndex, range: PageRange) {
        self.placing
            .remove(region, range)
            .expect("what was claimed is within the layout");
    }

    /// How it went so far.
    pub fn figures(&self) -> FetchFigures {
        FetchFigures {
            faults: self.latencies.figures(),
            stalls: self.stalls(),
            missing_pages: self.pages(),
        }
    }

    fn stalls(&self) -> Vec<(u32, Stalls)> {
        let mut stalls: Vec<_> = self
            .stalls
            .iter()
            .map(|(&id, &stalls)| (id, stalls))
            .collect();
        stalls.sort_unstable_by_key(|(id, stalls)| (std::cmp::Reverse(stalls.total), *id));
        stalls
    }

    /// For how long the one that waits longest has waited.
    pub fn longest_wait(&self, now: Moment) -> Option<Duration> {
        let waits = self.waiting.values().flatten();
        waits.map(|(_, since)| now.since(*since)).max()
    }

    /// The first run of pages that are not there.
    pub fn first(&self) -> Option<(RegionIndex, PageRange)> {
        self.missing.next_run(&mut Cursor::default(), u64::MAX)
    }
}
