//! Guest RAM from outside, and the status page in it.
//!
//! Only ever with `pread`, and only where there is data: a look through a mapping would allocate
//! the holes that a migration's target must keep. Private RAM is read through `/proc/PID/mem`, and
//! what is there is asked of `/proc/PID/pagemap`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::fields::{Field, MAGIC, VERSION};
use crate::{PAGE_SIZE, TestbedError};

/// Read at once while searching.
const CHUNK: usize = 256 * PAGE_SIZE;

/// What the kernel counts allocated blocks in.
const BLOCK_BYTES: u64 = 512;

/// Bytes for each page in `/proc/PID/pagemap`, and the bits of a page that is there or swapped out.
const ENTRY_BYTES: usize = size_of::<u64>();
const ALLOCATED: u64 = 0b11 << 62;

/// One piece of guest RAM. A file is kept open and can be read also after its QEMU has gone; private
/// memory goes with its QEMU.
#[derive(Clone, Debug)]
pub struct Ram {
    path: PathBuf,
    file: Arc<File>,
    private: Option<Arc<Private>>,
}

/// Where in a process the RAM is.
#[derive(Debug)]
struct Private {
    pagemap: File,
    addresses: Range<u64>,
}

impl Ram {
    /// Opens a RAM file for reading.
    pub fn open(path: &Path) -> Result<Self, TestbedError> {
        let file =
            File::open(path).map_err(TestbedError::io(format!("open {}", path.display())))?;
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(file),
            private: None,
        })
    }

    /// Opens the private RAM called `name` that lies at `addresses` of a process.
    pub(crate) fn in_process(
        pid: u32,
        name: &str,
        addresses: Range<u64>,
    ) -> Result<Self, TestbedError> {
        let open = |path: String| File::open(&path).map_err(TestbedError::io(path));
        Ok(Self {
            path: name.into(),
            file: Arc::new(open(format!("/proc/{pid}/mem"))?),
            private: Some(Arc::new(Private {
                pagemap: open(format!("/proc/{pid}/pagemap"))?,
                addresses,
            })),
        })
    }

    /// Its path, as long as its QEMU lives; of private RAM, the name of its back end.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub fn len(&self) -> Result<u64, TestbedError> {
        match &self.private {
            Some(private) => Ok(private.addresses.end - private.addresses.start),
            None => Ok(self.file.metadata().map_err(self.error())?.len()),
        }
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> Result<bool, TestbedError> {
        Ok(self.len()? == 0)
    }

    /// Bytes that are allocated: holes cost nothing.
    pub fn allocated_bytes(&self) -> Result<u64, TestbedError> {
        let Some(private) = &self.private else {
            return Ok(self.file.metadata().map_err(self.error())?.blocks() * BLOCK_BYTES);
        };
        let mut pages = 0;
        private
            .each_entry(|_, entry| pages += u64::from(entry & ALLOCATED != 0))
            .map_err(self.error())?;
        Ok(pages * PAGE_SIZE as u64)
    }

    /// The offset of the first page that differs from the other's, if one does.
    pub fn first_difference(&self, other: &Self) -> Result<Option<u64>, TestbedError> {
        let end = self.len()?;
        if end != other.len()? {
            return Ok(Some(end.min(other.len()?)));
        }
        let (mut ours, mut theirs) = (vec![0; CHUNK], vec![0; CHUNK]);
        for at in (0..end).step_by(CHUNK) {
            let length = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
            self.read_at(at, &mut ours[..length])?;
            other.read_at(at, &mut theirs[..length])?;
            if ours[..length] != theirs[..length] {
                let pages = ours.chunks(PAGE_SIZE).zip(theirs.chunks(PAGE_SIZE));
                let same = pages.take_while(|(ours, theirs)| ours == theirs).count();
                return Ok(Some(at + (same * PAGE_SIZE) as u64));
            }
        }
        Ok(None)
    }

    /// Reads bytes at `offset`; holes read as zeros and stay holes.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), TestbedError> {
        let start = self
            .private
            .as_ref()
            .map_or(0, |private| private.addresses.start);
        self.file
            .read_exact_at(into, start + offset)
            .map_err(self.error())
    }

    /// Calls `look` for chunks of pages, with their offset, wherever there is data.
    pub fn each_chunk(&self, mut look: impl FnMut(u64, &[u8])) -> Result<(), TestbedError> {
        if let Some(private) = &self.private {
            let mut there = Vec::new();
            private
                .each_entry(|offset, entry| {
                    if entry & ALLOCATED != 0 {
                        there.push(offset);
                    }
                })
                .map_err(self.error())?;
            let mut page = [0; PAGE_SIZE];
            for offset in there {
                self.read_at(offset, &mut page)?;
                look(offset, &page);
            }
            return Ok(());
        }
        let end = self.len()?;
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while let Some(data) = self.seek(at, Whence::SeekData)? {
            let hole = self.seek(data, Whence::SeekHole)?.unwrap_or(end);
            at = data;
            while at < hole {
                let length = usize::try_from(hole - at).map_or(CHUNK, |left| left.min(CHUNK));
                self.read_at(at, &mut buffer[..length])?;
                look(at, &buffer[..length]);
                at += length as u64;
            }
        }
        Ok(())
    }

    /// Finds the status page of the guest that booted last, if any is here.
    pub fn find_status(&self) -> Result<Option<StatusPage>, TestbedError> {
        let mut found: Vec<StatusPage> = Vec::new();
        self.each_chunk(|offset, chunk| {
            for (at, page) in chunk.chunks_exact(PAGE_SIZE).enumerate() {
                if [word(page, 0), word(page, 8)] == MAGIC {
                    found.push(StatusPage {
                        ram: self.clone(),
                        offset: offset + (at * PAGE_SIZE) as u64,
                    });
                }
            }
        })?;
        let mut newest = None;
        for page in found {
            let status = page.read()?;
            let booted = status.value(Field::BootedAtNs);
            let is_newer = newest.as_ref().is_none_or(|&(_, last)| booted > last);
            if status.value(Field::Version) == VERSION && is_newer {
                newest = Some((page, booted));
            }
        }
        Ok(newest.map(|(page, _)| page))
    }

    /// The status page, when it is known to be at `offset`.
    pub fn status_at(&self, offset: u64) -> StatusPage {
        StatusPage {
            ram: self.clone(),
            offset,
        }
    }

    fn seek(&self, from: u64, whence: Whence) -> Result<Option<u64>, TestbedError> {
        let from = i64::try_from(from).expect("a file offset fits in i64");
        match lseek(&*self.file, from, whence) {
            Ok(at) => Ok(Some(
                u64::try_from(at).expect("lseek answers no negative offset"),
            )),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(self.error()(errno.into())),
        }
    }

    fn error(&self) -> impl FnOnce(io::Error) -> TestbedError + use<> {
        TestbedError::io(format!("read {}", self.path.display()))
    }
}

impl Private {
    /// Calls `look` with the offset of every page and what the kernel says of it.
    fn each_entry(&self, mut look: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut entries = vec![0; CHUNK / PAGE_SIZE * ENTRY_BYTES];
        let size = PAGE_SIZE as u64;
        for chunk in self.addresses.clone().step_by(CHUNK) {
            let pages = (self.addresses.end - chunk) / size;
            let length = usize::try_from(pages)
                .map_or(entries.len(), |left| entries.len().min(left * ENTRY_BYTES));
            let at = chunk / size * ENTRY_BYTES as u64;
            self.pagemap.read_exact_at(&mut entries[..length], at)?;
            let offsets = (chunk - self.addresses.start..).step_by(PAGE_SIZE);
            for (offset, entry) in offsets.zip(entries[..length].chunks_exact(ENTRY_BYTES)) {
                look(offset, word(entry, 0));
            }
        }
        Ok(())
    }
}

/// Where a guest's status page is.
#[derive(Clone, Debug)]
pub struct StatusPage {
    ram: Ram,
    offset: u64,
}

impl StatusPage {
    /// Offset of the page in its RAM file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The RAM that it is in.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The same place in the RAM of another machine: where this guest will count on after a move.
    #[must_use]
    pub fn in_ram(&self, ram: &Ram) -> Self {
        Self {
            ram: ram.clone(),
            offset: self.offset,
        }
    }

    /// Reads all counters.
    pub fn read(&self) -> Result<Status, TestbedError> {
        let mut page = [0; PAGE_SIZE];
        self.ram.read_at(self.offset, &mut page)?;
        Ok(Status(page))
    }

    /// Reads one counter.
    pub fn value(&self, field: Field) -> Result<u64, TestbedError> {
        let mut bytes = [0; size_of::<u64>()];
        self.ram.read_at(self.offset + field as u64, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// A guest's counters at one moment.
#[derive(Clone, Debug)]
pub struct Status([u8; PAGE_SIZE]);

impl Status {
    /// One counter.
    pub fn value(&self, field: Field) -> u64 {
        word(&self.0, field as usize)
    }

    /// Pages and disk blocks found bad, and disk operations that failed: what must be zero.
    pub fn faults(&self) -> u64 {
        [Field::Bad, Field::DiskBad, Field::DiskErrors]
            .map(|field| self.value(field))
            .iter()
            .sum()
    }
}

fn word(page: &[u8], at: usize) -> u64 {
    let bytes = page[at..at + size_of::<u64>()]
        .try_into()
        .expect("the slice has the length of a word");
    u64::from_le_bytes(bytes)
}
