//! Scans that hand on part after part of guest RAM, while the lanes send what was handed on.

use ferry_engine::core::layout::{PageNumber, PageRange, RegionIndex};
use ferry_engine::core::message::HandedOn;
use ferry_engine::core::pageset::PageSet;
use ferry_engine::vmm::Rearm;

use super::event::Event;
use super::flaw::Flaw;
use super::guest::{Content, add};
use super::link::Feed;
use super::plan::Side;
use super::worker::{Job, Thread};
use super::world::World;

/// Most pages in a part.
const PART_PAGES: u64 = 16;

impl World {
    /// The tracker's thread turns to a scan: it gets through with some parts before its end.
    pub(super) fn begin_scan(&mut self) {
        let layout = self.inventory.layout.clone();
        self.parts.clear();
        for (index, region) in layout.iter() {
            let mut at = 0;
            while at < region.pages() {
                let count = self.rng.within(1..=PART_PAGES).min(region.pages() - at);
                self.parts.push_back((index, PageRange::new(at, count)));
                at += count;
            }
        }
        match self.scan_at_work() {
            Some(Job::StartTracking) => self.tracker.start(),
            Some(Job::Scan(_, with)) if self.flaw == Some(Flaw::ReadBeforeScanned) => {
                let with = with.clone();
                self.hand_on(&with);
            }
            _ => {}
        }
        self.schedule_part();
    }

    fn schedule_part(&mut self) {
        let span = self.rng.micros(1..=*self.plan.work_us.start());
        self.after(span, Event::ScansOn);
    }

    fn scan_at_work(&self) -> Option<&Job> {
        let worker = &self.at(Side::Source).workers[Thread::Tracker as usize];
        worker.queue.front().filter(|_| worker.busy)
    }

    /// The tracker gets through with a part, if it is at a scan.
    pub(super) fn scans_on(&mut self) {
        // An event of a scan that has ended finds no part, or helps the next one on.
        let Some(part) = self.parts.pop_front() else {
            return;
        };
        match self.scan_at_work() {
            Some(Job::StartTracking) => self.watch(part),
            Some(Job::Scan(rearm, with)) => {
                let (rearm, with) = (*rearm, of_part(with, part));
                self.scan(rearm, part, &with);
            }
            _ => return,
        }
        self.schedule_part();
    }

    /// What is left of a scan is done at its end.
    pub(super) fn end_scan(&mut self, job: &Job) -> HandedOn {
        while let Some(part) = self.parts.pop_front() {
            match job {
                Job::Scan(rearm, with) => self.scan(*rearm, part, &of_part(with, part)),
                _ => self.watch(part),
            }
        }
        if self.flaw == Some(Flaw::ReadBeforeWatched) {
            self.watch_what_was_read();
        }
        let feed = self.feed();
        feed.open = false;
        let pages = feed.pages;
        self.work_on();
        HandedOn {
            pages,
            ..HandedOn::default()
        }
    }

    /// Protect, then read.
    fn watch(&mut self, (region, range): (RegionIndex, PageRange)) {
        if self.flaw != Some(Flaw::ReadBeforeWatched) {
            self.tracker.watch(region, range);
        }
        let ram = &self.at(Side::Source).vm.ram;
        let mut populated = PageSet::empty(&self.inventory.layout);
        for page in range.first.0..range.end().0 {
            if ram.page(region, page) != Content::ZERO {
                add(&mut populated, region, page);
            }
        }
        self.hand_on(&populated);
    }

    /// What holds data at the source.
    pub(super) fn populated(&self) -> PageSet {
        let ram = &self.at(Side::Source).vm.ram;
        let mut populated = PageSet::empty(&self.inventory.layout);
        for (index, region) in self.inventory.layout.iter() {
            for page in 0..region.pages() {
                if ram.page(index, page) != Content::ZERO {
                    add(&mut populated, index, page);
                }
            }
        }
        populated
    }

    fn watch_what_was_read(&mut self) {
        let layout = self.inventory.layout.clone();
        for (index, region) in layout.iter() {
            self.tracker.watch(index, region.all());
        }
    }

    /// Protect, then read: what is dirty anyway as well.
    fn scan(&mut self, rearm: Rearm, part: (RegionIndex, PageRange), with: &PageSet) {
        let mut found = with.clone();
        self.tracker.scan(rearm, part, &mut found);
        if self.flaw == Some(Flaw::ReadBeforeScanned) {
            for (region, range) in with.ranges() {
                found.remove(region, range).expect("it is in it");
            }
        }
        self.hand_on(&found);
    }

    fn hand_on(&mut self, pages: &PageSet) {
        for (region, range) in pages.ranges() {
            self.feed().add(region, range);
        }
        self.work_on();
    }

    /// Where the scan hands on: to the open round, or to that which is ordered next.
    fn feed(&mut self) -> &mut Feed {
        let open = self.queue.as_mut().map(|queue| &mut queue.feed);
        match (&mut self.scanned, open) {
            (Some(scanned), _) => scanned,
            (None, Some(open)) => open,
            (None, None) => unreachable!("a feed is there from the order of a scan on"),
        }
    }
}

/// Those of `pages` that lie in a part.
fn of_part(pages: &PageSet, (region, range): (RegionIndex, PageRange)) -> PageSet {
    let mut part = pages.clone();
    part.clear();
    for page in range.first.0..range.end().0 {
        if pages.contains(region, PageNumber(page)) {
            add(&mut part, region, page);
        }
    }
    part
}
