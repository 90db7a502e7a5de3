//! What the tracker's thread is ordered: to watch guest RAM, and to find what was written in it.
//!
//! Where lanes wait for what is found, it is handed on part after part. The law is the same for each:
//! protect, then read, then send.

use std::sync::{Arc, OnceLock};

use crate::core::layout::{PageRange, RegionIndex};
use crate::core::message::{Input, Step};
use crate::core::pageset::PageSet;
use crate::lanes::feed::Feed;
use crate::vmm::{Begun, Found, Fresh, Ram, Rearm, VmmError};

use super::{Driver, TrackSide};

impl Driver {
    pub(super) fn start_tracking(&mut self, into: PageSet) {
        self.scanned = Arc::new(Feed::open(self.chunk_pages()));
        let (feed, fresh) = (Arc::clone(&self.scanned), Arc::clone(&self.outfit.fresh));
        let facts = self.facts.clone();
        self.tracker.order(Step::StartTracking, move |side| {
            let populated = start(side, &feed, &fresh, into)?;
            facts.tell(Input::Populated(populated));
            Ok::<_, VmmError>(Input::Tracking(feed.close()))
        });
    }

    pub(super) fn collect(&self, into: PageSet) {
        self.tracker
            .order(Step::Collect, move |side| collect(side, Rearm::Yes, into));
    }

    /// Collects with the guest standing for good.
    pub(super) fn collect_last(&self, into: PageSet) {
        self.tracker
            .order(Step::Collect, move |side| collect(side, Rearm::No, into));
    }

    /// Finds what guest RAM holds, without tracking.
    pub(super) fn survey(&self, known: PageSet, into: PageSet) {
        self.tracker
            .order(Step::Collect, move |side| survey(&*side.ram, &known, into));
    }

    pub(super) fn scan(&mut self, rearm: Rearm, with: PageSet) {
        self.scanned = Arc::new(Feed::open(self.chunk_pages()));
        let feed = Arc::clone(&self.scanned);
        self.tracker
            .order(Step::Collect, move |side| scan(side, rearm, &feed, with));
    }
}

/// Tells what holds something. An error leaves the feed open: nobody takes the round for complete, and
/// the lanes that wait are cut with all others.
fn start(
    side: &mut TrackSide,
    feed: &Feed,
    fresh: &OnceLock<Arc<dyn Fresh>>,
    into: PageSet,
) -> Result<PageSet, VmmError> {
    let mut populated = Populated {
        ram: &*side.ram,
        unwatched: PageSet::full(side.ram.layout()),
        all: into.clone(),
        known: into,
        feed,
    };
    let mut trouble = Ok(());
    side.tracker.start(&mut |begun| {
        if trouble.is_ok() {
            trouble = match begun {
                Begun::Watched(region, range) => populated.watched(region, range),
                Begun::Empty(region, range) => populated.empty(region, range),
            };
        }
    })?;
    trouble?;
    let populated = populated.all_watched()?;
    // Tracking begins once: nobody has set it before.
    drop(fresh.set(side.tracker.fresh()?));
    Ok(populated)
}

/// Looks for what guest RAM holds, once it is watched.
struct Populated<'a> {
    ram: &'a dyn Ram,
    /// What was not told to be watched, or to be empty.
    unwatched: PageSet,
    /// What is known to hold something and was not handed on. That goes beyond what is watched: to
    /// find where data ends may mean to look at all of it.
    known: PageSet,
    /// What was ever known to hold something, and is sent in the first round.
    all: PageSet,
    feed: &'a Feed,
}

impl Populated<'_> {
    /// Writes to `range` are reported from now on. What of it was told before is on its way.
    fn watched(&mut self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        let failed = |outside| VmmError::failed("a tracker watches", outside);
        let fresh = self.unwatched.take(region, range).map_err(failed)?;
        let mut at = range.first;
        while let Some((_, run)) = fresh.next_run(at, u64::MAX) {
            at = run.end();
            self.hand_on(region, run)?;
        }
        Ok(())
    }

    /// `range` is left to the first collection, which reports what appears there.
    fn empty(&mut self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        let failed = |outside| VmmError::failed("a tracker found empty", outside);
        for set in [&mut self.unwatched, &mut self.known, &mut self.all] {
            set.remove(region, range).map_err(failed)?;
        }
        Ok(())
    }

    fn hand_on(&mut self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        let failed = |outside| VmmError::failed("guest RAM reported", outside);
        let unknown = self.known.from_first_stranger(region, range);
        if !unknown.is_empty() {
            let mut outside = None;
            self.ram.populated(region, unknown, &mut |run| {
                let noted = self.known.insert(region, run);
                let noted = noted.and_then(|_| self.all.insert(region, run));
                outside = noted.err().or(outside);
            })?;
            outside.map_or(Ok(()), |outside| Err(failed(outside)))?;
        }
        self.feed
            .hand_on(self.known.take(region, range).map_err(failed)?);
        Ok(())
    }

    /// All guest RAM is watched that is not empty, told or not.
    fn all_watched(mut self) -> Result<PageSet, VmmError> {
        let left: Vec<_> = self.unwatched.ranges().collect();
        left.into_iter()
            .try_for_each(|(region, range)| self.hand_on(region, range))?;
        Ok(self.all)
    }
}

fn survey(ram: &dyn Ram, known: &PageSet, mut into: PageSet) -> Result<Input, VmmError> {
    let mut outside = None;
    for (region, all) in ram.layout().iter().map(|(at, region)| (at, region.all())) {
        for gap in known.missing(region, all) {
            // More of the region may be told, and is known.
            ram.populated(region, gap, &mut |run| {
                let first = run.first.0.max(gap.first.0);
                let end = run.end().0.min(gap.end().0);
                if first < end {
                    let within = PageRange::new(first, end - first);
                    outside = into.insert(region, within).err().or(outside);
                }
            })?;
        }
    }
    match outside {
        Some(outside) => Err(VmmError::failed("guest RAM reported", outside)),
        None => Ok(Input::Collected { found: into }),
    }
}

fn collect(side: &mut TrackSide, rearm: Rearm, mut into: PageSet) -> Result<Input, VmmError> {
    let mut outside = None;
    side.tracker.collect(rearm, &mut |found| {
        if let Some((region, range)) = found.written() {
            outside = into.insert(region, range).err().or(outside);
        }
    })?;
    match outside {
        Some(outside) => Err(VmmError::failed("a tracker reported", outside)),
        None => Ok(Input::Collected { found: into }),
    }
}

/// As [`start`], an error leaves the feed open.
fn scan(
    side: &mut TrackSide,
    rearm: Rearm,
    feed: &Feed,
    mut pages: PageSet,
) -> Result<Input, VmmError> {
    let mut outside = None;
    side.tracker.collect(rearm, &mut |found| {
        let taken = match found {
            Found::Written(region, range) => pages.insert(region, range).map(drop),
            Found::Through(region, range) => {
                let piece = pages.take(region, range);
                piece.map(|piece| feed.hand_on(piece))
            }
        };
        outside = taken.err().or(outside);
    })?;
    if let Some(outside) = outside {
        return Err(VmmError::failed("a tracker reported", outside));
    }
    // Where the tracker did not say that it was through.
    feed.hand_on_set(pages);
    Ok(Input::Scanned(feed.close()))
}
