//! Exact dirty tracking of another process's memory, as [`Tracker`].
//!
//! A userfaultfd is made inside the process, taken out of it, and registered on guest RAM with
//! asynchronous write-protection: the kernel lifts the protection of a page at its first write and
//! goes on, and what is unprotected is what was written. From then on the process is only looked at.
//! The one descriptor is ours: the process's own is closed as soon as it was taken out. When ours is
//! closed the kernel ends the tracking, so not even our death leaves the guest with more than a few
//! microseconds of page faults.
//!
//! Not seen are writes that do not go through this process's page tables: those of other processes
//! that share the memory, and of devices into pages that were pinned before they were protected. The
//! VMM's adapter must refuse or drain these.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use super::holes::{BLOCK_BYTES, Holes};
use super::maps::Mapping;
use super::pagemap::Pagemap;
use super::remote_uffd::{self, RemoteUffd};
use super::uffd::{Features, Mode, RangeIoctls, Uffd};
use super::{Access, Error, Process, RamFile, inject, maps};
use crate::core::layout::{PAGE_SIZE, PageRange, RegionIndex};
use crate::vmm::{Begun, Found, Fresh, Rearm, Tracker, VmmError};

/// What is looked at, or protected, before it is told that nothing more comes of it: at most about a
/// millisecond's work.
const PIECE_BYTES: u64 = 64 << 20;

/// Most threads that look at once.
const MAX_LOOKERS: usize = 16;

/// Guest RAM within the process: page 0 of `region` is at the first address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackedRange {
    /// Which region.
    pub region: RegionIndex,
    /// Its addresses in the process, whole pages of the memory's backing.
    pub addresses: Range<u64>,
}

impl TrackedRange {
    fn pages(&self, of: &Range<u64>) -> PageRange {
        let base = self.addresses.start;
        PageRange::covering(of.start - base..of.end - base)
    }
}

/// Tracks writes of one process. Dropping it stops it.
#[derive(Debug)]
pub struct RamTracker {
    process: Arc<Process>,
    ranges: Vec<TrackedRange>,
    watch: Option<Watch>,
}

impl RamTracker {
    /// A tracker for these ranges of the process. Does not touch it before it is started.
    pub fn new(process: Arc<Process>, ranges: Vec<TrackedRange>) -> Self {
        Self {
            process,
            ranges,
            watch: None,
        }
    }

    fn begin(&self, begun: &mut dyn FnMut(Begun)) -> Result<Watch, Error> {
        close_leftovers(&self.process)?;
        // Dropped on every error below, which undoes all that came before.
        let watch = Watch::new(Arc::clone(&self.process), &self.ranges)?;
        watch.uffd.api(Features::TRACK_WRITES)?;
        for TrackedRange { addresses, .. } in &self.ranges {
            let allowed = watch.uffd.register(addresses, Mode::WP)?;
            if !allowed.contains(RangeIoctls::WRITE_PROTECT) {
                return Err(Error::Unwatched {
                    start: addresses.start,
                    end: addresses.end,
                });
            }
        }
        watch.protect_all(begun)?;
        Ok(watch)
    }
}

impl RamTracker {
    fn watch(&self) -> Result<&Watch, VmmError> {
        self.watch.as_ref().ok_or_else(|| VmmError::Unfit {
            what: "dirty tracking has not been started".into(),
        })
    }
}

impl Tracker for RamTracker {
    fn start(&mut self, begun: &mut dyn FnMut(Begun)) -> Result<(), VmmError> {
        if self.watch.is_none() {
            self.watch = Some(self.begin(begun)?);
        }
        Ok(())
    }

    fn collect(&mut self, rearm: Rearm, found: &mut dyn FnMut(Found)) -> Result<(), VmmError> {
        self.watch()?.scan(rearm, found)?;
        Ok(())
    }

    fn fresh(&self) -> Result<Arc<dyn Fresh>, VmmError> {
        let watch = self.watch()?;
        Ok(Arc::new(Look {
            pagemap: Arc::clone(&watch.pagemap),
            ranges: Arc::clone(&watch.ranges),
        }))
    }

    fn stop(&mut self) -> Result<(), VmmError> {
        // Closing the descriptor ends it all.
        drop(self.watch.take());
        Ok(())
    }
}

impl Drop for RamTracker {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(pid = %self.process.pid(), %error, "dirty tracking was not ended cleanly");
        }
    }
}

/// A userfaultfd on the process's memory, and its page map.
#[derive(Debug)]
struct Watch {
    process: Arc<Process>,
    uffd: Uffd,
    pagemap: Arc<Pagemap>,
    ranges: Arc<[Watched]>,
}

/// A range that is watched.
#[derive(Debug)]
struct Watched {
    range: TrackedRange,
    /// A page of its backing, which cannot be protected in part.
    unit_bytes: u64,
    /// What of it is not protected, since it holds nothing; none where no file tells.
    holes: Option<Holes>,
}

/// A part of a range, whole pages of its backing and whole blocks of its holes.
#[derive(Clone, Debug)]
struct Piece<'a> {
    of: &'a Watched,
    addresses: Range<u64>,
}

impl Watched {
    fn new(process: &Process, mappings: &[Mapping], range: &TrackedRange) -> Result<Self, Error> {
        let Range { start, end } = range.addresses;
        let mut watched = Self {
            range: range.clone(),
            unit_bytes: PAGE_SIZE as u64,
            holes: None,
        };
        let around = |mapping: &&Mapping| mapping.start <= start && end <= mapping.end;
        let Some(mapping) = mappings.iter().find(around) else {
            return Ok(watched);
        };
        let file = match RamFile::open(process, mapping, Access::Read) {
            Ok(file) => file,
            // Without a file it is no hugetlbfs either, whose pages always have one.
            Err(Error::NoSuchFile { .. }) => return Ok(watched),
            Err(error) => return Err(error),
        };
        watched.unit_bytes = file.backing_page_bytes().into();
        // What a private mapping was written is not in the file.
        if file.is_tmpfs() && mapping.permissions.shared {
            let file_start = mapping.offset + (start - mapping.start);
            let holes = Holes::find(file, range.addresses.clone(), file_start);
            let failed = |error| Error::call("looking for holes in guest RAM", error);
            watched.holes = Some(holes.map_err(failed)?);
        }
        Ok(watched)
    }

    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let Range { start, end } = self.range.addresses;
        let bytes = PIECE_BYTES.next_multiple_of(self.unit_bytes);
        let starts = (0..(end - start).div_ceil(bytes)).map(move |n| start + n * bytes);
        starts.map(move |at| Piece {
            of: self,
            addresses: at..(at + bytes).min(end),
        })
    }

    /// Parts of `addresses`, and the holes of those that are empty as far as is known.
    fn parts(&self, addresses: &Range<u64>) -> impl Iterator<Item = (Range<u64>, Option<&Holes>)> {
        let known = self.holes.iter().flat_map(|holes| {
            let parts = holes.parts(addresses);
            parts.map(move |part| (part.addresses, part.empty.then_some(holes)))
        });
        let unknown = self.holes.is_none().then(|| (addresses.clone(), None));
        known.chain(unknown)
    }

    /// Tells `found` what of `addresses` was written.
    fn find(
        &self,
        pagemap: &Pagemap,
        addresses: &Range<u64>,
        rearm: Rearm,
        found: &mut dyn FnMut(Range<u64>),
    ) -> Result<(), Error> {
        for (part, holes) in self.parts(addresses) {
            match holes {
                None => pagemap.scan(&part, rearm, found)?,
                Some(holes) => self.find_appeared(pagemap, holes, &part, rearm, found)?,
            }
        }
        Ok(())
    }

    /// What has data now and had none was written, and nothing else can have been.
    fn find_appeared(
        &self,
        pagemap: &Pagemap,
        holes: &Holes,
        part: &Range<u64>,
        rearm: Rearm,
        found: &mut dyn FnMut(Range<u64>),
    ) -> Result<(), Error> {
        let failed = |error| Error::call("looking for data in guest RAM", error);
        for block in holes.appeared(part).map_err(failed)? {
            if rearm == Rearm::Yes {
                // In this order. A write before the block was protected has data by now, one after it
                // shows in the next scan; and whoever hears of a page finds it protected.
                self.protect(pagemap, &block)?;
                holes.fill(&block);
            }
            holes.data(&block, found).map_err(failed)?;
        }
        Ok(())
    }

    /// Has every later write to `addresses` shown.
    fn protect(&self, pagemap: &Pagemap, addresses: &Range<u64>) -> Result<(), Error> {
        if self.unit_bytes == PAGE_SIZE as u64 {
            split_huge_pages(pagemap, addresses)?;
        }
        // What is not protected counts as written: this finds it all and protects it.
        pagemap.scan(addresses, Rearm::Yes, &mut |_| {})
    }
}

impl Piece<'_> {
    fn written(&self, addresses: &Range<u64>) -> Found {
        let range = &self.of.range;
        Found::Written(range.region, range.pages(addresses))
    }

    fn through(&self) -> Found {
        let range = &self.of.range;
        Found::Through(range.region, range.pages(&self.addresses))
    }
}

/// The page map alone: the userfaultfd, whose life is that of the tracking, is not in it.
struct Look {
    pagemap: Arc<Pagemap>,
    ranges: Arc<[Watched]>,
}

impl Fresh for Look {
    fn written(
        &self,
        region: RegionIndex,
        range: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), VmmError> {
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        let of_region = |watched: &&Watched| watched.range.region == region;
        for watched in self.ranges.iter().filter(of_region) {
            let tracked = &watched.range;
            let Range { start, end } = tracked.addresses;
            let from = start + bytes(range.first.0);
            let addresses = from..(from + bytes(range.count)).min(end);
            watched.find(&self.pagemap, &addresses, Rearm::No, &mut |written| {
                found(tracked.pages(&written));
            })?;
        }
        Ok(())
    }
}

impl Watch {
    fn new(process: Arc<Process>, ranges: &[TrackedRange]) -> Result<Self, Error> {
        let pagemap = Arc::new(Pagemap::open(&process)?);
        let mut remote = RemoteUffd::new(Arc::clone(&process))?;
        let uffd = Uffd::from_fd(process.take_fd(remote.fd())?);
        // Its calls act on the memory that it was made in, whoever makes them: ours is enough.
        remote.close()?;
        let mappings = maps::runs(maps::of_process(&process)?);
        let watched = ranges
            .iter()
            .map(|range| Watched::new(&process, &mappings, range));
        Ok(Self {
            ranges: watched.collect::<Result<_, Error>>()?,
            process,
            uffd,
            pagemap,
        })
    }

    /// Has every later write reported, and tells so part by part.
    ///
    /// A part that is empty is not to be read before it is collected, when it is protected. Else what is
    /// written there, read, and given back by the guest would be empty again when it is looked at, and
    /// never reported.
    fn protect_all(&self, begun: &mut dyn FnMut(Begun)) -> Result<(), Error> {
        let protected = self.pieces().try_for_each(|Piece { of, addresses }| {
            let region = of.range.region;
            for (part, holes) in of.parts(&addresses) {
                let pages = of.range.pages(&part);
                if holes.is_some() {
                    begun(Begun::Empty(region, pages));
                } else {
                    of.protect(&self.pagemap, &part)?;
                    begun(Begun::Watched(region, pages));
                }
            }
            Ok(())
        });
        self.process.check_alive()?;
        protected
    }

    fn scan(&self, rearm: Rearm, found: &mut dyn FnMut(Found)) -> Result<(), Error> {
        let scanned = match rearm {
            Rearm::Yes => self
                .pieces()
                .try_for_each(|piece| self.collect(&piece, found)),
            Rearm::No => self.look(found),
        };
        // The memory of a process that has ended is empty. Some kernels call that an error, others
        // find nothing written in it.
        self.process.check_alive()?;
        scanned
    }

    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        self.ranges.iter().flat_map(Watched::pieces)
    }

    /// One pass, which finds and protects at once, on one core. Measured on 2 busy cores, 2 GiB, best
    /// of 9: 10,000 written pages here and there take 2.8 ms so, and every fourth page 20 ms; on two
    /// cores 9.4 ms and 21 ms. To look on two cores first and then protect only what was found takes
    /// 123 ms and, with what lies between runs of less than 2 MiB protected along with them, 12 ms.
    fn collect(&self, piece: &Piece<'_>, found: &mut dyn FnMut(Found)) -> Result<(), Error> {
        let Piece { of, addresses } = piece;
        of.find(&self.pagemap, addresses, Rearm::Yes, &mut |written| {
            found(piece.written(&written));
        })?;
        found(piece.through());
        Ok(())
    }

    /// Scans without protecting, in the blackout: on every core, since it scales. Protecting does not.
    fn look(&self, found: &mut dyn FnMut(Found)) -> Result<(), Error> {
        let pieces: Vec<_> = self.pieces().collect();
        let look_at = |piece: &Piece<'_>| {
            let mut written = Vec::new();
            let Piece { of, addresses } = piece;
            let mut note = |run| written.push(run);
            let scanned = of.find(&self.pagemap, addresses, Rearm::No, &mut note);
            scanned.map(|()| written)
        };
        in_parallel(&pieces, look_at, |piece, written| {
            written?.iter().for_each(|run| found(piece.written(run)));
            found(piece.through());
            Ok(())
        })
    }
}

/// Has transparent huge pages mapped as small ones, so that a write shows one small page.
///
/// Protected as a whole, a huge page counts as written as a whole: a guest on tmpfs with
/// `huge=always` would send 2 MiB for every byte. The kernel splits the mapping, not the page,
/// when a part of it is to be protected, and makes no new huge mapping while it is tracked. KVM's
/// own dirty log does the same. Pages of hugetlbfs cannot be split.
fn split_huge_pages(pagemap: &Pagemap, addresses: &Range<u64>) -> Result<(), Error> {
    let mut at = addresses.start.next_multiple_of(BLOCK_BYTES);
    while at < addresses.end {
        let small_page = at..at + PAGE_SIZE as u64;
        pagemap.scan(&small_page, Rearm::Yes, &mut |_| {})?;
        at += BLOCK_BYTES;
    }
    Ok(())
}

/// Does `work` for every item on as many cores as there are, and gives the outcomes to `done` as they
/// come, until it fails.
fn in_parallel<I: Sync, T: Send, E>(
    items: &[I],
    work: impl Fn(&I) -> T + Sync,
    mut done: impl FnMut(&I, T) -> Result<(), E>,
) -> Result<(), E> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(MAX_LOOKERS).min(items.len());
    if threads < 2 {
        return items.iter().try_for_each(|item| done(item, work(item)));
    }
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (outcomes, gathered) = mpsc::channel();
        for _ in 0..threads {
            let (outcomes, next, work) = (outcomes.clone(), &next, &work);
            scope.spawn(move || {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed))
                    && outcomes.send((item, work(item))).is_ok()
                {}
            });
        }
        drop(outcomes);
        gathered
            .into_iter()
            .try_for_each(|(item, outcome)| done(item, outcome))
    })
}

/// Closes what an engine that died has left in the process: it would keep us from tracking.
///
/// No other user of userfaultfd agrees on these very features for a VMM: not ours that serves the faults
/// of a guest either, which must stay. Should an engine be alive and at work on this guest, its own
/// duplicate keeps its watch, and ours is refused.
fn close_leftovers(process: &Process) -> Result<(), Error> {
    for fd in remote_uffd::find(process, Features::TRACK_WRITES)? {
        tracing::warn!(pid = %process.pid(), %fd, "closing what an earlier migration left");
        inject::close(process, fd)?;
    }
    Ok(())
}
