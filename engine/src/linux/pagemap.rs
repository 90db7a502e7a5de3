//! Which pages of a process were written: the `PAGEMAP_SCAN` ioctl of Linux 6.7 and newer.
//!
//! The memory must be registered with a userfaultfd in the mode
//! [`Mode::WP`](super::uffd::Mode::WP) and with
//! [`Features::TRACK_WRITES`](super::uffd::Features::TRACK_WRITES). A page counts as written when it
//! is not protected, so one re-protecting scan must come first.
//!
//! Three traps, all seen in the kernel's source or on a running one:
//! - Masks other than `PAGE_IS_WRITTEN`, alone and in both places, hit a bug on unpopulated ranges.
//! - Within one call the kernel gathers [`KERNEL_VECTOR`] regions at a time. With a longer vector, a
//!   walk that fills this buffer and then comes to its end reports a `walk_end` from the middle.
//! - An address space whose process has ended is empty. 6.18 says `ESRCH`; older kernels find nothing
//!   written, and every kernel does so in a part that was unmapped. So whoever scans must ask
//!   afterwards whether the process is alive, and whether the memory is still where it was.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::unistd::Pid;

use super::{Error, Process};
use crate::vmm::Rearm;

/// Regions that the kernel gathers at a time: 2 MiB of pages, every second one written.
pub const KERNEL_VECTOR: usize = 512;

/// The page is not write-protected.
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// Protect what matches, atomically with its report.
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;

/// Fail, rather than skip, where writes are not tracked.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// A process's page map.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    pid: Pid,
}

impl Pagemap {
    /// Opens the page map of a process. It stays with the address space that the process has now.
    pub fn open(process: &Process) -> Result<Self, Error> {
        let file = process.open_proc("pagemap", OFlag::O_RDONLY)?;
        let pid = process.pid();
        Ok(Self { file, pid })
    }

    /// Tells `found` every run of written pages within `addresses`, in order.
    ///
    /// Fails with [`Error::Unwatched`] where writes are not tracked, though not where nothing is
    /// mapped, and with [`Error::Gone`] where the kernel tells that the process has ended: see the
    /// traps above.
    pub fn scan(
        &self,
        addresses: &Range<u64>,
        rearm: Rearm,
        found: &mut dyn FnMut(Range<u64>),
    ) -> Result<(), Error> {
        let mut vector = vec![PageRegion::default(); KERNEL_VECTOR];
        let mut rest = addresses.clone();
        while rest.start < rest.end {
            let pass = Pass::new(&rest, rearm).run(self, &mut vector)?;
            let regions = vector.iter().take(pass.regions);
            regions.for_each(|region| found(region.start..region.end));
            // A huge page that `addresses` covers in part cannot be protected: the kernel backs out
            // with success and no progress.
            if pass.walk_end <= rest.start {
                return Err(Error::call("PAGEMAP_SCAN", Errno::EINVAL));
            }
            rest.start = pass.walk_end;
        }
        Ok(())
    }
}

/// One call of the ioctl.
struct Pass {
    arg: ScanArg,
}

/// How far one call came.
struct Progress {
    regions: usize,
    walk_end: u64,
}

impl Pass {
    fn new(addresses: &Range<u64>, rearm: Rearm) -> Self {
        let flags = match rearm {
            Rearm::Yes => PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            Rearm::No => PM_SCAN_CHECK_WPASYNC,
        };
        Self {
            arg: ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags,
                start: addresses.start,
                end: addresses.end,
                category_mask: PAGE_IS_WRITTEN,
                return_mask: PAGE_IS_WRITTEN,
                ..ScanArg::default()
            },
        }
    }

    fn run(mut self, of: &Pagemap, vector: &mut [PageRegion]) -> Result<Progress, Error> {
        loop {
            match ioctl_scan(of.file.as_fd(), &mut self.arg, vector) {
                Ok(regions) => {
                    return Ok(Progress {
                        regions,
                        walk_end: self.arg.walk_end,
                    });
                }
                // The kernel gives this for a fatal signal only; what it had found is lost with us.
                Err(Errno::EINTR) => {}
                Err(Errno::EPERM) => {
                    return Err(Error::Unwatched {
                        start: self.arg.start,
                        end: self.arg.end,
                    });
                }
                Err(Errno::ESRCH) => return Err(Error::Gone { pid: of.pid }),
                Err(error) => return Err(Error::call("PAGEMAP_SCAN", error)),
            }
        }
    }
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vector: u64,
    vector_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_any_of_mask: u64,
    return_mask: u64,
}

const SCAN: libc::c_ulong = nix::request_code_readwrite!(b'f', 16, size_of::<ScanArg>());

const _: () = {
    assert!(size_of::<PageRegion>() == 24);
    assert!(size_of::<ScanArg>() == 96 && SCAN == 0xC060_6610);
};

fn ioctl_scan(
    fd: BorrowedFd<'_>,
    arg: &mut ScanArg,
    vector: &mut [PageRegion],
) -> Result<usize, Errno> {
    arg.vector = vector.as_mut_ptr().expose_provenance() as u64;
    arg.vector_len = vector.len() as u64;
    // SAFETY: `arg` is the structure that this request reads and writes; the vector that it names is
    // `vector`, of that length, borrowed until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SCAN, std::ptr::from_mut(arg)) };
    let regions = Errno::result(result)?;
    Ok(usize::try_from(regions).map_or(0, |regions| regions.min(vector.len())))
}
