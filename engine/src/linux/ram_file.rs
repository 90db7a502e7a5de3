//! The file behind guest RAM.
//!
//! It is opened through the VMM's own descriptors and compared by device and inode with what the VMM
//! has mapped. Never by name: QEMU unlinks its file when the path that it was given is a folder, and
//! names are used again.
//!
//! Bytes go in and out with `pread` and `pwrite`, not through a mapping. Measured on 6.18, in chunks
//! of 256 KiB, seconds of CPU for a GiB of tmpfs:
//!
//! | | system call | mapping, first touch | mapping, mapped |
//! |---|---|---|---|
//! | read | 0.08 | 0.11 | 0.03 |
//! | write, page allocated | 0.14 | 0.38 | 0.04 |
//! | write, page not allocated | 0.4–0.9 | 0.7–1.1 | |
//!
//! Most pages are touched once or twice in a migration, so the page faults of a mapping are never
//! earned back, but by one that is made before anybody waits: the target's, for what is allocated
//! there (see [`SharedRam`](super::SharedRam)). And a system call tells a full file system by an error and not by `SIGBUS`, reads a
//! hole without allocating it, and copies from memory that the guest is writing without any promise
//! to a compiler. Two threads gain nothing over one when writing allocated pages (the inode is
//! locked); they do when reading, and when allocating. Hugetlbfs alone can be written through a
//! mapping only: see [`mapping`](super::mapping).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt as _};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::stat::{FileStat, fstat, major, minor};
use nix::sys::statfs::{HUGETLBFS_MAGIC, Statfs, TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::maps::{self, Device, Mapping};
use super::{Error, Process};
use crate::core::layout::PAGE_SIZE;

/// The unit in which `stat` tells what a file has allocated, whatever the file system's own.
const STAT_BLOCK_BYTES: u64 = 512;

/// What is told to have failed.
const STATFS: &str = "fstatfs of guest RAM";

/// What a [`RamFile`] is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only: the source.
    Read,
    /// Reading and writing: the target.
    ReadWrite,
}

/// A file that holds guest RAM. Stays readable when the process that mapped it is gone.
#[derive(Debug)]
pub struct RamFile {
    file: File,
    byte_len: u64,
    backing_page_bytes: u32,
    is_tmpfs: bool,
}

impl RamFile {
    /// Opens the file that `process` has mapped at `mapping`.
    ///
    /// Fails with [`Error::NoSuchFile`] when the process has no descriptor of it left and the kernel
    /// does not let us go through the mapping itself, which takes `CAP_CHECKPOINT_RESTORE`.
    pub fn open(process: &Process, mapping: &Mapping, access: Access) -> Result<Self, Error> {
        let path = match find_descriptor(process, mapping)? {
            Some(path) => path,
            None => find_first_piece(process, mapping)?,
        };
        let flags = match access {
            Access::Read => OFlag::O_RDONLY,
            Access::ReadWrite => OFlag::O_RDWR,
        };
        let file = match process.open_proc(&path, flags) {
            Ok(file) => file,
            Err(Error::Call { source, .. }) if no_way_through_mapping(&path, &source) => {
                return Err(no_such_file(process, mapping));
            }
            Err(error) => return Err(error),
        };
        let found = Self::from_file(file)?;
        // The descriptor may have been another one's between the look and the opening.
        if is_file_of(&found.stat()?, mapping) {
            Ok(found)
        } else {
            Err(no_such_file(process, mapping))
        }
    }

    /// Takes a file that is known to hold guest RAM, as an embedder has that shares its own.
    pub fn from_file(file: File) -> Result<Self, Error> {
        let byte_len = file
            .metadata()
            .map_err(|error| Error::call("fstat of guest RAM", error))?
            .len();
        let file_system = fstatfs(&file).map_err(|error| Error::call(STATFS, error))?;
        Ok(Self {
            file,
            byte_len,
            backing_page_bytes: backing_page_bytes(&file_system)?,
            is_tmpfs: file_system.filesystem_type() == TMPFS_MAGIC,
        })
    }

    /// Length of the file in bytes, when it was opened.
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// Bytes in a page of the memory behind it.
    pub fn backing_page_bytes(&self) -> u32 {
        self.backing_page_bytes
    }

    /// True when the file lies on hugetlbfs.
    pub fn is_hugetlb(&self) -> bool {
        self.backing_page_bytes as usize != PAGE_SIZE
    }

    /// True when the file lies on tmpfs, or is shared memory without a name.
    pub fn is_tmpfs(&self) -> bool {
        self.is_tmpfs
    }

    /// The file, to be given to another process; none when that could write it, or no descriptor is
    /// left.
    pub fn reader(&self) -> Option<File> {
        if self.access()? != OFlag::O_RDONLY {
            return None;
        }
        self.file.try_clone().ok()
    }

    /// True when it was opened for reading and writing.
    pub(super) fn is_writable(&self) -> bool {
        self.access() == Some(OFlag::O_RDWR)
    }

    fn access(&self) -> Option<OFlag> {
        let flags = fcntl(&self.file, FcntlArg::F_GETFL).ok()?;
        Some(OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE)
    }

    /// Reads exactly `into` from `offset`. Holes read as zeros and stay holes.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Writes all of `from` to `offset`. Fails with [`io::ErrorKind::StorageFull`] when there is no
    /// room for it. Not for hugetlbfs.
    pub fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    /// Tells `found` every extent of `bytes` that may hold anything but zeros, in order. On hugetlbfs,
    /// which cannot tell, that is all of it.
    pub fn data_extents(
        &self,
        bytes: Range<u64>,
        mut found: impl FnMut(Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = bytes.end;
        self.data_extents_in_full(bytes, |extent| found(extent.start..extent.end.min(end)))
    }

    /// The same with the last extent told to its own end, which had to be looked for in any case.
    pub fn data_extents_in_full(
        &self,
        bytes: Range<u64>,
        mut found: impl FnMut(Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        // A walk would look at every page of the file to find what its size tells.
        if !bytes.is_empty() && self.is_fully_allocated()? {
            return found(bytes);
        }
        let mut at = bytes.start;
        while at < bytes.end {
            let Some(start) = self.seek(at, Whence::SeekData)? else {
                break;
            };
            if start >= bytes.end {
                break;
            }
            // A hole may have been punched at `start` meanwhile, which makes `end` equal to it.
            let end = self.seek(start, Whence::SeekHole)?.unwrap_or(bytes.end);
            at = end.max(start + 1);
            found(start..at)?;
        }
        Ok(())
    }

    /// The first place at or after `offset` that may hold anything but zeros; none where only a hole
    /// follows.
    pub(super) fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.seek(offset, Whence::SeekData)
    }

    /// True when the file has no hole.
    pub(super) fn is_fully_allocated(&self) -> io::Result<bool> {
        let allocated = self.file.metadata()?.blocks() * STAT_BLOCK_BYTES;
        Ok(allocated >= self.byte_len)
    }

    /// Which file it is, as mappings name it.
    pub(super) fn identity(&self) -> Result<(Device, u64), Error> {
        self.stat().map(|stat| identity(&stat))
    }

    /// Gives back the memory of `bytes`, which then read as zeros. Fails when the file was opened for
    /// reading alone. What the kernel could not take out of a huge page is zero and stays allocated.
    pub(super) fn punch(&self, bytes: &Range<u64>) -> io::Result<()> {
        let offset = i64::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let length = i64::try_from(bytes.end - bytes.start).map_err(|_| Errno::EOVERFLOW)?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match fallocate(&self.file, flags, offset, length) {
                Err(Errno::EINTR) => {}
                outcome => return Ok(outcome?),
            }
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn stat(&self) -> Result<FileStat, Error> {
        fstat(&self.file).map_err(|error| Error::call("fstat of guest RAM", error))
    }

    /// The next place of a kind at or after `offset`; none behind the last one. Moves the position of
    /// the descriptor, which nothing here uses.
    fn seek(&self, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        match lseek(&self.file, offset, whence) {
            Ok(place) => Ok(Some(place.cast_unsigned())),
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Where below the process's folder in `/proc` a descriptor leads to the file of `mapping`.
///
/// Looks without opening: to open a device or a pipe may do anything.
fn find_descriptor(process: &Process, mapping: &Mapping) -> Result<Option<String>, Error> {
    for fd in process.fds()? {
        let path = format!("fd/{}", fd.0);
        match process.stat_proc(&path) {
            Ok(stat) if is_file_of(&stat, mapping) => return Ok(Some(path)),
            Err(error @ Error::Gone { .. }) => return Err(error),
            // Closed since the list was read, or not that file.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(None)
}

/// Where below the process's folder in `/proc` the mapping itself leads to the file. What was joined
/// by [`maps::runs`] has an entry for each piece.
fn find_first_piece(process: &Process, mapping: &Mapping) -> Result<String, Error> {
    let pieces = maps::of_process(process)?;
    let first = pieces.iter().find(|piece| piece.start == mapping.start);
    let first = first.ok_or_else(|| no_such_file(process, mapping))?;
    Ok(format!("map_files/{:x}-{:x}", first.start, first.end))
}

fn no_way_through_mapping(path: &str, error: &io::Error) -> bool {
    path.starts_with("map_files/")
        && matches!(
            error.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound
        )
}

fn is_file_of(stat: &FileStat, mapping: &Mapping) -> bool {
    identity(stat) == (mapping.device, mapping.inode)
}

fn identity(stat: &FileStat) -> (Device, u64) {
    let device = Device {
        major: major(stat.st_dev),
        minor: minor(stat.st_dev),
    };
    (device, stat.st_ino)
}

fn no_such_file(process: &Process, mapping: &Mapping) -> Error {
    Error::NoSuchFile {
        pid: process.pid(),
        major: mapping.device.major,
        minor: mapping.device.minor,
        inode: mapping.inode,
    }
}

fn backing_page_bytes(file_system: &Statfs) -> Result<u32, Error> {
    let bytes = if file_system.filesystem_type() == HUGETLBFS_MAGIC {
        u32::try_from(file_system.block_size()).ok()
    } else {
        u32::try_from(PAGE_SIZE).ok()
    };
    bytes.ok_or_else(|| Error::call(STATFS, Errno::EOVERFLOW))
}
