//! Guest RAM in shared files, as [`Ram`].

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread;

use super::mapping::GuestMapping;
use super::page_bits::Claim;
use super::{Access, RamFile};
use crate::core::layout::{Layout, LayoutError, PAGE_SIZE, PageRange, Region, RegionIndex};
use crate::vmm::{Ram, RamWindow, VmmError};

/// Bytes that move at once between a stream and guest RAM: small enough to stay in a core's cache
/// between the two copies, large enough that a system call for each does not count.
const CHUNK_BYTES: usize = 256 * 1024;

/// Threads that look for old bytes in the target's RAM.
const BLANK_THREADS: u64 = 2;

/// What one thread looks through before another has started.
const PIECE_BYTES: u64 = 1024 * 1024;

/// What a blank page is compared with, and written from.
static ZEROS: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

thread_local! {
    /// Each page worker's buffer, made once and used for every chunk.
    static CHUNK: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK_BYTES]);
}

/// One region of guest RAM: a part of a file.
#[derive(Debug)]
pub struct RamPart {
    /// The region's name, equal at source and target.
    pub name: String,
    /// The file that holds it.
    pub file: RamFile,
    /// Which bytes of the file, whole pages of its backing.
    pub bytes: Range<u64>,
}

/// Why a list of parts cannot serve as guest RAM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The parts are no layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The file is shorter than the part of it that the guest has.
    #[error(
        "the file behind RAM region {name:?} has {file_bytes} bytes, {wanted_bytes} are needed"
    )]
    FileTooShort {
        /// The region.
        name: String,
        /// Length of the file.
        file_bytes: u64,
        /// Where the region ends in it.
        wanted_bytes: u64,
    },
    /// The part is not made of whole pages of its backing.
    #[error("RAM region {name:?} does not start and end with a page of {page_bytes} bytes")]
    PartialPage {
        /// The region.
        name: String,
        /// Page size of the backing.
        page_bytes: u32,
    },
    /// The file could not be mapped.
    #[error("mapping RAM region {name:?} failed")]
    Map {
        /// The region.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A region with the means to get at its bytes.
#[derive(Debug)]
struct Backing {
    name: String,
    file: RamFile,
    bytes: Range<u64>,
    /// At the target: for receiving without a copy in between, and for writing to hugetlbfs, which
    /// knows no `write`.
    mapping: Option<GuestMapping>,
    /// What the mapping has present: data that the file held when it was blanked. The rest is
    /// allocated by writing, which fails in an orderly way when there is no room.
    present: OnceLock<Vec<Range<u64>>>,
    /// Held by the thread that writes to the file, which locks it for all others.
    writing: Mutex<()>,
}

/// Guest RAM in shared files.
#[derive(Debug)]
pub struct SharedRam {
    layout: Layout,
    /// One for each region, in the layout's order.
    backings: Vec<Backing>,
}

impl SharedRam {
    /// Checks the parts and puts them in the order of the layout. All files have been opened for
    /// `access`.
    pub fn new(mut parts: Vec<RamPart>, access: Access) -> Result<Self, RamError> {
        parts.iter().try_for_each(check_part)?;
        let layout = Layout::new(parts.iter().map(region_of).collect())?;
        parts.sort_by(|a, b| a.name.cmp(&b.name));
        let backings = parts
            .into_iter()
            .map(|part| Backing::new(part, access))
            .collect::<Result<_, _>>()?;
        Ok(Self { layout, backings })
    }

    /// Checks a range and turns it into bytes of a backing's file.
    fn place(
        &self,
        region: RegionIndex,
        range: PageRange,
        buffer_len: Option<usize>,
    ) -> Result<(&Backing, Range<u64>), VmmError> {
        let fits = self.layout.contains(region, range)
            && buffer_len.is_none_or(|length| length as u64 == range.byte_len());
        let backing = self.backings.get(usize::from(region.0)).filter(|_| fits);
        let Some(backing) = backing else {
            return Err(VmmError::Unfit {
                what: format!(
                    "{} pages from page {} of {region} are no part of guest RAM, or another number \
                     of bytes was given for them",
                    range.count, range.first.0
                ),
            });
        };
        let within = range.bytes();
        let start = backing.bytes.start;
        Ok((backing, start + within.start..start + within.end))
    }
}

impl Ram for SharedRam {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, region: RegionIndex, range: PageRange, into: &mut [u8]) -> Result<(), VmmError> {
        let (backing, bytes) = self.place(region, range, Some(into.len()))?;
        let outcome = backing.file.read(bytes.start, into);
        outcome.map_err(|error| backing.failure("reading", error))
    }

    fn populated(
        &self,
        region: RegionIndex,
        range: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), VmmError> {
        let (backing, bytes) = self.place(region, range, None)?;
        let Range { start, end } = backing.bytes;
        let outcome = backing.file.data_extents_in_full(bytes, |extent| {
            found(PageRange::covering(
                extent.start - start..extent.end.min(end) - start,
            ));
            Ok(())
        });
        outcome.map_err(|error| backing.failure("looking for the data of", error))
    }

    fn windows(&self) -> Option<Vec<RamWindow>> {
        let windows = self.backings.iter().map(|backing| {
            Some(RamWindow::new(
                backing.file.reader()?,
                backing.bytes.clone(),
            ))
        });
        windows.collect()
    }

    fn blank(&self) -> Result<(), VmmError> {
        for backing in &self.backings {
            let outcome = backing.blank_all();
            outcome.map_err(|error| backing.failure("clearing", error))?;
        }
        Ok(())
    }

    fn allocate(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        let (backing, bytes) = self.place(region, range, None)?;
        let outcome = backing.allocate(&bytes);
        outcome.map_err(|error| backing.failure("allocating", error))
    }

    fn write(&self, region: RegionIndex, range: PageRange, from: &[u8]) -> Result<(), VmmError> {
        let (backing, bytes) = self.place(region, range, Some(from.len()))?;
        let _claim = backing.claim(&bytes)?;
        let outcome = backing.write(bytes.start, from);
        outcome.map_err(|error| backing.failure("writing", error))
    }

    fn receive(
        &self,
        region: RegionIndex,
        range: PageRange,
        from: &mut dyn io::Read,
        seed: crc32fast::Hasher,
    ) -> Result<crc32fast::Hasher, VmmError> {
        let (backing, bytes) = self.place(region, range, None)?;
        let mut hasher = seed;
        let mut claim = backing.claim(&bytes)?;
        if let (Some(mapping), Some(claim)) = (backing.present_at(&bytes), &mut claim) {
            let outcome = mapping.receive(claim, from, &mut hasher);
            return outcome
                .map(|()| hasher)
                .map_err(|error| VmmError::io("reading pages", error));
        }
        let outcome = in_chunks(bytes, |offset, chunk| {
            from.read_exact(chunk).map_err(ReceiveError::Stream)?;
            hasher.update(chunk);
            backing.write(offset, chunk).map_err(ReceiveError::Ram)
        });
        match outcome {
            Ok(()) => Ok(hasher),
            Err(ReceiveError::Stream(error)) => Err(VmmError::io("reading pages", error)),
            Err(ReceiveError::Ram(error)) => Err(backing.failure("writing", error)),
        }
    }

    fn fetch(
        &self,
        region: RegionIndex,
        range: PageRange,
        window: &RamWindow,
    ) -> Result<(), VmmError> {
        let (backing, bytes) = self.place(region, range, None)?;
        let within = range.bytes();
        let theirs = window.bytes.end.checked_sub(window.bytes.start);
        if theirs.is_none_or(|length| length < within.end) {
            return Err(VmmError::Unfit {
                what: format!("{range} of {region} lie outside what the source shares"),
            });
        }
        let mut claim = backing.claim(&bytes)?;
        if let (Some(mapping), Some(claim)) = (backing.present_at(&bytes), &mut claim) {
            let outcome = mapping.fetch(claim, window, within.start);
            return outcome.map_err(|error| backing.failure("fetching", error));
        }
        let outcome = backing.fetch(bytes, window, within.start);
        outcome.map_err(|error| backing.failure("fetching", error))
    }

    fn zero(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError> {
        let (backing, bytes) = self.place(region, range, None)?;
        let _claim = backing.claim(&bytes)?;
        let outcome = backing.blank(bytes);
        outcome.map_err(|error| backing.failure("clearing", error))
    }
}

/// Which side failed while bytes moved from a stream to guest RAM.
enum ReceiveError {
    Stream(io::Error),
    Ram(io::Error),
}

impl Backing {
    fn new(part: RamPart, access: Access) -> Result<Self, RamError> {
        let RamPart { name, file, bytes } = part;
        let mapping = match access {
            Access::ReadWrite => GuestMapping::new(&file, &bytes).map(Some),
            Access::Read => Ok(None),
        };
        match mapping {
            Ok(mapping) => Ok(Self {
                name,
                file,
                bytes,
                mapping,
                present: OnceLock::new(),
                writing: Mutex::default(),
            }),
            Err(source) => Err(RamError::Map { name, source }),
        }
    }

    /// Where bytes of the file are in the mapping.
    fn within(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start - self.bytes.start..bytes.end - self.bytes.start
    }

    /// Takes pages that are to be written, at the target; nobody writes without the mapping.
    fn claim(&self, bytes: &Range<u64>) -> Result<Option<Claim<'_>>, VmmError> {
        let Some(mapping) = &self.mapping else {
            return Ok(None);
        };
        let claim = mapping.claim(self.within(bytes));
        claim.map(Some).map_err(|error| {
            let name = &self.name;
            VmmError::io(
                format!("pages of RAM region {name:?} come twice at once"),
                error,
            )
        })
    }

    /// The mapping, when it has all of `bytes` present.
    fn present_at(&self, bytes: &Range<u64>) -> Option<&GuestMapping> {
        let mapping = self.mapping.as_ref()?;
        if mapping.is_present_ahead(&self.within(bytes)) {
            return Some(mapping);
        }
        let extents = self.present.get()?;
        let next = extents.partition_point(|extent| extent.end <= bytes.start);
        let extent = extents.get(next)?;
        let whole = extent.start <= bytes.start && bytes.end <= extent.end;
        Some(mapping).filter(|_| whole)
    }

    /// Makes room for pages, through the mapping: page faults do not lock the file as writing and
    /// `fallocate` do, so that those who do this hold up nobody who places pages, not even when they are
    /// preempted in the middle of it.
    fn allocate(&self, bytes: &Range<u64>) -> io::Result<()> {
        let mapping = self.mapping.as_ref();
        match mapping.filter(|_| self.present_at(bytes).is_none()) {
            Some(mapping) => mapping.make_present_ahead(&self.within(bytes)),
            None => Ok(()),
        }
    }

    /// Makes all of it read as zeros, like [`Backing::blank`].
    fn blank_all(&self) -> io::Result<()> {
        if let Some(mapping) = self.mapping.as_ref().filter(|_| !self.file.is_hugetlb())
            && let Ok(extents) = self.map_zeros(mapping)
        {
            _ = self.present.set(extents);
            return Ok(());
        }
        in_pieces(&self.bytes, |bytes| self.blank(bytes))
    }

    /// Maps what the file holds, so that nobody waits for that when pages come, and clears it there,
    /// which takes a third of the time that reading it takes. Where the kernel does not map ahead
    /// everything still works without.
    fn map_zeros(&self, mapping: &GuestMapping) -> io::Result<Vec<Range<u64>>> {
        let mut extents = Vec::new();
        self.file.data_extents(self.bytes.clone(), |extent| {
            extents.push(extent);
            Ok(())
        })?;
        for extent in &extents {
            in_pieces(extent, |piece| {
                let within = self.within(&piece);
                mapping.make_present(within.clone())?;
                mapping.clear(&mut mapping.claim(within)?)
            })?;
        }
        Ok(extents)
    }

    /// Writes to the file, or through the mapping where the file knows no `write`, and where another
    /// thread writes to it at this moment: it would keep this one waiting, with its core. To allocate
    /// pages through the mapping takes longer than `write` does, since they are cleared before; but not
    /// as long as waiting. Measured on 2 cores, two threads, a GiB of tmpfs that is not allocated: 0.33 s
    /// so and 0.40 s if both write to the file, medians of three.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let Some(mapping) = &self.mapping else {
            return self.file.write(offset, from);
        };
        let within = offset - self.bytes.start;
        mapping.touch(&(within..within + from.len() as u64));
        if self.file.is_hugetlb() {
            return mapping.write(within, from);
        }
        match self.writing.try_lock() {
            // Where the kernel cannot map ahead, or there is no room, the file does, or tells which.
            Err(TryLockError::WouldBlock) if self.file.is_tmpfs() => mapping
                .write(within, from)
                .or_else(|_| self.file.write(offset, from)),
            // What a panic has left is nothing but the lock.
            _held => self.file.write(offset, from),
        }
    }

    /// Makes bytes of the file read as zeros. Holes stay holes, and what is allocated stays allocated:
    /// RAM that was allocated ahead of time stays so, with the VMM's page tables as they are, which
    /// punching would undo. What is zero already is not written.
    fn blank(&self, bytes: Range<u64>) -> io::Result<()> {
        self.file.data_extents(bytes, |extent| {
            in_chunks(extent, |offset, chunk| {
                self.file.read(offset, chunk)?;
                let zeros = &ZEROS[..chunk.len()];
                if *chunk == *zeros {
                    Ok(())
                } else {
                    self.write(offset, zeros)
                }
            })
        })
    }

    /// Makes bytes of the file what `window` has from `from` on. Where that is zero nothing is allocated.
    fn fetch(&self, bytes: Range<u64>, window: &RamWindow, from: u64) -> io::Result<()> {
        // Cleared once the chunk's buffer is free again: clearing takes one as well.
        let mut zeros: Vec<Range<u64>> = Vec::new();
        in_chunks(bytes.clone(), |offset, chunk| {
            let theirs = from + (offset - bytes.start);
            window.read(theirs, chunk)?;
            let (mut at, mut rest) = (offset, &*chunk);
            while let Some((run, is_zero)) = alike(rest) {
                let end = at + run.len() as u64;
                match zeros.last_mut().filter(|last| last.end == at) {
                    _ if !is_zero => self.write(at, run)?,
                    Some(last) => last.end = end,
                    None => zeros.push(at..end),
                }
                (at, rest) = (end, &rest[run.len()..]);
            }
            Ok::<_, io::Error>(())
        })?;
        zeros.into_iter().try_for_each(|zeros| self.blank(zeros))
    }

    fn failure(&self, what: &str, error: io::Error) -> VmmError {
        let name = &self.name;
        match error.kind() {
            io::ErrorKind::StorageFull => VmmError::io(
                format!("no room for RAM region {name:?}: the file system behind it is full"),
                error,
            ),
            _ => VmmError::io(format!("{what} RAM region {name:?} failed"), error),
        }
    }
}

/// The first pages of `bytes` that are all zero, or of which none is, and which; none of no bytes.
fn alike(bytes: &[u8]) -> Option<(&[u8], bool)> {
    let mut pages = bytes
        .chunks(PAGE_SIZE)
        .map(|page| *page == ZEROS[..page.len()]);
    let is_zero = pages.next()?;
    let more = pages.take_while(|other| *other == is_zero).count();
    let length = bytes.len().min((1 + more) * PAGE_SIZE);
    Some((&bytes[..length], is_zero))
}

fn check_part(part: &RamPart) -> Result<(), RamError> {
    let page_bytes = part.file.backing_page_bytes();
    let whole = |offset: u64| offset.is_multiple_of(page_bytes.into());
    if part.bytes.end > part.file.byte_len() {
        return Err(RamError::FileTooShort {
            name: part.name.clone(),
            file_bytes: part.file.byte_len(),
            wanted_bytes: part.bytes.end,
        });
    }
    if !whole(part.bytes.start) || !whole(part.bytes.end) {
        return Err(RamError::PartialPage {
            name: part.name.clone(),
            page_bytes,
        });
    }
    Ok(())
}

fn region_of(part: &RamPart) -> Region {
    Region {
        name: part.name.clone(),
        bytes: part.bytes.end.saturating_sub(part.bytes.start),
        backing_page_bytes: part.file.backing_page_bytes(),
    }
}

/// Calls `each` for one chunk of `bytes` after the other, with its offset and a buffer of its length.
fn in_chunks<E>(
    bytes: Range<u64>,
    mut each: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    CHUNK.with_borrow_mut(|buffer| {
        let mut offset = bytes.start;
        while offset < bytes.end {
            let rest = usize::try_from(bytes.end - offset).unwrap_or(usize::MAX);
            let length = rest.min(buffer.len());
            each(offset, &mut buffer[..length])?;
            offset += length as u64;
        }
        Ok(())
    })
}

/// Calls `work` for pieces of `bytes`, whole pages each, in threads of their own if it is worth them.
fn in_pieces(
    bytes: &Range<u64>,
    work: impl Fn(Range<u64>) -> io::Result<()> + Sync,
) -> io::Result<()> {
    if bytes.end - bytes.start <= PIECE_BYTES {
        return work(bytes.clone());
    }
    let piece = (bytes.end - bytes.start).div_ceil(BLANK_THREADS);
    let piece = piece.next_multiple_of(PAGE_SIZE as u64);
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..BLANK_THREADS)
            .map(|index| {
                let start = (bytes.start + index * piece).min(bytes.end);
                let end = (start + piece).min(bytes.end);
                scope.spawn(move || work(start..end))
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}
