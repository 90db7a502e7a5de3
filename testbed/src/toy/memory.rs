//! Guest RAM in memfds, and the dirty log of whoever writes it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ferry_engine::core::layout::{Layout, PAGE_SIZE, PageRange, RegionIndex};
use ferry_engine::vmm::{Begun, Found, Fresh, Ram, RamWindow, Rearm, Tracker, VmmError};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek64};

use super::fault::{Call, Faults};

/// The RAM of one toy.
#[derive(Debug)]
pub(super) struct Memory {
    layout: Layout,
    files: Vec<File>,
    log: DirtyLog,
    /// Whether another engine on this host may read it.
    lends: AtomicBool,
    faults: Arc<Faults>,
}

impl Memory {
    pub(super) fn new(layout: Layout, faults: Arc<Faults>) -> io::Result<Self> {
        let files = layout.iter().map(|(_, region)| {
            let file = File::from(memfd_create(&*region.name, MFdFlags::MFD_CLOEXEC)?);
            file.set_len(region.bytes)?;
            Ok(file)
        });
        Ok(Self {
            files: files.collect::<io::Result<_>>()?,
            log: DirtyLog::new(&layout),
            lends: AtomicBool::new(false),
            layout,
            faults,
        })
    }

    /// From now on another engine on this host may read it.
    pub(super) fn lend(&self) {
        self.lends.store(true, Ordering::SeqCst);
    }

    pub(super) fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// What the guest reads.
    pub(super) fn load(&self, region: u16, page: u64, into: &mut [u8; PAGE_SIZE]) {
        let offset = page * PAGE_SIZE as u64;
        self.files[usize::from(region)]
            .read_exact_at(into, offset)
            .expect("a page within a memfd can be read");
    }

    /// What the guest writes. The log comes after the bytes: a collection that misses the mark would
    /// otherwise be followed by a read that misses the bytes.
    pub(super) fn store(&self, region: u16, page: u64, from: &[u8; PAGE_SIZE]) {
        let offset = page * PAGE_SIZE as u64;
        self.files[usize::from(region)]
            .write_all_at(from, offset)
            .expect("a page within a memfd can be written");
        self.log.mark(region, page);
    }

    fn file(&self, region: RegionIndex, range: PageRange) -> Result<&File, VmmError> {
        if !self.layout.contains(region, range) {
            let what = format!("{range} of {region} are not this toy's");
            return Err(VmmError::Unfit { what });
        }
        Ok(&self.files[usize::from(region.0)])
    }
}

impl Ram for Memory {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, region: RegionIndex, range: PageRange, into: &mut [u8]) -> Result<(), VmmError> {
        self.faults.hit(Call::Read)?;
        self.file(region, range)?
            .read_exact_at(into, range.first.byte_offset())
            .map_err(|error| VmmError::io("reading guest RAM", error))
    }

    fn populated(
        &self,
        region: RegionIndex,
        range: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), VmmError> {
        self.faults.hit(Call::Populated)?;
        let file = self.file(region, range)?;
        let mut at = range.bytes().start;
        while at < range.bytes().end
            && let Some(data) = seek(file, at, Whence::SeekData)?
            && data < range.bytes().end
        {
            let end = seek(file, data, Whence::SeekHole)?.unwrap_or(range.bytes().end);
            found(PageRange::covering(data..end));
            at = end;
        }
        Ok(())
    }

    fn windows(&self) -> Option<Vec<RamWindow>> {
        if !self.lends.load(Ordering::SeqCst) {
            return None;
        }
        let windows = self.files.iter().zip(self.layout.iter());
        let windows = windows.map(|(file, (_, region))| {
            // Opened anew: what is given away cannot be written through.
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            Some(RamWindow::new(File::open(path).ok()?, 0..region.bytes))
        });
        windows.collect()
    }

    fn blank(&self) -> Result<(), VmmError> {
        self.faults.hit(Call::Blank)?;
        for (index, region) in self.layout.iter() {
            let file = &self.files[usize::from(index.0)];
            file.set_len(0)
                .and_then(|()| file.set_len(region.bytes))
                .map_err(|error| VmmError::io("blanking guest RAM", error))?;
        }
        Ok(())
    }

    fn allocate(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        self.faults.hit(Call::Allocate)?;
        let file = self.file(region, range)?;
        let bytes = [range.first.byte_offset(), range.byte_len()];
        let [start, length] = bytes.map(|number| i64::try_from(number).unwrap_or(i64::MAX));
        fallocate(file, FallocateFlags::empty(), start, length)
            .map_err(|errno| VmmError::io("allocating guest RAM", errno.into()))
    }

    fn write(&self, region: RegionIndex, range: PageRange, from: &[u8]) -> Result<(), VmmError> {
        self.faults.hit(Call::Write)?;
        self.file(region, range)?
            .write_all_at(from, range.first.byte_offset())
            .map_err(|error| VmmError::io("writing guest RAM", error))
    }

    fn receive(
        &self,
        region: RegionIndex,
        range: PageRange,
        from: &mut dyn io::Read,
        mut seed: crc32fast::Hasher,
    ) -> Result<crc32fast::Hasher, VmmError> {
        self.faults.hit(Call::Receive)?;
        let file = self.file(region, range)?;
        let mut page = [0; PAGE_SIZE];
        for number in range.first.0..range.end().0 {
            from.read_exact(&mut page)
                .map_err(|error| VmmError::io("receiving a page", error))?;
            seed.update(&page);
            file.write_all_at(&page, number * PAGE_SIZE as u64)
                .map_err(|error| VmmError::io("placing a page", error))?;
        }
        Ok(seed)
    }

    fn fetch(
        &self,
        region: RegionIndex,
        range: PageRange,
        window: &RamWindow,
    ) -> Result<(), VmmError> {
        self.faults.hit(Call::Fetch)?;
        let file = self.file(region, range)?;
        let mut page = [0; PAGE_SIZE];
        for number in range.first.0..range.end().0 {
            let offset = number * PAGE_SIZE as u64;
            window
                .file
                .read_exact_at(&mut page, window.bytes.start + offset)
                .map_err(|error| VmmError::io("fetching a page", error))?;
            file.write_all_at(&page, offset)
                .map_err(|error| VmmError::io("placing a page", error))?;
        }
        Ok(())
    }

    fn zero(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        self.faults.hit(Call::Zero)?;
        let file = self.file(region, range)?;
        for number in range.first.0..range.end().0 {
            file.write_all_at(&[0; PAGE_SIZE], number * PAGE_SIZE as u64)
                .map_err(|error| VmmError::io("clearing a page", error))?;
        }
        Ok(())
    }
}

/// Where data, or a hole, begins at or after `at`; nothing at the end of the file.
fn seek(file: &File, at: u64, whence: Whence) -> Result<Option<u64>, VmmError> {
    let offset = i64::try_from(at).unwrap_or(i64::MAX);
    match lseek64(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(errno) => Err(VmmError::io("looking for holes in guest RAM", errno.into())),
    }
}

/// One bit for each page, in words that are collected atomically.
#[derive(Debug)]
pub(super) struct DirtyLog {
    on: AtomicBool,
    words: Vec<Vec<AtomicU64>>,
}

impl DirtyLog {
    fn new(layout: &Layout) -> Self {
        let words = layout.iter().map(|(_, region)| {
            let words = region.pages().div_ceil(u64::from(u64::BITS));
            (0..words).map(|_| AtomicU64::new(0)).collect()
        });
        Self {
            on: AtomicBool::new(false),
            words: words.collect(),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    #[allow(clippy::cast_possible_truncation)] // a toy's RAM fits in this host's
    fn mark(&self, region: u16, page: u64) {
        if self.is_on() {
            let word = &self.words[usize::from(region)][(page / u64::from(u64::BITS)) as usize];
            word.fetch_or(1 << (page % u64::from(u64::BITS)), Ordering::SeqCst);
        }
    }

    #[allow(clippy::cast_possible_truncation)] // a toy's RAM fits in this host's
    fn is_marked(&self, region: u16, page: u64) -> bool {
        let word = &self.words[usize::from(region)][(page / u64::from(u64::BITS)) as usize];
        word.load(Ordering::SeqCst) >> (page % u64::from(u64::BITS)) & 1 == 1
    }

    fn clear(&self) {
        for word in self.words.iter().flatten() {
            word.store(0, Ordering::SeqCst);
        }
    }

    fn take(&self, layout: &Layout, found: &mut dyn FnMut(Found)) {
        for ((index, region), words) in layout.iter().zip(&self.words) {
            for (base, word) in (0..).step_by(u64::BITS as usize).zip(words) {
                let bits = word.swap(0, Ordering::SeqCst);
                for bit in (0..u64::from(u64::BITS)).filter(|bit| bits >> bit & 1 == 1) {
                    found(Found::Written(index, PageRange::new(base + bit, 1)));
                }
            }
            found(Found::Through(index, region.all()));
        }
    }
}

/// The log, as the engine drives it.
pub(super) struct LogTracker {
    pub(super) memory: Arc<Memory>,
    pub(super) faults: Arc<Faults>,
}

impl Tracker for LogTracker {
    /// The log covers all RAM as soon as it is on; it is told in pieces all the same, and of the last
    /// region nothing is told at all.
    fn start(&mut self, begun: &mut dyn FnMut(Begun)) -> Result<(), VmmError> {
        self.faults.hit(Call::TrackerStart)?;
        self.memory.log.clear();
        self.memory.log.on.store(true, Ordering::SeqCst);
        let regions = self.memory.layout.iter();
        let told = self.memory.layout.iter().count().saturating_sub(1).max(1);
        for (index, region) in regions.take(told) {
            let half = region.pages() / 2;
            let upper = PageRange::new(half, region.pages() - half);
            begun(Begun::Watched(index, upper));
            begun(Begun::Watched(index, PageRange::new(0, half)));
        }
        Ok(())
    }

    fn collect(&mut self, _rearm: Rearm, found: &mut dyn FnMut(Found)) -> Result<(), VmmError> {
        self.faults.hit(Call::Collect)?;
        self.memory.log.take(&self.memory.layout, found);
        Ok(())
    }

    fn fresh(&self) -> Result<Arc<dyn Fresh>, VmmError> {
        Ok(Arc::new(LogLook(Arc::clone(&self.memory))))
    }

    fn stop(&mut self) -> Result<(), VmmError> {
        self.faults.hit(Call::TrackerStop)?;
        self.memory.log.on.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// The log, looked at.
struct LogLook(Arc<Memory>);

impl Fresh for LogLook {
    fn written(
        &self,
        region: RegionIndex,
        range: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), VmmError> {
        let pages = range.first.0..range.end().0;
        pages
            .filter(|&page| self.0.log.is_marked(region.0, page))
            .for_each(|page| found(PageRange::new(page, 1)));
        Ok(())
    }
}
