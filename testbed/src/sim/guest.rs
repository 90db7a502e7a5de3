//! Two VMs, without a CPU: a page is a number that says which write it was, and executing is
//! counting. A page that holds the wrong number is a page that was lost.

use ferry_engine::core::layout::{Layout, PAGE_SIZE, PageNumber, PageRange, Region, RegionIndex};
use ferry_engine::core::pageset::PageSet;
use ferry_engine::vmm::Rearm;

use super::rng::Rng;

/// What a page holds: the number of the write that filled it; 0 is a page of zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Content(pub(super) u64);

impl Content {
    /// All zeros.
    pub(super) const ZERO: Self = Self(0);

    /// What a copy holds when the guest wrote while it was made: neither before nor after.
    pub(super) fn torn(self) -> Self {
        Self(self.0 | 1 << 63)
    }
}

/// Guest RAM: a few regions of contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory(Vec<Vec<Content>>);

impl Memory {
    /// RAM of this layout, all zeros.
    pub(super) fn new(layout: &Layout) -> Self {
        let pages =
            |region: &Region| usize::try_from(region.pages()).expect("simulated RAM is small");
        Self(
            layout
                .iter()
                .map(|(_, region)| vec![Content::ZERO; pages(region)])
                .collect(),
        )
    }

    /// What a page holds.
    pub(super) fn page(&self, region: RegionIndex, page: u64) -> Content {
        self.0[usize::from(region.0)][index(page)]
    }

    /// Fills a page.
    pub(super) fn fill(&mut self, region: RegionIndex, page: u64, content: Content) {
        self.0[usize::from(region.0)][index(page)] = content;
    }

    /// Fills every page.
    pub(super) fn fill_all(&mut self, mut content: impl FnMut() -> Content) {
        self.0
            .iter_mut()
            .flatten()
            .for_each(|page| *page = content());
    }

    /// Every page with what it holds.
    pub(super) fn pages(&self) -> impl Iterator<Item = (RegionIndex, u64, Content)> + '_ {
        (0u16..).zip(&self.0).flat_map(|(region, pages)| {
            (0u64..)
                .zip(pages)
                .map(move |(page, content)| (RegionIndex(region), page, *content))
        })
    }

    /// Pages in which the two differ.
    pub(super) fn differing(&self, other: &Self) -> Vec<(RegionIndex, u64)> {
        self.pages()
            .zip(other.pages())
            .filter(|((_, _, ours), (_, _, theirs))| ours != theirs)
            .map(|((region, page, _), _)| (region, page))
            .collect()
    }
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("simulated RAM is small")
}

/// A layout of a few small regions.
pub(super) fn layout(rng: &mut Rng) -> Layout {
    let regions = (0..rng.within(1..=3)).map(|number| Region {
        name: format!("ram{number}"),
        bytes: rng.within(1..=60) * PAGE_SIZE as u64,
        backing_page_bytes: 4096,
    });
    Layout::new(regions.collect()).expect("names are distinct and sizes are whole pages")
}

/// Which pages a guest writes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pattern {
    /// Any page, as likely as any other.
    Uniform,
    /// A few pages nearly always.
    Hot,
    /// One after the other.
    Sequential,
}

/// What keeps a VM's vCPUs from running, or lets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Power {
    /// They run.
    Running,
    /// They are paused.
    Paused,
    /// They never run again: shut down, panicked, or the VMM is gone.
    Off,
}

/// Who was the last to let the guest run. The engine answers only for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunBy {
    /// The engine, or it ran from the start.
    Engine,
    /// Somebody with a monitor.
    Stranger,
}

/// A VM of the world.
#[derive(Debug)]
pub(super) struct Vm {
    /// Its RAM.
    pub(super) ram: Memory,
    /// Its device state: instructions executed, and what saving did to it.
    pub(super) device: u64,
    /// Whether it runs.
    pub(super) power: Power,
    /// By how much of its time it is slowed, in percent.
    pub(super) slowed: u8,
    /// Who let it run.
    pub(super) run_by: RunBy,
    /// False once the VMM has ended.
    pub(super) alive: bool,
    /// Target: whether it ever executed an instruction.
    pub(super) has_run: bool,
    regions: Vec<u64>,
    pattern: Pattern,
    position: u64,
}

impl Vm {
    /// A paused VM with RAM of this layout.
    pub(super) fn new(layout: &Layout, pattern: Pattern) -> Self {
        Self {
            ram: Memory::new(layout),
            device: 0,
            power: Power::Paused,
            slowed: 0,
            run_by: RunBy::Engine,
            alive: true,
            has_run: false,
            regions: layout.iter().map(|(_, region)| region.pages()).collect(),
            pattern,
            position: 0,
        }
    }

    /// True while vCPUs run.
    pub(super) fn runs(&self) -> bool {
        self.power == Power::Running
    }

    /// Lets the guest run, if there is one to run.
    pub(super) fn run(&mut self, by: RunBy) {
        if self.power == Power::Paused {
            self.power = Power::Running;
            self.run_by = by;
        }
        self.has_run |= self.runs();
    }

    /// Pauses it.
    pub(super) fn pause(&mut self) {
        if self.power == Power::Running {
            self.power = Power::Paused;
        }
    }

    /// It never runs again.
    pub(super) fn die(&mut self) {
        self.power = Power::Off;
        self.alive = false;
    }

    /// Executes: counts, and writes a page as the pattern has it.
    pub(super) fn execute(&mut self, rng: &mut Rng, write: Content) -> (RegionIndex, u64) {
        self.device += 1;
        self.write(rng, write)
    }

    /// Writes a page without executing: device emulation, or I/O that lands.
    pub(super) fn write(&mut self, rng: &mut Rng, write: Content) -> (RegionIndex, u64) {
        let all: u64 = self.regions.iter().sum();
        self.position = match self.pattern {
            Pattern::Hot if rng.percent(90) => rng.below(all.div_ceil(20)),
            Pattern::Uniform | Pattern::Hot => rng.below(all),
            Pattern::Sequential => (self.position + 1) % all,
        };
        let (region, page) = self.locate(self.position);
        // A guest that clears a page makes the hardest one: the target may hold its past.
        let content = if rng.once_in(8) { Content::ZERO } else { write };
        self.ram.fill(region, page, content);
        (region, page)
    }

    fn locate(&self, mut position: u64) -> (RegionIndex, u64) {
        for (region, pages) in (0u16..).zip(&self.regions) {
            if position < *pages {
                return (RegionIndex(region), position);
            }
            position -= pages;
        }
        unreachable!("a position is below the number of pages")
    }
}

/// Dirty tracking with the contract of [`ferry_engine::vmm::Tracker`].
#[derive(Debug)]
pub(super) struct Tracker {
    watching: bool,
    /// Writes to these are noted.
    watched: PageSet,
    written: PageSet,
    /// What a collection that is under way has seen already.
    seen: Option<PageSet>,
}

impl Tracker {
    /// A tracker that is off.
    pub(super) fn new(layout: &Layout) -> Self {
        Self {
            watching: false,
            watched: PageSet::empty(layout),
            written: PageSet::empty(layout),
            seen: None,
        }
    }

    /// Whether it is on.
    pub(super) fn watches(&self) -> bool {
        self.watching
    }

    /// Tracking begins.
    pub(super) fn start(&mut self) {
        self.watching = true;
    }

    /// Writes to these pages are reported from now on.
    pub(super) fn watch(&mut self, region: RegionIndex, range: PageRange) {
        self.watched
            .insert(region, range)
            .expect("the range is in the world's RAM");
    }

    /// Tracking ends.
    pub(super) fn stop(&mut self) {
        self.watching = false;
    }

    /// A page was written.
    pub(super) fn wrote(&mut self, region: RegionIndex, page: u64) {
        if self.watching && self.watched.contains(region, PageNumber(page)) {
            add(&mut self.written, region, page);
        }
    }

    /// Whether the next collection will report the page.
    pub(super) fn is_written(&self, region: RegionIndex, page: u64) -> bool {
        self.watching && self.written.contains(region, PageNumber(page))
    }

    /// Forgets that a page was written.
    pub(super) fn forget(&mut self, region: RegionIndex, page: u64) {
        self.written
            .remove(region, PageRange::new(page, 1))
            .expect("the page is in the world's RAM");
    }

    /// A collection begins: some regions are scanned at once, the others when it ends. A write in
    /// between is found by this one or by the next, as the contract has it.
    pub(super) fn begin_collection(&mut self, rng: &mut Rng, mut into: PageSet) {
        let early: Vec<_> = self
            .written
            .ranges()
            .filter(|(region, _)| (u64::from(region.0) + rng.below(3)).is_multiple_of(2))
            .collect();
        for (region, range) in early {
            into.insert(region, range)
                .expect("both sets are over one layout");
            self.written.remove(region, range).expect("it was in it");
        }
        self.seen = Some(into);
    }

    /// The collection ends.
    pub(super) fn end_collection(&mut self) -> Option<PageSet> {
        let mut found = self.seen.take()?;
        found.union(&self.written);
        self.written.clear();
        Some(found)
    }

    /// A scan gets through with a part of guest RAM: adds to `into` what was written in it.
    pub(super) fn scan(
        &mut self,
        rearm: Rearm,
        (region, range): (RegionIndex, PageRange),
        into: &mut PageSet,
    ) {
        for page in range.first.0..range.end().0 {
            if self.written.contains(region, PageNumber(page)) {
                add(into, region, page);
                if rearm == Rearm::Yes {
                    self.forget(region, page);
                }
            }
        }
    }
}

/// Adds one page to a set.
pub(super) fn add(set: &mut PageSet, region: RegionIndex, page: u64) {
    set.insert(region, PageRange::new(page, 1))
        .expect("the world writes within its RAM");
}
