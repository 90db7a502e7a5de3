//! The target's RAM, mapped: the way to fill it without a copy in between, and the only one where
//! files cannot be written, which is hugetlbfs.
//!
//! The memory is shared with another process, which may write it at any time. A Rust reference to it,
//! `&[u8]` as much as `&mut [u8]`, would promise the compiler that this does not happen. So none is
//! made, but by `receive`, `fetch` and `clear` of [`GuestMapping`], and they may for two reasons.
//!
//! The other process does not touch it: a VMM that waits for a guest neither runs one nor loads one, and
//! every thread of ours has ended before it does.
//!
//! No other thread of ours touches the same pages, whatever a peer sends: who places pages, or clears
//! them, claims them first, and whoever comes to a page that is claimed gets an error. Between honest peers that never happens, since within a round a page travels once, and is sent
//! again only after the lane was fenced that had it. A lane may bring pages before the target has said
//! Prepared, and finds blank RAM all the same: RAM is blanked before the first connection is taken.
//!
//! A copy in between would need no such promise of threads of ours, and costs more. Measured over
//! loopback, two lanes, seconds of CPU of the receivers for a GiB with a sum over it, medians of seven
//! runs in turn: straight into place 0.48; through a buffer of 128 to 512 KiB and from there by
//! `rep movsb` 0.53, by `memcpy` 0.53, by relaxed atomic words 0.51; of 32 KiB 0.67.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;

use super::RamFile;
use super::page_bits::{Claim, PageBits};
use crate::core::layout::PAGE_SIZE;
use crate::vmm::RamWindow;

/// Bytes that are read at a time, so that their checksum is taken while a core's cache has them.
const RECEIVE_BYTES: usize = 256 * 1024;

/// What a page is compared with.
static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// A shared, writable mapping of a part of a [`RamFile`].
#[derive(Debug)]
pub struct GuestMapping {
    memory: MmapRaw,
    /// Pages that a thread places or clears at this moment.
    claims: PageBits,
    /// Pages that were made present ahead of their coming.
    ahead: OnceLock<PageBits>,
    /// Pages that may hold something else than what they held when they were blanked.
    touched: PageBits,
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
            claims: PageBits::new(memory.len() as u64),
            ahead: OnceLock::new(),
            touched: PageBits::new(memory.len() as u64),
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

    /// Takes pages for the calling thread until the claim is dropped. Fails with `EBUSY` when another
    /// one has a page of them.
    pub(super) fn claim(&self, bytes: Range<u64>) -> io::Result<Claim<'_>> {
        if bytes.end > self.byte_len() as u64 {
            return Err(Errno::EFAULT.into());
        }
        let claim = self.claims.claim(bytes);
        claim.ok_or_else(|| Errno::EBUSY.into())
    }

    /// Fills what is claimed with what `from` gives, and tells `hasher` of it.
    ///
    /// The pages must be [present](Self::make_present), and no guest may run in them yet.
    pub(super) fn receive(
        &self,
        claim: &mut Claim<'_>,
        from: &mut dyn io::Read,
        hasher: &mut crc32fast::Hasher,
    ) -> io::Result<()> {
        self.touch(claim.bytes());
        let memory = self.exclusive(claim)?;
        for chunk in memory.chunks_mut(RECEIVE_BYTES) {
            from.read_exact(chunk)?;
            // While it is in the cache.
            hasher.update(chunk);
        }
        Ok(())
    }

    /// Whoever writes to pages by another way than through this mapping says so before.
    pub(super) fn touch(&self, bytes: &Range<u64>) {
        self.touched.set(bytes);
    }

    /// Fills what is claimed with what `from` has at `offset`, in one copy. Where both are zero nothing is
    /// written, nor read of what was never touched.
    ///
    /// The pages must have been blanked and be [present](Self::make_present), and no guest may run in them
    /// yet.
    pub(super) fn fetch(
        &self,
        claim: &mut Claim<'_>,
        from: &RamWindow,
        offset: u64,
    ) -> io::Result<()> {
        let bytes = claim.bytes().clone();
        let Some(view) = from.view(offset..offset + (bytes.end - bytes.start)) else {
            self.touch(&bytes);
            return from.read(offset, self.exclusive(claim)?);
        };
        let was_blank = !self.touched.has_any(&bytes);
        let memory = self.exclusive(claim)?;
        let mut is_blank = true;
        for (at, page) in (offset..)
            .step_by(PAGE_SIZE)
            .zip(memory.chunks_mut(PAGE_SIZE))
        {
            if !view.is_zero(at)? {
                if is_blank {
                    is_blank = false;
                    self.touch(&bytes);
                }
                view.read(at, page)?;
            } else if !was_blank && *page != ZERO_PAGE[..page.len()] {
                page.fill(0);
            }
        }
        Ok(())
    }

    /// Makes what is claimed zero, and writes only those pages that are not.
    ///
    /// The pages must be [present](Self::make_present), and no guest may run in them yet.
    pub(super) fn clear(&self, claim: &mut Claim<'_>) -> io::Result<()> {
        let memory = self.exclusive(claim)?;
        for page in memory.chunks_mut(PAGE_SIZE) {
            if *page != ZERO_PAGE[..page.len()] {
                page.fill(0);
            }
        }
        Ok(())
    }

    /// What is claimed, as nobody else's.
    fn exclusive<'a>(&'a self, claim: &'a mut Claim<'_>) -> io::Result<&'a mut [u8]> {
        let bytes = claim.bytes();
        let start = usize::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let end = usize::try_from(bytes.end).map_err(|_| Errno::EOVERFLOW)?;
        if start > end || end > self.byte_len() || !claim.is_of(&self.claims) {
            return Err(Errno::EFAULT.into());
        }
        // SAFETY: `start` is within the mapping, by the check above.
        let place = unsafe { self.memory.as_mut_ptr().add(start) };
        // SAFETY: `place` has `end - start` bytes of mapping behind it, which stay mapped as long as
        // `self`. This is the only access: threads of ours touch what they have claimed, the claim is
        // this mapping's and borrowed as long as the slice lives, and no guest runs there.
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

    /// Makes room for pages that will come, and maps them, to be received without a fault. They read as
    /// before. Fails where there is no room.
    pub fn make_present_ahead(&self, bytes: &Range<u64>) -> io::Result<()> {
        let start = usize::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let length = bytes.end.checked_sub(bytes.start).ok_or(Errno::EINVAL)?;
        let length = usize::try_from(length).map_err(|_| Errno::EOVERFLOW)?;
        self.populate(Advice::PopulateWrite, start, length)?;
        let ahead = || PageBits::new(self.byte_len() as u64);
        self.ahead.get_or_init(ahead).set(bytes);
        Ok(())
    }

    /// True when all of `bytes` was made present ahead.
    pub fn is_present_ahead(&self, bytes: &Range<u64>) -> bool {
        self.ahead.get().is_some_and(|ahead| ahead.contains(bytes))
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
    use std::os::unix::fs::FileExt as _;

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
        let mut claim = mapping.claim(all).unwrap();
        mapping.clear(&mut claim).unwrap();
        let mut hasher = crc32fast::Hasher::new();
        mapping
            .receive(&mut claim, &mut std::io::repeat(9), &mut hasher)
            .unwrap();
        let taken = faults() - before;
        assert!(taken < PAGES as u64 / 8, "{taken} faults");
        let mut page = [0; PAGE_SIZE];
        file.read((PAGES as u64 - 1) * PAGE_SIZE as u64, &mut page)
            .unwrap();
        assert_eq!(page, [9; PAGE_SIZE]);
    }
}
