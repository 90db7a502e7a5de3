//! A userfaultfd, whichever address space it belongs to.
//!
//! The descriptor acts on the address space that made it, whoever calls: taken out of another process
//! with [`Process::take_fd`](super::Process::take_fd), it serves us as it would serve that process.
//!
//! Only memory that is not ours can come to miss pages, and be given them: see the module `missing`.

pub(super) mod missing;

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

use super::Error;

/// The only version of the interface that there is.
const API_VERSION: u64 = 0xAA;

/// Group of the ioctls.
const GROUP: u8 = 0xAA;

/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: libc::c_int = 1;

/// A set of `UFFD_FEATURE_*`, agreed once for each descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// Write-protection is understood at all.
    pub const PAGEFAULT_FLAG_WP: Self = Self(1 << 0);
    /// Missing pages of shared memory.
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// A fault tells which thread waits.
    pub const THREAD_ID: Self = Self(1 << 8);
    /// Write-protection of shared and of huge pages.
    pub const WP_HUGETLBFS_SHMEM: Self = Self(1 << 12);
    /// Write-protection also of pages that are not there yet.
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// The kernel itself resolves a write to a protected page, and nobody has to answer.
    pub const WP_ASYNC: Self = Self(1 << 15);

    /// What tracking writes from outside takes.
    pub const TRACK_WRITES: Self = Self(
        Self::PAGEFAULT_FLAG_WP.0
            | Self::WP_HUGETLBFS_SHMEM.0
            | Self::WP_UNPOPULATED.0
            | Self::WP_ASYNC.0,
    );

    /// What serving the missing pages of shared memory takes. No events of `madvise`, `mremap` or `fork`
    /// are among it: whoever gave back memory would wait until we have read that.
    pub const SERVE_FAULTS: Self = Self(Self::MISSING_SHMEM.0 | Self::THREAD_ID.0);

    /// What the kernel itself adds to what was agreed.
    const INITIALIZED: Self = Self(1 << 31);

    /// True when exactly these were agreed, by whoever did.
    pub(super) fn are_exactly(self, agreed: Self) -> bool {
        self.0 & !Self::INITIALIZED.0 == agreed.0
    }

    /// True when every feature of `wanted` is in this set.
    pub fn contains(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// Which faults on a range a userfaultfd sees: `UFFDIO_REGISTER_MODE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(u64);

impl Mode {
    /// Writes to protected pages.
    pub const WP: Self = Self(1 << 1);
    /// Accesses to pages that are not there. For [`missing`] alone.
    const MISSING: Self = Self(1 << 0);
}

/// Which ioctls a registered range allows, one bit each by ioctl number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeIoctls(u64);

impl RangeIoctls {
    /// Placing pages that are missing, and making them zero.
    pub const FILL: Self = Self(1 << 3 | 1 << 4);
    /// Protecting pages and lifting the protection.
    pub const WRITE_PROTECT: Self = Self(1 << 6);

    /// True when every ioctl of `wanted` is allowed.
    pub fn contains(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Takes over a descriptor that is known to be a userfaultfd.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Makes one for our own address space that sees faults of user mode alone, which the kernel
    /// permits to everyone.
    pub(super) fn new_for_user_mode() -> Result<Self, Error> {
        let made = userfaultfd(libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY);
        made.map(Self)
            .map_err(|error| Error::call("userfaultfd", error))
    }

    /// Features that the descriptor with this `fdinfo` has agreed; none before it has agreed any.
    pub(super) fn features_in_fdinfo(text: &str) -> Option<Features> {
        // "API:" with version, features and ioctls in hexadecimal.
        let line = text.lines().find_map(|line| line.strip_prefix("API:"))?;
        let features = line.trim().split(':').nth(1)?;
        u64::from_str_radix(features, 16).ok().map(Features)
    }

    /// Agrees the features; the first call on every descriptor, once. Returns all that the kernel
    /// has. Fails with `EINVAL` when it lacks one of them.
    pub fn api(&self, features: Features) -> Result<Features, Error> {
        let mut arg = ApiArg {
            api: API_VERSION,
            features: features.0,
            ioctls: 0,
        };
        ioctl_api(self.0.as_fd(), &mut arg).map_err(|error| Error::call("UFFDIO_API", error))?;
        Ok(Features(arg.features))
    }

    /// Begins to watch the mappings at `addresses`, which must be whole pages of their backing.
    ///
    /// Fails with [`Error::Watched`] when another userfaultfd watches any of them.
    pub fn register(&self, addresses: &Range<u64>, mode: Mode) -> Result<RangeIoctls, Error> {
        let mut arg = RegisterArg {
            range: RangeArg::from(addresses),
            mode: mode.0,
            ioctls: 0,
        };
        match ioctl_register(self.0.as_fd(), &mut arg) {
            Ok(()) => Ok(RangeIoctls(arg.ioctls)),
            Err(Errno::EBUSY) => Err(Error::Watched {
                start: addresses.start,
                end: addresses.end,
            }),
            Err(error) => Err(Error::call("UFFDIO_REGISTER", error)),
        }
    }

    /// Ends the watch and lifts every protection.
    pub fn unregister(&self, addresses: &Range<u64>) -> Result<(), Error> {
        ioctl_unregister(self.0.as_fd(), &RangeArg::from(addresses))
            .map_err(|error| Error::call("UFFDIO_UNREGISTER", error))
    }

    /// Wakes every thread that a fault in the range has blocked: it tries again.
    pub fn wake(&self, addresses: &Range<u64>) -> Result<(), Error> {
        ioctl_wake(self.0.as_fd(), &RangeArg::from(addresses))
            .map_err(|error| Error::call("UFFDIO_WAKE", error))
    }
}

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

impl From<&Range<u64>> for RangeArg {
    fn from(addresses: &Range<u64>) -> Self {
        Self {
            start: addresses.start,
            len: addresses.end.saturating_sub(addresses.start),
        }
    }
}

#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

const API: libc::c_ulong = nix::request_code_readwrite!(GROUP, 0x3F, size_of::<ApiArg>());
const REGISTER: libc::c_ulong = nix::request_code_readwrite!(GROUP, 0x00, size_of::<RegisterArg>());
// The kernel names these two "read" though it reads them from us.
const UNREGISTER: libc::c_ulong = nix::request_code_read!(GROUP, 0x01, size_of::<RangeArg>());
const WAKE: libc::c_ulong = nix::request_code_read!(GROUP, 0x02, size_of::<RangeArg>());

const _: () = {
    assert!(size_of::<ApiArg>() == 24 && API == 0xC018_AA3F);
    assert!(size_of::<RegisterArg>() == 32 && REGISTER == 0xC020_AA00);
    assert!(size_of::<RangeArg>() == 16 && UNREGISTER == 0x8010_AA01 && WAKE == 0x8010_AA02);
};

fn userfaultfd(flags: libc::c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: userfaultfd takes an integer and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let number = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn ioctl_api(fd: BorrowedFd<'_>, arg: &mut ApiArg) -> Result<(), Errno> {
    // SAFETY: `arg` is the structure that this request reads and writes, and is ours alone.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), API, std::ptr::from_mut(arg)) };
    Errno::result(result).map(drop)
}

fn ioctl_register(fd: BorrowedFd<'_>, arg: &mut RegisterArg) -> Result<(), Errno> {
    // SAFETY: `arg` is the structure that this request reads and writes, and is ours alone. Memory
    // of ours is only ever registered for write-protection, which changes none of its bytes: missing
    // pages can be asked for in the module `missing` alone, which does it for the memory of other
    // processes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), REGISTER, std::ptr::from_mut(arg)) };
    Errno::result(result).map(drop)
}

fn ioctl_unregister(fd: BorrowedFd<'_>, arg: &RangeArg) -> Result<(), Errno> {
    // SAFETY: `arg` is the structure that this request reads; it does not write it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UNREGISTER, std::ptr::from_ref(arg)) };
    Errno::result(result).map(drop)
}

fn ioctl_wake(fd: BorrowedFd<'_>, arg: &RangeArg) -> Result<(), Errno> {
    // SAFETY: `arg` is the structure that this request reads; it does not write it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), WAKE, std::ptr::from_ref(arg)) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use memmap2::MmapMut;

    use super::*;
    use crate::core::layout::PAGE_SIZE;

    #[test]
    fn registers_our_own_memory() {
        let mut memory = MmapMut::map_anon(PAGE_SIZE).unwrap();
        let start = memory.as_ptr().addr() as u64;
        let addresses = start..start + PAGE_SIZE as u64;
        let uffd = Uffd::new_for_user_mode().unwrap();
        assert!(
            uffd.register(&addresses, Mode::WP).is_err(),
            "before the features are agreed"
        );
        let all = uffd.api(Features::TRACK_WRITES).unwrap();
        assert!(all.contains(Features::TRACK_WRITES));
        let allowed = uffd.register(&addresses, Mode::WP).unwrap();
        assert!(allowed.contains(RangeIoctls::WRITE_PROTECT));
        memory[0] = 1;
        let other = Uffd::new_for_user_mode().unwrap();
        other.api(Features::TRACK_WRITES).unwrap();
        let twice = other.register(&addresses, Mode::WP);
        assert!(matches!(twice, Err(Error::Watched { .. })), "{twice:?}");
        uffd.wake(&addresses).unwrap();
        uffd.unregister(&addresses).unwrap();
        other.register(&addresses, Mode::WP).unwrap();
    }

    #[test]
    fn reads_features_from_fdinfo() {
        let text = "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:8000b001:1ff\n";
        let features = Uffd::features_in_fdinfo(text).unwrap();
        assert!(features.contains(Features::TRACK_WRITES));
        let fewer = Uffd::features_in_fdinfo("API:\taa:1:1ff\n").unwrap();
        assert!(!fewer.contains(Features::TRACK_WRITES));
        assert_eq!(Uffd::features_in_fdinfo("pending:\t0\n"), None);
    }

    /// A descriptor that a guest depends on must never be taken for one of a tracker, which is closed.
    #[test]
    fn tells_what_a_descriptor_was_made_for() {
        let serving = Uffd::features_in_fdinfo("API:\taa:80000120:1ff\n").unwrap();
        let tracking = Uffd::features_in_fdinfo("API:\taa:8000b001:1ff\n").unwrap();
        assert!(serving.are_exactly(Features::SERVE_FAULTS));
        assert!(!serving.contains(Features::TRACK_WRITES));
        assert!(tracking.are_exactly(Features::TRACK_WRITES));
        assert!(!tracking.are_exactly(Features::SERVE_FAULTS));
    }
}
