//! Room for the guest's pages, made ahead of the lanes that receive them.
//!
//! To allocate a page costs more than to receive it, and lanes that write into holes do it one after the
//! other, because a file is locked as long as it is written. So threads that nobody waits for allocate
//! what the source has named, through the mapping, and a lane that comes to such pages receives them
//! straight into place. They run behind every other thread of the machine (`SCHED_IDLE`): on processors
//! that are all busy they cost nothing, and gain nothing.
//!
//! Measured on two cores, a GiB of tmpfs over two lanes, processor seconds of the lanes and of the thread
//! that allocates, and the time of it all (loopback: medians of three in turn, other work on the machine):
//!
//! | | loopback | | | 115 MiB/s | | |
//! |---|---|---|---|---|---|---|
//! | | lanes | ahead | total, s | lanes | ahead | total, s |
//! | nothing ahead | 1.48 | | 2.3 | 1.39 | | 8.9 |
//! | `MADV_POPULATE_WRITE`, giving way | 1.42 | 0.04 | 2.0 | 0.60 | 1.63 | 8.9 |
//! | `fallocate`, as any other thread | 1.24 | 0.55 | 2.5 | 0.84 | 0.53 | 8.9 |
//! | `fallocate`, giving way | 1.40 | 0.15 | 2.5 | | | |
//! | `fallocate` and then mapped, giving way | 1.35 | 0.04 | 1.9 | 0.56 | 1.52 | 8.9 |
//!
//! `fallocate` takes the least of all processors together, but holds the lock that the lanes want: they
//! place no more in a second than without it, and a thread that gives way in the middle of it holds them
//! up (up to 3.0 s in the whole).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use nix::unistd::{Pid, gettid};

use super::PanicWatch;
use crate::core::layout::{PageRange, RegionIndex};
use crate::core::pageset::{Cursor, PageSet};
use crate::linux::priority::{come_back, give_way};
use crate::vmm::Ram;
use crate::worker::Facts;

/// Most threads. Beyond a few they wait for each other in the kernel's page allocator.
const MAX_THREADS: usize = 4;

/// Pages that are allocated at a time, in a tenth of a millisecond: whoever ends this waits so long.
const PIECE_PAGES: u64 = 16;

/// How far in front of the lanes the threads begin: what is nearer is on its way already.
const LEAD_PAGES: u64 = 512;

/// The bits of a [`Front`] that tell a page.
const PAGE_BITS: u32 = 48;

/// How far the lanes have come, in the order of regions and pages in which they are sent.
#[derive(Debug, Default)]
pub(crate) struct Front(AtomicU64);

impl Front {
    /// Pages have come up to the end of `range`.
    pub(crate) fn pass(&self, region: RegionIndex, range: PageRange) {
        let page = range.end().0.min((1 << PAGE_BITS) - 1);
        let place = u64::from(region.0) << PAGE_BITS | page;
        self.0.fetch_max(place, Ordering::Relaxed);
    }

    /// Where it is of use to allocate.
    fn ahead(&self) -> Cursor {
        let place = self.0.load(Ordering::Relaxed);
        if place == 0 {
            return Cursor::default();
        }
        Cursor {
            region: u16::try_from(place >> PAGE_BITS).unwrap_or(u16::MAX),
            page: (place & ((1 << PAGE_BITS) - 1)) + LEAD_PAGES,
        }
    }
}

/// The threads, and what is left for them.
pub(crate) struct Ahead {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

struct Shared {
    ram: Arc<dyn Ram>,
    facts: Facts,
    front: Arc<Front>,
    work: Mutex<Work>,
    changed: Condvar,
}

struct Work {
    left: PageSet,
    /// Threads that allocate at this moment.
    busy: Vec<Pid>,
    closed: bool,
}

impl Ahead {
    /// No threads yet: most migrations need none.
    pub(crate) fn new(ram: &Arc<dyn Ram>, facts: &Facts) -> Self {
        let work = Work {
            left: PageSet::empty(ram.layout()),
            busy: Vec::new(),
            closed: false,
        };
        let shared = Shared {
            ram: Arc::clone(ram),
            facts: facts.clone(),
            front: Arc::default(),
            work: Mutex::new(work),
            changed: Condvar::new(),
        };
        Self {
            shared: Arc::new(shared),
            threads: Vec::new(),
        }
    }

    /// What the lanes tell of their way.
    pub(crate) fn front(&self) -> &Arc<Front> {
        &self.shared.front
    }

    /// Makes room for these pages when nobody else wants the processors.
    pub(crate) fn allocate(&mut self, room: &[(RegionIndex, PageRange)]) {
        let mut work = self.shared.lock();
        if work.closed {
            return;
        }
        for &(region, range) in room {
            let inserted = work.left.insert(region, range);
            inserted.expect("the machine names pages of guest RAM");
        }
        drop(work);
        self.shared.changed.notify_all();
        if self.threads.is_empty()
            && let Err(error) = self.start()
        {
            tracing::debug!(%error, "no thread makes room ahead");
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for number in 1..=cores.min(MAX_THREADS) {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new()
                .name(format!("ferry-ahead-{number}"))
                .spawn(move || shared.run())?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Allocates nothing more. Whoever is in the middle of a piece finishes it.
    pub(crate) fn close(&self) {
        drop(self.shared.close());
    }

    /// What closes, and waits until no thread touches guest RAM, nor ever will. Not for their end, but
    /// whoever is in the middle of a piece gives way no more: the guest may be waiting by now.
    pub(crate) fn quiet(&self) -> impl FnOnce() + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move || {
            let mut work = shared.close();
            for &thread in &work.busy {
                if let Err(error) = come_back(thread) {
                    tracing::debug!(%error, "a thread is waited for that gives way");
                }
            }
            while !work.busy.is_empty() {
                let woken = shared.changed.wait(work);
                work = woken.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Closes, and waits for the threads.
    pub(crate) fn join(self) {
        self.close();
        for thread in self.threads {
            drop(thread.join());
        }
    }
}

/// A piece that is being allocated: one that panics in it must not be waited for.
struct Busy<'a>(&'a Shared);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let thread = gettid();
        self.0.lock().busy.retain(|&busy| busy != thread);
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) -> MutexGuard<'_, Work> {
        let mut work = self.lock();
        work.closed = true;
        self.changed.notify_all();
        work
    }

    fn run(&self) {
        let _watch = PanicWatch(self.facts.clone());
        // Better none than one that takes the lanes' time.
        if let Err(error) = give_way() {
            tracing::debug!(%error, "no room is made ahead");
            return;
        }
        while let Some((region, piece, _busy)) = self.next() {
            if let Err(error) = self.ram.allocate(region, piece) {
                // A hint may cover pages that turn out to be zeros. Where room is really lacking the
                // lanes will say so.
                tracing::debug!(%error, "no more room is made ahead");
                self.lock().closed = true;
            }
        }
    }

    /// Waits for a piece to allocate; none at the end.
    fn next(&self) -> Option<(RegionIndex, PageRange, Busy<'_>)> {
        let mut work = self.lock();
        while !work.closed {
            let mut cursor = self.front.ahead();
            if let Some((region, piece)) = work.left.next_run(&mut cursor, PIECE_PAGES) {
                let removed = work.left.remove(region, piece);
                removed.expect("it was in the set");
                work.busy.push(gettid());
                return Some((region, piece, Busy(self)));
            }
            // The lanes have come by what is left.
            work.left.clear();
            let woken = self.changed.wait(work);
            work = woken.unwrap_or_else(PoisonError::into_inner);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_is_where_the_lanes_are() {
        let front = Front::default();
        assert_eq!(front.ahead(), Cursor::default());
        front.pass(RegionIndex(1), PageRange::new(100, 28));
        front.pass(RegionIndex(0), PageRange::new(4000, 128));
        let (region, page) = (1, 128 + LEAD_PAGES);
        assert_eq!(front.ahead(), Cursor { region, page });
        front.pass(RegionIndex(1), PageRange::new(u64::MAX, u64::MAX));
        assert_eq!(front.ahead().region, 1);
    }
}
