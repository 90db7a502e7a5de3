//! Missing pages: who waits for them, and how they come.
//!
//! To place a page writes to memory. A userfaultfd does that in the address space that made it, so here
//! is a type for one that is not of ours: no safe code can write to our own memory by it.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;

use super::{Features, GROUP, Mode, RangeArg, RangeIoctls, Uffd};
use crate::linux::{Error, Process, RemoteFd};

/// Length of a `uffd_msg` in bytes.
const MESSAGE_BYTES: usize = 32;

/// Most messages that are read at once.
const MESSAGES: usize = 64;

/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;

/// An access that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::linux) struct Waiting {
    /// An address within the page.
    pub(in crate::linux) address: u64,
    /// Who waits, as the pid namespace of that thread numbers it; 0 if that was not agreed to be told.
    pub(in crate::linux) thread: u32,
}

/// What came of an order to fill pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::linux) enum Filled {
    /// So many bytes from the first on are there, and whoever waited for them was woken.
    Bytes(u64),
    /// The first page was there already: nothing was done.
    There,
    /// Nothing was done, for a reason that goes away.
    Again,
}

/// A userfaultfd on the memory of another process.
#[derive(Debug)]
pub(in crate::linux) struct ForeignUffd(Uffd);

impl ForeignUffd {
    /// Takes a descriptor out of `process`, which made it: a userfaultfd.
    pub(in crate::linux) fn take(process: &Process, fd: RemoteFd) -> Result<Self, Error> {
        if process.pid() == Pid::this() {
            let what = "taking a userfaultfd on memory of our own";
            return Err(Error::call(what, Errno::EINVAL));
        }
        let fd = process.take_fd(fd)?;
        Ok(Self(Uffd::from_fd(fd)))
    }

    /// See [`Uffd::api`].
    pub(in crate::linux) fn api(&self, features: Features) -> Result<Features, Error> {
        self.0.api(features)
    }

    /// From now on whoever touches a page of `addresses` that is not there waits for it. Does no harm to
    /// addresses for which that was so already.
    pub(in crate::linux) fn register(&self, addresses: &Range<u64>) -> Result<RangeIoctls, Error> {
        self.0.register(addresses, Mode::MISSING)
    }

    /// See [`Uffd::unregister`]. Wakes everyone, and what is not there by then is zero.
    pub(in crate::linux) fn unregister(&self, addresses: &Range<u64>) -> Result<(), Error> {
        self.0.unregister(addresses)
    }

    /// See [`Uffd::wake`]: who does not find the page is told anew.
    pub(in crate::linux) fn wake(&self, addresses: &Range<u64>) -> Result<(), Error> {
        self.0.wake(addresses)
    }

    /// Places `from`, whole pages, at `address`.
    pub(in crate::linux) fn copy(&self, address: u64, from: &[u8]) -> Result<Filled, Errno> {
        let (outcome, copied) = ioctl_copy(self.0.0.as_fd(), address, from);
        filled(outcome, copied, from.len() as u64)
    }

    /// Makes the pages at `addresses` zero.
    pub(in crate::linux) fn zero(&self, addresses: &Range<u64>) -> Result<Filled, Errno> {
        let mut arg = ZeroArg {
            range: RangeArg::from(addresses),
            mode: 0,
            zeroed: 0,
        };
        let outcome = ioctl_zero(self.0.0.as_fd(), &mut arg);
        filled(outcome, arg.zeroed, arg.range.len)
    }

    /// Tells `found` of accesses that wait and were not told yet, and how many messages there were. Never
    /// blocks.
    pub(in crate::linux) fn read(&self, mut found: impl FnMut(Waiting)) -> Result<usize, Errno> {
        let mut bytes = [0; MESSAGE_BYTES * MESSAGES];
        let length = match nix::unistd::read(&self.0.0, &mut bytes) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(0),
            Err(error) => return Err(error),
        };
        let (messages, _) = bytes[..length].as_chunks::<MESSAGE_BYTES>();
        if messages.is_empty() {
            // There is always more to come, until the last descriptor is closed.
            return Err(Errno::EPIPE);
        }
        messages.iter().filter_map(parse).for_each(&mut found);
        Ok(messages.len())
    }
}

impl AsFd for ForeignUffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

/// Other events were never agreed; should one come, nobody waits for a page because of it.
fn parse(message: &[u8; MESSAGE_BYTES]) -> Option<Waiting> {
    // The event in the first byte; in the union behind eight bytes: flags, address, thread.
    let (head, fault) = message.split_at(8);
    let (address, rest) = fault[8..].split_first_chunk()?;
    let thread = rest.first_chunk()?;
    (head[0] == EVENT_PAGEFAULT).then(|| Waiting {
        address: u64::from_ne_bytes(*address),
        thread: u32::from_ne_bytes(*thread),
    })
}

/// The kernel says `EAGAIN` for a part as well as for nothing; `done` tells, and is negative, or as it was
/// set before, for nothing.
fn filled(outcome: Result<(), Errno>, done: i64, len: u64) -> Result<Filled, Errno> {
    match outcome {
        Ok(()) => Ok(Filled::Bytes(len)),
        Err(Errno::EAGAIN) => match u64::try_from(done) {
            Ok(done @ 1..) => Ok(Filled::Bytes(done.min(len))),
            Ok(0) | Err(_) => Ok(Filled::Again),
        },
        Err(Errno::EINTR) => Ok(Filled::Again),
        Err(Errno::EEXIST) => Ok(Filled::There),
        Err(error) => Err(error),
    }
}

#[repr(C)]
struct CopyArg {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroArg {
    range: RangeArg,
    mode: u64,
    zeroed: i64,
}

const COPY: libc::c_ulong = nix::request_code_readwrite!(GROUP, 0x03, size_of::<CopyArg>());
const ZERO: libc::c_ulong = nix::request_code_readwrite!(GROUP, 0x04, size_of::<ZeroArg>());

const _: () = {
    assert!(size_of::<CopyArg>() == 40 && COPY == 0xC028_AA03);
    assert!(size_of::<ZeroArg>() == 32 && ZERO == 0xC020_AA04);
};

/// The outcome, and how many bytes were copied, which counts for some errors too.
fn ioctl_copy(fd: BorrowedFd<'_>, to: u64, from: &[u8]) -> (Result<(), Errno>, i64) {
    let mut arg = CopyArg {
        to,
        from: from.as_ptr().expose_provenance() as u64,
        len: from.len() as u64,
        mode: 0,
        copied: 0,
    };
    // SAFETY: `arg` is the structure that this request reads and writes, and is ours alone. It names the
    // bytes of `from`, which are borrowed for the call and only read. What is written besides is memory
    // of another process: callers have a `ForeignUffd`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), COPY, &raw mut arg) };
    (Errno::result(result).map(drop), arg.copied)
}

fn ioctl_zero(fd: BorrowedFd<'_>, arg: &mut ZeroArg) -> Result<(), Errno> {
    // SAFETY: `arg` is the structure that this request reads and writes, and is ours alone. What is written
    // besides is memory of another process: callers have a `ForeignUffd`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), ZERO, std::ptr::from_mut(arg)) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::layout::PAGE_SIZE;

    const PAGE: u64 = PAGE_SIZE as u64;

    #[test]
    fn reads_a_message() {
        let mut message = [0; MESSAGE_BYTES];
        message[0] = EVENT_PAGEFAULT;
        message[8] = 1;
        message[16..24].copy_from_slice(&0x7F00_1234_5000_u64.to_ne_bytes());
        message[24..28].copy_from_slice(&4711_u32.to_ne_bytes());
        let waiting = Waiting {
            address: 0x7F00_1234_5000,
            thread: 4711,
        };
        assert_eq!(parse(&message), Some(waiting));
        // A removal.
        message[0] = 0x15;
        assert_eq!(parse(&message), None);
    }

    #[test]
    fn tells_a_part_from_nothing() {
        let again = Err(Errno::EAGAIN);
        assert_eq!(filled(Ok(()), 0, 3 * PAGE), Ok(Filled::Bytes(3 * PAGE)));
        let part = 2 * PAGE;
        let outcome = filled(again, part.cast_signed(), 3 * PAGE);
        assert_eq!(outcome, Ok(Filled::Bytes(part)));
        assert_eq!(filled(again, 0, PAGE), Ok(Filled::Again));
        assert_eq!(filled(again, -11, PAGE), Ok(Filled::Again));
        assert_eq!(filled(Err(Errno::EEXIST), -17, PAGE), Ok(Filled::There));
        assert_eq!(filled(Err(Errno::ESRCH), 0, PAGE), Err(Errno::ESRCH));
    }

    #[test]
    fn takes_none_of_our_own() {
        let us = Process::open(Pid::this()).unwrap();
        let ours = Uffd::new_for_user_mode().unwrap();
        let fd = RemoteFd(ours.0.as_raw_fd());
        assert!(ForeignUffd::take(&us, fd).is_err());
    }
}
