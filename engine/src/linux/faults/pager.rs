//! Serving faults.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::discard::discard;
use super::ranges::{FaultRange, Ranges};
use crate::core::layout::{PAGE_SIZE, PageRange, RegionIndex};
use crate::core::pageset::PageSet;
use crate::linux::uffd::RangeIoctls;
use crate::linux::uffd::missing::{Filled, ForeignUffd, Waiting};
use crate::linux::{Error, Process};
use crate::vmm::{Fault, Pager, VmmError};

/// How long faults are looked for before their reader sleeps: it takes the kernel longer than that to
/// wake it, and a vCPU waits.
const SPIN: Duration = Duration::from_micros(30);

/// The longest sleep at once: the kernel does not take any duration.
const LONGEST_SLEEP: Duration = Duration::from_secs(3_600);

/// How often the kernel may answer that it is to be asked again, with nothing done in between.
const MAX_STALLS: u32 = 10_000;

/// How long a process whose memory is gone may take until its end shows.
const ENDING: Duration = Duration::from_millis(200);

/// Guest RAM with missing pages, and the userfaultfd that tells of them.
#[derive(Debug)]
pub(super) struct Served {
    process: Arc<Process>,
    ranges: Arc<Ranges>,
    uffd: ForeignUffd,
    /// The numbers of its threads are ours too.
    knows_threads: bool,
}

impl Served {
    pub(super) fn new(
        process: Arc<Process>,
        ranges: Arc<Ranges>,
        uffd: ForeignUffd,
    ) -> Result<Self, Error> {
        Ok(Self {
            knows_threads: process.shares_our_numbers()?,
            process,
            ranges,
            uffd,
        })
    }

    /// Makes `missing` miss, of which all but `rest` was discarded since it is watched. Undone on an error,
    /// but for what was discarded.
    pub(super) fn arm(&self, missing: &PageSet, rest: &PageSet) -> Result<(), VmmError> {
        for (region, range) in missing.ranges() {
            self.part(region, range)?;
        }
        let outcome = self.register().and_then(|()| self.discard(rest));
        if outcome.is_err()
            && let Err(error) = self.unregister()
        {
            tracing::warn!(pid = %self.process.pid(), %error, "faults could not be disarmed");
        }
        Ok(outcome?)
    }

    /// Watches all of guest RAM, and makes sure that it is all that there is of it.
    pub(super) fn register(&self) -> Result<(), Error> {
        for part in self.ranges.iter() {
            let allowed = self.uffd.register(&part.addresses);
            let allowed = allowed.map_err(|error| self.or_gone(error))?;
            if !allowed.contains(RangeIoctls::FILL) {
                return Err(Error::NotFillable {
                    name: part.name.clone(),
                });
            }
        }
        // Behind it: the kernel registers what it finds between the addresses, and says nothing of gaps.
        self.ranges.check_mapped(&self.process)
    }

    /// Ends the watch, of all that can be; whoever waits goes on.
    pub(super) fn unregister(&self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for part in self.ranges.iter() {
            match self.uffd.unregister(&part.addresses) {
                Ok(()) => {}
                Err(error) => match self.or_gone(error) {
                    // With its memory.
                    Error::Gone { .. } => return Ok(()),
                    error => outcome = outcome.and(Err(error)),
                },
            }
        }
        outcome
    }

    /// Has everyone who waits look again, and be told again.
    pub(super) fn wake(&self) -> Result<(), Error> {
        self.ranges
            .iter()
            .try_for_each(|part| self.uffd.wake(&part.addresses))
    }

    fn discard(&self, missing: &PageSet) -> Result<(), Error> {
        let mut runs = missing.ranges().peekable();
        for part in self.ranges.iter() {
            let of_part = std::iter::from_fn(|| {
                let (_, range) = runs.next_if(|(region, _)| *region == part.region)?;
                part.bytes_of(range)
            });
            discard(part, of_part)?;
        }
        self.process.check_alive()
    }

    /// The part of guest RAM, and the addresses of the pages in it.
    fn part(
        &self,
        region: RegionIndex,
        range: PageRange,
    ) -> Result<(&FaultRange, Range<u64>), VmmError> {
        let part = self.ranges.of(region)?;
        match part.addresses_of(range) {
            Some(addresses) => Ok((part, addresses)),
            None => Err(VmmError::Unfit {
                what: format!("{range} of {region} lie outside guest RAM"),
            }),
        }
    }

    /// Fills `addresses` from the first to the last by calls of `fill`, each for all that is left.
    fn fill(
        &self,
        part: &FaultRange,
        addresses: Range<u64>,
        fill: impl Fn(&Range<u64>) -> Result<Filled, Errno>,
    ) -> Result<(), VmmError> {
        let mut left = addresses;
        let mut stalls = 0;
        while !left.is_empty() {
            match fill(&left) {
                Ok(Filled::Bytes(bytes)) => {
                    left.start += bytes;
                    stalls = 0;
                }
                Ok(Filled::There) => {
                    let page = left.start..left.start + PAGE_SIZE as u64;
                    // It may have come in a way that wakes nobody.
                    self.uffd.wake(&page)?;
                    left.start = page.end;
                    stalls = 0;
                }
                Ok(Filled::Again) if stalls < MAX_STALLS => {
                    self.process.check_alive()?;
                    stalls += 1;
                    thread::yield_now();
                }
                Ok(Filled::Again) => return Err(self.fill_error(part, &left, Errno::EAGAIN)),
                Err(error) => return Err(self.fill_error(part, &left, error)),
            }
        }
        Ok(())
    }

    fn fill_error(&self, part: &FaultRange, left: &Range<u64>, error: Errno) -> VmmError {
        match error {
            Errno::ESRCH => self.gone().into(),
            Errno::ENOENT => match self.process.check_alive() {
                Ok(()) => VmmError::from(Error::Unwatched {
                    start: left.start,
                    end: left.end,
                }),
                Err(gone) => gone.into(),
            },
            // What the kernel says for a full file system as well.
            Errno::ENOMEM | Errno::ENOSPC => VmmError::io(
                format!(
                    "there is no memory left for pages of guest RAM {:?}",
                    part.name
                ),
                io::Error::from(io::ErrorKind::OutOfMemory),
            ),
            error => self
                .process
                .failure("placing pages of guest RAM", error)
                .into(),
        }
    }

    fn gone(&self) -> Error {
        Error::Gone {
            pid: self.process.pid(),
        }
    }

    /// An error of a registration. For memory that is gone the kernel says that there is none left; the
    /// end of its process may not show yet.
    fn or_gone(&self, error: Error) -> Error {
        let is_it = matches!(
            &error,
            Error::Call { source, .. } if source.kind() == io::ErrorKind::OutOfMemory
        );
        let limit = if is_it { ENDING } else { Duration::ZERO };
        match self.process.wait_end(limit) {
            Ok(true) => self.gone(),
            Ok(false) | Err(_) => error,
        }
    }

    /// Reads what there is, looking for it as long as `spin`.
    fn look(&self, spin: Duration, found: &mut Vec<Fault>) -> Result<bool, VmmError> {
        let start = Instant::now();
        loop {
            let messages = self.uffd.read(|waiting| found.extend(self.fault(waiting)));
            match messages {
                Ok(0) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(self.process.failure("reading faults", error).into()),
            }
            if start.elapsed() >= spin {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    fn fault(&self, waiting: Waiting) -> Option<Fault> {
        let Some((region, page)) = self.ranges.page_at(waiting.address) else {
            tracing::warn!(pid = %self.process.pid(), address = waiting.address,
                "a fault outside guest RAM");
            return None;
        };
        let thread = if self.knows_threads {
            waiting.thread
        } else {
            0
        };
        Some(Fault {
            region,
            page,
            thread,
        })
    }

    /// Sleeps until there may be a fault to read; false when `limit` has passed.
    fn sleep(&self, limit: Duration) -> Result<bool, VmmError> {
        let mut fds = [
            PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.process.end(), PollFlags::POLLIN),
        ];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(limit)), None) {
            Err(Errno::EINTR) => return Ok(true),
            Err(error) => return Err(VmmError::io("poll of a userfaultfd", error.into())),
            Ok(_) => {}
        }
        let told = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        // A userfaultfd does not tell of the end.
        if told(&fds[1]) {
            return Err(self.gone().into());
        }
        let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if fds[0]
            .revents()
            .is_some_and(|events| events.intersects(broken))
        {
            let failure = self.process.failure("poll of a userfaultfd", Errno::EIO);
            return Err(failure.into());
        }
        Ok(told(&fds[0]))
    }
}

impl Pager for Served {
    fn faults(&self, limit: Duration, found: &mut Vec<Fault>) -> Result<(), VmmError> {
        let start = Instant::now();
        let left = || limit.saturating_sub(start.elapsed());
        // Only once: of several threads that a fault has woken all but one find it gone.
        let mut spin = SPIN;
        while !self.look(spin.min(left()), found)? {
            spin = Duration::ZERO;
            if !self.sleep(left().min(LONGEST_SLEEP))? && left().is_zero() {
                break;
            }
        }
        Ok(())
    }

    fn place(&self, region: RegionIndex, range: PageRange, from: &[u8]) -> Result<(), VmmError> {
        let (part, addresses) = self.part(region, range)?;
        if from.len() as u64 != range.byte_len() {
            return Err(VmmError::Unfit {
                what: format!("{} bytes were given for {range} of {region}", from.len()),
            });
        }
        let end = addresses.end;
        self.fill(part, addresses, |left| {
            let rest = usize::try_from(end - left.start).map_err(|_| Errno::EOVERFLOW)?;
            self.uffd.copy(left.start, &from[from.len() - rest..])
        })
    }

    fn zero(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        let (part, addresses) = self.part(region, range)?;
        self.fill(part, addresses, |left| self.uffd.zero(left))
    }
}
