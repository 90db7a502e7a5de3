//! The target's RAM, mapped: the way to fill it without a copy in between, and the only one where
//! files cannot be written, which is hugetlbfs.
//!
//! The memory is shared with another process, which may write it at any time. A Rust reference to it,
//! `&[u8]` as much as `&mut [u8]`, would promise the compiler that this does not happen. So none is
//! made, with one exception: [`GuestMapping::receive`], before the guest runs there.

use std::io;
use std::ops::Range;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;

use super::RamFile;

/// Bytes that are read at a time, so that their checksum is taken while a core's cache has them.
const RECEIVE_BYTES: usize = 256 * 1024;

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

    /// Fills `length` bytes from `offset` with what `from` gives, and tells `hasher` of them.
    ///
    /// The pages must be [present](Self::make_present), and no guest may run in them yet.
    pub fn receive(
        &self,
        bytes: Range<u64>,
        from: &mut dyn io::Read,
        hasher: &mut crc32fast::Hasher,
    ) -> io::Result<()> {
        let start = usize::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let end = usize::try_from(bytes.end).map_err(|_| Errno::EOVERFLOW)?;
        if start > end || end > self.byte_len() {
            return Err(Errno::EFAULT.into());
        }
        // SAFETY: `start` is within the mapping, by the check above.
        let place = unsafe { self.memory.as_mut_ptr().add(start) };
        // SAFETY: `place` has `end - start` bytes of mapping behind it, which stay mapped as long as
        // `self`. Until the guest is given over, its VMM has no thread that touches guest RAM, and
        // ranges that are received at the same time never overlap: this is the only access.
        let memory = unsafe { std::slice::from_raw_parts_mut(place, end - start) };
        for chunk in memory.chunks_mut(RECEIVE_BYTES) {
            from.read_exact(chunk)?;
            // While it is in the cache.
            hasher.update(chunk);
        }
        Ok(())
    }

    /// Has pages mapped that the file holds, ahead of [`GuestMapping::receive`]. Fails where there is
    /// no room for one.
    pub fn make_present(&self, bytes: Range<u64>) -> io::Result<()> {
        let start = usize::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let length = bytes.end.checked_sub(bytes.start).ok_or(Errno::EINVAL)?;
        self.allocate(
            start,
            usize::try_from(length).map_err(|_| Errno::EOVERFLOW)?,
        )
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
