//! What the source owes: pages that the target has not said to be in place.

use std::collections::{BTreeMap, VecDeque};

use ferry_stream::message::LaneId;

use crate::core::layout::{PageNumber, PageRange, RegionIndex};
use crate::core::pageset::{Cursor, OutsideRam, PageSet};

/// Pages of a region, one after the other.
pub type PageRun = (RegionIndex, PageRange);

/// Pages that a guest runs without, as its source sees them.
///
/// Each is owed, or on its way on one lane, or in place. They are taken a frame at a time: those that
/// the guest waits for, then those that it wrote last, then all others in order, from where the last
/// fault was.
#[derive(Debug)]
pub struct Owed {
    /// Neither on their way nor in place.
    left: PageSet,
    /// Of those, the ones to send before the others.
    first: PageSet,
    /// Where the sweep goes on.
    sweep: Cursor,
    lanes: BTreeMap<LaneId, Flight>,
}

/// What is on its way on a lane.
#[derive(Debug, Default)]
struct Flight {
    /// The pages of each frame that is not in place, oldest first.
    frames: VecDeque<Vec<PageRun>>,
    /// Frames that are in place.
    placed: u64,
}

/// A target says that more is in place than was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{lane}: {told} frames in place, {sent} were sent")]
pub struct Overstated {
    /// The lane.
    pub lane: LaneId,
    /// What the target says.
    pub told: u64,
    /// What was sent.
    pub sent: u64,
}

impl Owed {
    /// All of `left` is owed; what of it is in `first` too goes before the rest.
    pub fn new(left: PageSet, first: &PageSet) -> Self {
        Self {
            first: left.intersection(first),
            left,
            sweep: Cursor::default(),
            lanes: BTreeMap::new(),
        }
    }

    /// How many pages are neither on their way nor in place.
    pub fn left(&self) -> u64 {
        self.left.len()
    }

    /// How many frames are on their way on `lane`.
    pub fn in_flight(&self, lane: LaneId) -> usize {
        self.lanes.get(&lane).map_or(0, |lane| lane.frames.len())
    }

    /// The guest waits for a page. It is taken for `lane`, alone in its frame, unless it is on its way
    /// already; the sweep goes on behind it either way.
    pub fn fault(
        &mut self,
        lane: LaneId,
        region: RegionIndex,
        page: PageNumber,
    ) -> Option<PageRun> {
        self.sweep = Cursor {
            region: region.0,
            page: page.0.saturating_add(1),
        };
        if !self.left.contains(region, page) {
            return None;
        }
        let run = (region, PageRange::new(page.0, 1));
        self.take(run);
        self.note(lane, vec![run]);
        Some(run)
    }

    /// Takes the next frame for `lane`: at most `most` pages, in at most `most_runs` runs. None when
    /// nothing is left.
    pub fn next(&mut self, lane: LaneId, most: u64, most_runs: usize) -> Option<Vec<PageRun>> {
        let mut runs = Vec::new();
        let mut pages = 0;
        while pages < most && runs.len() < most_runs {
            let Some(run) = self.next_run(most - pages) else {
                break;
            };
            pages += run.1.count;
            self.take(run);
            runs.push(run);
        }
        if runs.is_empty() {
            return None;
        }
        self.note(lane, runs.clone());
        Some(runs)
    }

    /// Takes what lies close behind a page that the guest waits for: the first run of owed pages, all of
    /// it within `most` pages of that one.
    pub fn behind(
        &mut self,
        lane: LaneId,
        region: RegionIndex,
        page: PageNumber,
        most: u64,
    ) -> Option<PageRun> {
        let mut behind = Cursor {
            region: region.0,
            page: page.0.saturating_add(1),
        };
        let (found, run) = self.left.next_run(&mut behind, most)?;
        let end = page.0.saturating_add(1).saturating_add(most);
        if found != region || run.first.0 >= end {
            return None;
        }
        let run = (
            region,
            PageRange::new(run.first.0, run.count.min(end - run.first.0)),
        );
        self.take(run);
        self.note(lane, vec![run]);
        Some(run)
    }

    fn next_run(&mut self, most: u64) -> Option<PageRun> {
        if !self.first.is_empty() {
            return self.first.next_run(&mut Cursor::default(), most);
        }
        if let Some(run) = self.left.next_run(&mut self.sweep, most) {
            return Some(run);
        }
        // From the start again, for what lies before the last fault.
        self.sweep = Cursor::default();
        self.left.next_run(&mut self.sweep, most)
    }

    fn take(&mut self, (region, range): PageRun) {
        for set in [&mut self.left, &mut self.first] {
            set.remove(region, range)
                .expect("a run of a set is within its layout");
        }
    }

    fn note(&mut self, lane: LaneId, runs: Vec<PageRun>) {
        self.lanes.entry(lane).or_default().frames.push_back(runs);
    }

    /// The target has `frames` frames of `lane` in place.
    pub fn placed(&mut self, lane: LaneId, frames: u64) -> Result<(), Overstated> {
        let flight = self.lanes.entry(lane).or_default();
        let sent = flight.placed + flight.frames.len() as u64;
        if frames > sent {
            return Err(Overstated {
                lane,
                told: frames,
                sent,
            });
        }
        while flight.placed < frames {
            flight.frames.pop_front();
            flight.placed += 1;
        }
        Ok(())
    }

    /// The lane is dead: what of it is not known to be in place is owed again, before the rest.
    pub fn lost(&mut self, lane: LaneId) {
        let flight = self.lanes.remove(&lane).unwrap_or_default();
        for (region, range) in flight.frames.into_iter().flatten() {
            for set in [&mut self.left, &mut self.first] {
                set.insert(region, range)
                    .expect("what was taken of a set is within its layout");
            }
        }
    }

    /// The target lacks these pages. What of them is on its way stays so; all others are owed.
    pub fn lacking(&mut self, region: RegionIndex, range: PageRange) -> Result<(), OutsideRam> {
        self.left.insert(region, range)?;
        let frames = self.lanes.values().flat_map(|lane| &lane.frames);
        let under_way = frames.flatten().filter(|run| run.0 == region);
        for (_, run) in under_way.copied().collect::<Vec<_>>() {
            let first = run.first.0.max(range.first.0);
            let end = run.end().0.min(range.end().0);
            if first < end {
                self.left
                    .remove(region, PageRange::new(first, end - first))?;
            }
        }
        Ok(())
    }
}
