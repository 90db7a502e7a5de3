//! Pages that another process waits for, as [`Faults`] and [`Pager`].
//!
//! A userfaultfd is made inside the process and stays open there, beside the duplicate that is ours, until
//! the last page has come. While it is open, whoever touches a missing page waits; were its last
//! descriptor closed, they would all be given zeros. So our death only leaves them waiting, and another
//! engine takes the descriptor again and goes on ([`RamFaults::adopt`]).
//!
//! Pages are filled with `UFFDIO_COPY`, which is atomic for each and never overwrites one that is there.
//! Nothing here looks at guest RAM through a mapping: that would allocate what is missing.

use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::remote_uffd::{RemoteUffd, made_with};
use super::uffd::{Features, Mode, RangeIoctls, Uffd};
use super::{Access, Error, Process, RamFile, maps};
use crate::core::layout::{Layout, PAGE_SIZE, PageRange, Region, RegionIndex};
use crate::core::pageset::PageSet;
use crate::vmm::{Fault, Faults, Pager, VmmError};

/// How long a thread looks for the next fault before it sleeps: sleeping and waking take longer than that.
const SPIN: Duration = Duration::from_micros(20);

/// How often pages are discarded that are not gone afterwards.
const MOST_PUNCHES: u32 = 100;

/// How often a page is tried whose memory is changing under our hands.
const MOST_TRIES: u32 = 10_000;

/// A region of guest RAM: where the process has it, and which bytes of which file it is.
#[derive(Debug)]
pub struct FaultRange {
    /// Which region.
    pub region: RegionIndex,
    /// Its addresses in the process.
    pub addresses: Range<u64>,
    /// The file that holds it, opened for writing.
    pub file: RamFile,
    /// Where in the file its first byte is.
    pub file_start: u64,
}

impl FaultRange {
    fn addresses_of(&self, range: PageRange) -> Range<u64> {
        let bytes = range.bytes();
        self.addresses.start + bytes.start..self.addresses.start + bytes.end
    }

    /// Makes `range` a hole of the file, in which nothing is left.
    fn punch(&self, range: PageRange) -> Result<(), VmmError> {
        let start = self.file_start + range.first.byte_offset();
        let end = start + range.byte_len();
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (at, length) = (start.cast_signed(), (end - start).cast_signed());
        let failed = |error| VmmError::io("discarding pages of guest RAM", error);
        let is_hole = || {
            let data = self.file.next_data(start).map_err(failed)?;
            Ok::<_, VmmError>(data.is_none_or(|data| data >= end))
        };
        let mut tries = 0;
        while !is_hole()? {
            // Of a huge page that cannot be split the kernel gives a part back only as zeros, as long as
            // somebody holds it.
            if tries >= MOST_PUNCHES {
                return Err(VmmError::Unfit {
                    what: "a huge page of guest RAM cannot be discarded in part, since somebody holds \
                           it: mount that tmpfs with huge=never, or move the guest by precopy"
                        .to_owned(),
                });
            }
            tries += 1;
            fallocate(self.file.file(), flags, at, length).map_err(|error| failed(error.into()))?;
        }
        Ok(())
    }
}

/// Where a region of guest RAM is, in words that outlive the engine: a VMM whose pages are missing may
/// not be able to say so.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "host", derive(serde::Serialize, serde::Deserialize))]
pub struct RamPlace {
    /// The region's name.
    pub name: String,
    /// Its first address in the process.
    pub address: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Of the file that holds it: device numbers and inode.
    pub file: (u64, u64, u64),
}

impl RamPlace {
    /// Finds it again: the mapping must be of the same file still.
    fn find(&self, process: &Process, region: RegionIndex) -> Result<FaultRange, Error> {
        let addresses = self.address..self.address.saturating_add(self.bytes);
        let is_it = |mapping: &maps::Mapping| {
            let maps::Device { major, minor } = mapping.device;
            mapping.start <= addresses.start
                && addresses.end <= mapping.end
                && (major, minor, mapping.inode) == self.file
        };
        let mappings = maps::runs(maps::of_process(process)?);
        let mapping = mappings.into_iter().find(is_it);
        let mapping = mapping.ok_or(Error::Unwatched {
            start: addresses.start,
            end: addresses.end,
        })?;
        Ok(FaultRange {
            region,
            file: RamFile::open(process, &mapping, Access::ReadWrite)?,
            file_start: mapping.offset + (addresses.start - mapping.start),
            addresses,
        })
    }
}

/// The pages that a process waits for.
#[derive(Debug)]
pub struct RamFaults {
    process: Arc<Process>,
    /// Taken when they are armed.
    ranges: Arc<[FaultRange]>,
    state: State,
}

#[derive(Debug)]
enum State {
    Idle,
    Prepared { remote: RemoteUffd, uffd: Arc<Uffd> },
    Armed { remote: RemoteUffd, uffd: Arc<Uffd> },
}

impl RamFaults {
    /// Of guest RAM in `ranges`. Does not touch the process before [`Faults::prepare`].
    pub fn new(process: Arc<Process>, ranges: Vec<FaultRange>) -> Self {
        Self {
            process,
            ranges: ranges.into(),
            state: State::Idle,
        }
    }

    /// Of guest RAM in these places, with its layout.
    pub fn find(process: &Arc<Process>, places: &[RamPlace]) -> Result<(Self, Layout), VmmError> {
        let region = |place: &RamPlace| Region {
            name: place.name.clone(),
            bytes: place.bytes,
            // No others are ever armed.
            backing_page_bytes: u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX),
        };
        let layout = Layout::new(places.iter().map(region).collect())
            .map_err(|error| VmmError::failed("guest RAM as it was written down", error))?;
        let mut ranges = Vec::new();
        for (index, region) in layout.iter() {
            let place = places.iter().find(|place| place.name == region.name);
            let range = place.map(|place| place.find(process, index));
            ranges.extend(range.transpose()?);
        }
        Ok((Self::new(Arc::clone(process), ranges), layout))
    }

    /// The pages that have no memory.
    pub fn without_memory(&self, layout: &Layout) -> Result<PageSet, VmmError> {
        let failed = |error| VmmError::io("looking for holes in guest RAM", error);
        let mut missing = PageSet::full(layout);
        for range in &*self.ranges {
            let bytes = range.addresses.end - range.addresses.start;
            let all = range.file_start..range.file_start + bytes;
            range
                .file
                .data_extents(all, |extent| {
                    let from = extent.start - range.file_start;
                    let pages = PageRange::covering(from..extent.end - range.file_start);
                    let taken = missing.remove(range.region, pages);
                    taken.map(drop).map_err(std::io::Error::other)
                })
                .map_err(failed)?;
        }
        Ok(missing)
    }

    /// Takes over what an engine that died has armed in the process: whoever waits there waits for us
    /// from now on. None when nothing was armed.
    pub fn adopt(&mut self) -> Result<Option<Arc<dyn Pager>>, VmmError> {
        let Some(&fd) = made_with(&self.process, Features::SERVE_MISSING)?.first() else {
            return Ok(None);
        };
        let uffd = Arc::new(Uffd::from_fd(self.process.take_fd(fd)?));
        let mut remote = RemoteUffd::of(Arc::clone(&self.process), fd);
        remote.leave();
        for range in &*self.ranges {
            // What the dead one has heard of is raised again.
            uffd.wake(&range.addresses)?;
        }
        let pager = self.pager(&uffd);
        self.state = State::Armed { remote, uffd };
        Ok(Some(pager))
    }

    fn pager(&self, uffd: &Arc<Uffd>) -> Arc<dyn Pager> {
        Arc::new(RamPager {
            process: Arc::clone(&self.process),
            ranges: Arc::clone(&self.ranges),
            uffd: Arc::clone(uffd),
            hearing: Mutex::new(()),
        })
    }

    /// Why post-copy cannot be had with this memory, if it cannot.
    fn unfit(&self) -> Option<VmmError> {
        let what = if self.ranges.iter().any(|range| range.file.is_hugetlb()) {
            "guest RAM lies on hugetlbfs, whose pages are not served one by one: give the target's QEMU a \
             mem-path on tmpfs, or move the guest by precopy"
        } else if self.ranges.iter().any(|range| !range.file.is_tmpfs()) {
            "guest RAM lies on a disk, whose pages are not waited for: give the target's QEMU a mem-path \
             on tmpfs, or move the guest by precopy"
        } else {
            return None;
        };
        Some(VmmError::Unfit {
            what: what.to_owned(),
        })
    }

    fn register(&self, uffd: &Uffd) -> Result<(), Error> {
        for FaultRange { addresses, .. } in &*self.ranges {
            let allowed = uffd.register(addresses, Mode::MISSING)?;
            if !allowed.contains(RangeIoctls::FILL) {
                return Err(Error::Unwatched {
                    start: addresses.start,
                    end: addresses.end,
                });
            }
        }
        Ok(())
    }

    /// Makes holes of exactly these pages.
    fn punch(&self, missing: &PageSet) -> Result<(), VmmError> {
        for (region, range) in missing.ranges() {
            let of = self.ranges.iter().find(|of| of.region == region);
            let of = of.ok_or_else(|| VmmError::Unfit {
                what: format!("{region} is no part of this guest's RAM: a defect of the engine"),
            })?;
            of.punch(range)?;
        }
        Ok(())
    }
}

impl Faults for RamFaults {
    fn prepare(&mut self) -> Result<(), VmmError> {
        if !matches!(self.state, State::Idle) {
            return Ok(());
        }
        if let Some(unfit) = self.unfit() {
            return Err(unfit);
        }
        if let Some(fd) = made_with(&self.process, Features::SERVE_MISSING)?.first() {
            return Err(VmmError::Unfit {
                what: format!(
                    "{fd} of process {} waits for pages of another migration",
                    self.process.pid()
                ),
            });
        }
        // Closed again on every error below.
        let remote = RemoteUffd::new(Arc::clone(&self.process))?;
        let uffd = Uffd::from_fd(self.process.take_fd(remote.fd())?);
        uffd.api(Features::SERVE_MISSING)?;
        let uffd = Arc::new(uffd);
        self.state = State::Prepared { remote, uffd };
        Ok(())
    }

    fn discard(&mut self, pages: &PageSet) -> Result<(), VmmError> {
        self.punch(pages)
    }

    fn arm(&mut self, missing: &PageSet) -> Result<Arc<dyn Pager>, VmmError> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Prepared { mut remote, uffd } => {
                self.register(&uffd)?;
                // Whoever comes in between waits already.
                self.punch(missing)?;
                // From here on it must outlive us.
                remote.leave();
                let pager = self.pager(&uffd);
                self.state = State::Armed { remote, uffd };
                Ok(pager)
            }
            other => {
                self.state = other;
                Err(VmmError::Unfit {
                    what: "faults were armed unprepared: a defect of the engine".to_owned(),
                })
            }
        }
    }

    fn disarm(&mut self) -> Result<(), VmmError> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => Ok(()),
            State::Prepared { mut remote, .. } => Ok(remote.close()?),
            State::Armed { remote, uffd } => {
                for range in &*self.ranges {
                    uffd.unregister(&range.addresses)?;
                }
                let fd = remote.fd();
                Ok(RemoteUffd::of(Arc::clone(&self.process), fd).close()?)
            }
        }
    }
}

/// Serves the faults of a process.
#[derive(Debug)]
struct RamPager {
    process: Arc<Process>,
    ranges: Arc<[FaultRange]>,
    uffd: Arc<Uffd>,
    /// Held by the one who waits for faults: woken all at once, the others would find nothing.
    hearing: Mutex<()>,
}

impl RamPager {
    /// Replaces nothing: waits until an access is heard of, or `limit` has passed.
    fn hear(&self, limit: Duration, heard: &mut Vec<(u64, u32)>) -> Result<(), VmmError> {
        let _hearing = self.hearing.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        loop {
            match self.uffd.faults(heard) {
                Ok(()) => return Ok(()),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(self.failure("hearing of page faults", error)),
            }
            let waited = began.elapsed();
            if waited < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let left = limit.saturating_sub(waited);
            if left.is_zero() || !self.sleep(left)? {
                self.process.check_alive()?;
                return Ok(());
            }
        }
    }

    /// Sleeps until there is an access to hear of. False when `limit` has passed.
    fn sleep(&self, limit: Duration) -> Result<bool, VmmError> {
        let fd: BorrowedFd<'_> = self.uffd.as_fd();
        let mut watched = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut watched, limit) {
            Ok(0) => Ok(false),
            Ok(_) => {
                // Its memory is gone, and the process with it.
                let ready = watched[0].revents().unwrap_or(PollFlags::empty());
                if !ready.contains(PollFlags::POLLIN) {
                    self.process.check_alive()?;
                    return Ok(false);
                }
                Ok(true)
            }
            Err(Errno::EINTR) => Ok(true),
            Err(error) => Err(self.failure("waiting for page faults", error)),
        }
    }

    fn failure(&self, what: &'static str, error: Errno) -> VmmError {
        match self.process.check_alive() {
            Err(gone) => gone.into(),
            Ok(()) => VmmError::io(what, error.into()),
        }
    }

    fn range(&self, region: RegionIndex) -> Result<&FaultRange, VmmError> {
        let found = self.ranges.iter().find(|range| range.region == region);
        found.ok_or_else(|| VmmError::Unfit {
            what: format!("{region} is no part of this guest's RAM: a defect of the engine"),
        })
    }

    /// The page at an address of the process.
    fn page_at(&self, address: u64) -> Option<(RegionIndex, u64)> {
        let of = |range: &&FaultRange| range.addresses.contains(&address);
        let range = self.ranges.iter().find(of)?;
        Some((
            range.region,
            (address - range.addresses.start) / PAGE_SIZE as u64,
        ))
    }

    /// Has `fill` fill pages from a place on, over all of `addresses`, and passes over those that are
    /// there.
    fn fill_all(
        &self,
        addresses: &Range<u64>,
        mut fill: impl FnMut(u64) -> (u64, Result<(), Errno>),
    ) -> Result<(), VmmError> {
        let mut at = addresses.start;
        let mut tries = 0;
        while at < addresses.end {
            let (done, outcome) = fill(at);
            at += done;
            match outcome {
                Ok(()) => {}
                Err(Errno::EEXIST) => {
                    let there = at..at + PAGE_SIZE as u64;
                    self.uffd.wake(&there)?;
                    at = there.end;
                    tries = 0;
                }
                // The memory is being changed, or only a part was done.
                Err(Errno::EAGAIN) if tries < MOST_TRIES => tries += u32::from(done == 0),
                Err(error) => return Err(self.failure("filling pages of guest RAM", error)),
            }
        }
        Ok(())
    }
}

impl Pager for RamPager {
    fn faults(&self, limit: Duration, found: &mut Vec<Fault>) -> Result<(), VmmError> {
        let mut heard = Vec::new();
        self.hear(limit, &mut heard)?;
        for (address, thread) in heard {
            if let Some((region, page)) = self.page_at(address) {
                let page = PageRange::new(page, 1).first;
                found.push(Fault {
                    region,
                    page,
                    thread,
                });
            }
        }
        Ok(())
    }

    fn place(&self, region: RegionIndex, range: PageRange, from: &[u8]) -> Result<(), VmmError> {
        let addresses = self.range(region)?.addresses_of(range);
        if from.len() as u64 != range.byte_len() {
            return Err(VmmError::Unfit {
                what: format!("{} bytes for {range}: a defect of the engine", from.len()),
            });
        }
        self.fill_all(&addresses, |at| {
            let done = usize::try_from(at - addresses.start).unwrap_or(from.len());
            self.uffd.copy(at, &from[done..])
        })
    }

    fn zero(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        let addresses = self.range(region)?.addresses_of(range);
        let end = addresses.end;
        self.fill_all(&addresses, |at| self.uffd.zero(&(at..end)))
    }
}
