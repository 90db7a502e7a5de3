//! The target's RAM, mapped: the way to fill it without a copy in between, and the only one where
//! files cannot be written, which is hugetlbfs.
//!
//! The memory is shared with another process, which may write it at any time. A Rust reference to it,
//! `&[u8]` as much as `&mut [u8]`, would promise the compiler that this does not happen. So none is
//! made, but by [`GuestMapping::receive`], [`GuestMapping::fetch`] and [`GuestMapping::clear`], before
//! the guest runs there.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;

use super::RamFile;
use crate::core::layout::PAGE_SIZE;

/// Bytes that are read at a time, so that their checksum is taken while a core's cache has them.
const RECEIVE_BYTES: usize = 256 * 1024;

/// What a page is compared with.
static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// A shared, writable mapping of a part of a [`RamFile`].
#[derive(Debug)]
pub struct GuestMapping {
    memory: MmapRaw,
    /// What makes pages present that can be written at once.
    to_be_writable: Advice,
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
        let to_be_writable = if file.is_tmpfs() {
            Advice::PopulateRead
        } else {
            Advice::PopulateWrite
        };
        Ok(Self {
            memory,
            to_be_writable,
        })
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
        self.populate(Advice::PopulateWrite, start, from.len())?;
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
        // SAFETY: ranges that are received at the same time never overlap, and until the guest is
        // given over nothing else touches its RAM: this is the only access.
        let memory = unsafe { self.exclusive(bytes) }?;
        for chunk in memory.chunks_mut(RECEIVE_BYTES) {
            from.read_exact(chunk)?;
            // While it is in the cache.
            hasher.update(chunk);
        }
        Ok(())
    }

    /// Fills bytes with what `from` has at `offset`, in one copy.
    ///
    /// The pages must be [present](Self::make_present), and no guest may run in them yet.
    pub fn fetch(&self, bytes: Range<u64>, from: &File, offset: u64) -> io::Result<()> {
        // SAFETY: as in `receive`.
        let memory = unsafe { self.exclusive(bytes) }?;
        from.read_exact_at(memory, offset)
    }

    /// Makes pages zero, and writes only those that are not.
    ///
    /// The pages must be [present](Self::make_present), and no guest may run in them yet.
    pub fn clear(&self, bytes: Range<u64>) -> io::Result<()> {
        // SAFETY: RAM is cleared before anything is received, each part of it by one thread, and no
        // guest runs in it: this is the only access.
        let memory = unsafe { self.exclusive(bytes) }?;
        for page in memory.chunks_mut(PAGE_SIZE) {
            if *page != ZERO_PAGE[..page.len()] {
                page.fill(0);
            }
        }
        Ok(())
    }

    /// Some of the memory, as nobody else's.
    ///
    /// # Safety
    /// As long as the slice lives nothing else touches these bytes: no thread of ours, and no VMM.
    #[allow(clippy::mut_from_ref)] // that is the caller's promise
    unsafe fn exclusive(&self, bytes: Range<u64>) -> io::Result<&mut [u8]> {
        let start = usize::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let end = usize::try_from(bytes.end).map_err(|_| Errno::EOVERFLOW)?;
        if start > end || end > self.byte_len() {
            return Err(Errno::EFAULT.into());
        }
        // SAFETY: `start` is within the mapping, by the check above.
        let place = unsafe { self.memory.as_mut_ptr().add(start) };
        // SAFETY: `place` has `end - start` bytes of mapping behind it, which stay mapped as long as
        // `self`; the caller promises that this is the only access.
        Ok(unsafe { std::slice::from_raw_parts_mut(place, end - start) })
    }

    /// Has pages mapped that the file holds, to be written without a fault. Fails where there is no
    /// room for one.
    ///
    /// On tmpfs a page that is mapped by reading can be written at once, and reading maps sixteen pages
    /// at a fault: a GiB takes 0.09 s of CPU, and 0.23 s by writing. Another file system wants to know
    /// of the first write to a page.
    pub fn make_present(&self, bytes: Range<u64>) -> io::Result<()> {
        let start = usize::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let length = bytes.end.checked_sub(bytes.start).ok_or(Errno::EINVAL)?;
        let length = usize::try_from(length).map_err(|_| Errno::EOVERFLOW)?;
        self.populate(self.to_be_writable, start, length)
    }

    /// Makes pages present: touching one for which there is no room would be a `SIGBUS`, and this is
    /// an error. They stay, since nobody takes pages away while a guest is being received.
    fn populate(&self, how: Advice, start: usize, length: usize) -> io::Result<()> {
        match self.memory.advise_range(how, start, length) {
            Err(error) if error.raw_os_error() == Some(Errno::EFAULT as i32) => {
                Err(Errno::ENOSPC.into())
            }
            outcome => outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = 512;

    /// Page faults of this thread that needed no I/O.
    fn faults() -> u64 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        fields.split_whitespace().nth(7).unwrap().parse().unwrap()
    }

    #[test]
    fn what_is_present_is_written_without_a_fault() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = std::fs::File::create_new(folder.path().join("ram")).unwrap();
        let old = vec![7; PAGES * PAGE_SIZE];
        file.write_all_at(&old, 0).unwrap();
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(folder.path().join("ram"))
            .unwrap();
        let file = RamFile::from_file(file).unwrap();
        let all = 0..file.byte_len();
        let mapping = GuestMapping::new(&file, &all).unwrap();
        mapping.make_present(all.clone()).unwrap();
        let before = faults();
        mapping.clear(all.clone()).unwrap();
        let mut hasher = crc32fast::Hasher::new();
        mapping
            .receive(all, &mut std::io::repeat(9), &mut hasher)
            .unwrap();
        let taken = faults() - before;
        assert!(taken < PAGES as u64 / 8, "{taken} faults");
        let mut page = [0; PAGE_SIZE];
        file.read((PAGES as u64 - 1) * PAGE_SIZE as u64, &mut page)
            .unwrap();
        assert_eq!(page, [9; PAGE_SIZE]);
    }
}
