//! A source's RAM on this host, mapped to be read.
//!
//! The file could be read as well, but reading looks up every page, and notes that it was used, which
//! takes longer than the copy: 2 GiB of tmpfs, of which a half is zero, take two threads 0.36 s so, and
//! through a mapping 0.20 s, with another 0.03 s to take the mapping down (medians of nine, in turn). A
//! mapping also lets zero pages be found without a copy of them.
//!
//! What a mapping cannot do:
//! - To read a hole of a tmpfs file through a mapping allocates it, and is a `SIGBUS` where there is no
//!   room; so is a page behind the end of the file. Therefore the kernel is asked before whether all
//!   pages of a piece are in memory, and they are read from the file where one is not, or is swapped out.
//!   (To look for a hole by `SEEK_HOLE` would look through all data up to the next one.)
//! - Between that look and the copy a guest may give a page back: it is allocated again, zero. Who cuts the
//!   file short in that moment, which no VMM does with the RAM of its guest, or gives a page back while the
//!   file system is full, ends this process. The guest is at the source then, and stays there.

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::libc::mincore;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use crate::core::layout::PAGE_SIZE;

/// Words of a page that are looked at between two decisions.
const WORDS_AT_ONCE: usize = 8;

/// Pages of which the kernel is asked at a time whether they are in memory.
const PAGES_AT_ONCE: usize = 128;

/// A part of a file, mapped.
#[derive(Debug)]
pub(crate) struct WindowView {
    memory: MmapRaw,
}

impl WindowView {
    /// Maps `bytes` of `file`. Fails for anything but tmpfs: hugetlbfs reserves what is mapped, and of
    /// others it is not known.
    pub(crate) fn new(file: &File, bytes: &Range<u64>) -> io::Result<Self> {
        if fstatfs(file)?.filesystem_type() != TMPFS_MAGIC {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if !bytes.start.is_multiple_of(PAGE_SIZE as u64) {
            return Err(Errno::EINVAL.into());
        }
        let length = bytes.end.checked_sub(bytes.start).ok_or(Errno::EINVAL)?;
        let length = usize::try_from(length).map_err(|_| Errno::EOVERFLOW)?;
        let memory = MmapOptions::new()
            .offset(bytes.start)
            .len(length)
            .map_raw_read_only(file)?;
        // Then nobody notes, when it is taken down, which pages were read: a third of the time.
        memory.advise(Advice::Sequential)?;
        Ok(Self { memory })
    }

    /// Whether every page of `range` is in memory, and so neither a hole nor behind the end of the file.
    pub(crate) fn is_whole(&self, range: &Range<u64>) -> bool {
        let mut pieces = (range.start..range.end).step_by(PAGES_AT_ONCE * PAGE_SIZE);
        pieces.all(|start| {
            let end = range.end.min(start + (PAGES_AT_ONCE * PAGE_SIZE) as u64);
            let Ok(length) = usize::try_from(end - start) else {
                return false;
            };
            let Ok(place) = self.at(start, length) else {
                return false;
            };
            let mut seen = [0; PAGES_AT_ONCE];
            // SAFETY: the kernel writes a byte into `seen` for each page of `length` bytes, of which there
            // are no more than it has; the pages themselves it neither reads nor writes.
            let told = unsafe { mincore(place.cast_mut().cast(), length, seen.as_mut_ptr()) };
            let pages = length.div_ceil(PAGE_SIZE);
            told == 0 && seen[..pages].iter().all(|page| page & 1 != 0)
        })
    }

    /// Whether the page at `offset`, a multiple of its size, is all zeros. Whoever writes it meanwhile may
    /// be seen or not.
    pub(crate) fn is_zero(&self, offset: u64) -> io::Result<bool> {
        #[expect(
            clippy::cast_ptr_alignment,
            reason = "the mapping begins with a page, and so does what is at a multiple of its size"
        )]
        let page = self.at(offset, PAGE_SIZE)?.cast::<u64>();
        if !page.is_aligned() {
            return Err(Errno::EINVAL.into());
        }
        let words = PAGE_SIZE / size_of::<u64>();
        for first in (0..words).step_by(WORDS_AT_ONCE) {
            let seen = (first..first + WORDS_AT_ONCE).fold(0, |seen, word| {
                let place = page.wrapping_add(word);
                // SAFETY: `word` is below the number of words of the page, all of which are mapped, and
                // `page` is aligned. The source's guest may be writing there: so every word is read once,
                // and no reference is made.
                seen | unsafe { place.read_volatile() }
            });
            if seen != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Copies from `offset` as many bytes as `into` has, as they are now.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: `from` has as many bytes of mapping behind it as `into` has; they are no Rust object,
        // so `into` cannot overlap them. The source's guest may be writing there: what comes is torn
        // then, and is sent again.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn at(&self, offset: u64, length: usize) -> io::Result<*const u8> {
        let offset = usize::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let end = offset.checked_add(length).ok_or(Errno::EOVERFLOW)?;
        if end > self.memory.len() {
            return Err(Errno::EFAULT.into());
        }
        // SAFETY: `offset` is within the mapping, by the check above.
        Ok(unsafe { self.memory.as_ptr().add(offset) })
    }
}
