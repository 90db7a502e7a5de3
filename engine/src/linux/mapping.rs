//! Guest RAM, mapped: the way to write it where files cannot be written, which is hugetlbfs.
//!
//! The memory is shared with another process, which may write it at any time. A Rust reference to it,
//! `&[u8]` as much as `&mut [u8]`, would promise the compiler that this does not happen. So none is
//! ever made: bytes are copied in and out through raw pointers.

use std::io;
use std::ops::Range;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;

use super::RamFile;

/// A shared, writable mapping of a part of a [`RamFile`].
#[derive(Debug)]
pub struct GuestMapping {
    memory: MmapRaw,
}

impl GuestMapping {
    /// Maps the bytes `bytes` of `file`, whole pages of its backing.
    ///
    /// On hugetlbfs this reserves the pages that nobody has reserved yet, and fails with `ENOMEM` when
    /// the pool is too small.
    pub fn new(file: &RamFile, bytes: &Range<u64>) -> io::Result<Self> {
        let length = bytes.end.checked_sub(bytes.start).ok_or(Errno::EINVAL)?;
        if bytes.end > file.byte_len() {
            return Err(Errno::EINVAL.into());
        }
        let length = usize::try_from(length).map_err(|_| Errno::EOVERFLOW)?;
        let memory = MmapOptions::new()
            .offset(bytes.start)
            .len(length)
            .map_raw(file.file())?;
        Ok(Self { memory })
    }

    /// Length in bytes.
    pub fn byte_len(&self) -> usize {
        self.memory.len()
    }

    /// Copies `from` to `offset`. Fails where there is no room for it.
    pub fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let end = start.checked_add(from.len()).ok_or(Errno::EOVERFLOW)?;
        if end > self.byte_len() {
            return Err(Errno::EFAULT.into());
        }
        self.allocate(start, from.len())?;
        // SAFETY: `start` is within the mapping, by the check above.
        let place = unsafe { self.memory.as_mut_ptr().add(start) };
        // SAFETY: `place` has `from.len()` bytes of mapping behind it, by the same check, which stay
        // mapped as long as `self`; they are no Rust object, so `from` cannot overlap them.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), place, from.len()) };
        Ok(())
    }

    /// Makes pages present: touching one for which there is no room would be a `SIGBUS`, and this is
    /// an error. They stay, since nobody takes pages away while a guest is being received.
    fn allocate(&self, start: usize, length: usize) -> io::Result<()> {
        match self
            .memory
            .advise_range(Advice::PopulateWrite, start, length)
        {
            Err(error) if error.raw_os_error() == Some(Errno::EFAULT as i32) => {
                Err(Errno::ENOSPC.into())
            }
            outcome => outcome,
        }
    }
}
