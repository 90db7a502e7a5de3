//! Packing: the data of a page frame, of all its records together, made smaller for the link.
//!
//! A frame is packed whole, not page by page: a page compresses far worse alone than with its
//! neighbours, and late in a migration most runs are of one page. Whether its data is bytes of pages
//! or deltas makes no difference.

use std::fmt;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::error::Error;
use crate::limits::MAX_PAGE_DATA;

/// How the data of a page frame was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Packing {
    /// One LZ4 block, without a length in front.
    Lz4,
    /// One Zstandard frame.
    Zstd,
}

impl Packing {
    /// The number of `packing` on the wire; 0 is none.
    pub(super) fn number(packing: Option<Self>) -> u8 {
        match packing {
            None => 0,
            Some(Self::Lz4) => 1,
            Some(Self::Zstd) => 2,
        }
    }

    pub(super) fn parse(found: u8) -> Result<Option<Self>, Error> {
        match found {
            0 => Ok(None),
            1 => Ok(Some(Self::Lz4)),
            2 => Ok(Some(Self::Zstd)),
            found => Err(Error::UnknownPacking { found }),
        }
    }
}

/// How to pack, and how hard to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effort {
    /// LZ4: the fastest.
    Lz4,
    /// Zstandard at a level: 1 is fast, every further one smaller and slower.
    Zstd(u8),
}

impl Effort {
    /// What comes out.
    pub fn packing(self) -> Packing {
        match self {
            Self::Lz4 => Packing::Lz4,
            Self::Zstd(_) => Packing::Zstd,
        }
    }
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd {level}"),
        }
    }
}

/// Packs the data of frames. Large, so that lanes share a few rather than have one each.
#[derive(Default)]
pub struct Packer {
    out: Vec<u8>,
    zstd: Option<(u8, Compressor<'static>)>,
}

impl Packer {
    /// A packer that allocates what it needs at its first use.
    pub fn new() -> Self {
        Self::default()
    }

    /// `data` packed, when that makes it smaller by at least a sixteenth: less is not worth the
    /// receiver's time.
    pub fn pack(&mut self, effort: Effort, data: &[u8]) -> Option<&[u8]> {
        let most = data.len() - data.len() / 16;
        let length = match effort {
            Effort::Lz4 => self.lz4(data)?,
            Effort::Zstd(level) => self.zstd(level, data, most)?,
        };
        (length < most).then(|| &self.out[..length])
    }

    fn lz4(&mut self, data: &[u8]) -> Option<usize> {
        let worst = lz4_flex::block::get_maximum_output_size(data.len());
        self.make_room(worst);
        lz4_flex::block::compress_into(data, &mut self.out).ok()
    }

    /// Gives up once it is clear that the result will be longer than `most`.
    fn zstd(&mut self, level: u8, data: &[u8], most: usize) -> Option<usize> {
        self.make_room(most);
        let kept = self.zstd.take().filter(|(found, _)| *found == level);
        let (_, compressor) = match kept {
            Some(kept) => self.zstd.insert(kept),
            None => self.zstd.insert((level, compressor(level)?)),
        };
        compressor
            .compress_to_buffer(data, &mut self.out[..most])
            .ok()
    }

    fn make_room(&mut self, bytes: usize) {
        if self.out.len() < bytes {
            self.out.resize(bytes, 0);
        }
    }
}

/// Level 1 looks for matches of seven bytes in 512 KiB; guests have shorter ones. With five, text-like
/// pages pack as fast and executables a seventh slower, and both come out smaller, by 1 and 6 %.
fn compressor(level: u8) -> Option<Compressor<'static>> {
    let mut compressor = Compressor::new(i32::from(level)).ok()?;
    if level == 1 {
        compressor.set_parameter(CParameter::MinMatch(5)).ok()?;
    }
    Some(compressor)
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

/// Unpacks the data of frames. Its buffers grow with what comes, to at most [`MAX_PAGE_DATA`] bytes
/// each.
#[derive(Default)]
pub(crate) struct Unpacker {
    packed: Vec<u8>,
    data: Vec<u8>,
    zstd: Option<Decompressor<'static>>,
}

impl Unpacker {
    /// The place for `bytes` packed bytes, which the caller has compared with their limit.
    pub(crate) fn room(&mut self, bytes: usize) -> &mut [u8] {
        debug_assert!(bytes <= MAX_PAGE_DATA);
        self.packed.resize(bytes, 0);
        &mut self.packed
    }

    /// Unpacks what is in the room given last; exactly `needed` bytes must come out.
    pub(crate) fn unpack(&mut self, packing: Packing, needed: usize) -> Result<&[u8], Error> {
        debug_assert!(needed <= MAX_PAGE_DATA);
        self.data.resize(needed, 0);
        let found = match packing {
            Packing::Lz4 => lz4_flex::block::decompress_into(&self.packed, &mut self.data).ok(),
            Packing::Zstd => self.unzstd(),
        };
        match found {
            Some(found) if found == needed => Ok(&self.data),
            found => Err(Error::BadPacking {
                packing,
                needed,
                found,
            }),
        }
    }

    fn unzstd(&mut self) -> Option<usize> {
        let decompressor = match &mut self.zstd {
            Some(decompressor) => decompressor,
            none => none.insert(Decompressor::new().ok()?),
        };
        decompressor
            .decompress_to_buffer(&self.packed, self.data.as_mut_slice())
            .ok()
    }
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}
