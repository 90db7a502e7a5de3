//! Page frames: many runs of pages, told by a table, then the data of those that have any.
//!
//! How a run's bytes are told is its record's [`Encoding`]; whether the data of all records was made
//! smaller for the link is the frame's [`Packing`].
//!
//! A receiver reads the bytes straight into guest RAM, before it can know the frame's checksum. So
//! the table has a checksum of its own, and no address is used before that fits: what a corrupted
//! frame can spoil are the pages that it names, at a target that then gives up, and never others.
//! Packed data is
//! checked, unpacked and compared with the length that the table tells before any page is touched.

mod builder;
pub mod delta;
mod packing;

pub use self::builder::{DeltaBuffer, PageFrame, Zeros};
pub(crate) use self::packing::Unpacker;
pub use self::packing::{Effort, Packer, Packing};
use std::ops::RangeInclusive;

use crate::error::Error;
use crate::frame::{Header, Kind, array};
use crate::limits::{
    MAX_DELTA_BYTES, MAX_PAGE_DATA, MAX_RAW_PAGES, MAX_RECORDS, MAX_SHARED_PAGES, MAX_ZERO_PAGES,
    PAGE_BYTES, PAGE_NUMBER_END,
};
use crate::message::Round;

/// Length in bytes of what comes before the table: round (u32), number of records (u16), packing
/// (u8), a reserved byte, CRC32 of these and the table. The whole payload of a round's end is as
/// long.
pub(crate) const PREFIX_BYTES: usize = 12;

/// Length in bytes of a record in the table.
pub(crate) const RECORD_BYTES: usize = 24;

/// How long a delta may be, in bytes.
const DELTA_BYTES: RangeInclusive<usize> = delta::FIXED_BYTES..=MAX_DELTA_BYTES;

/// How a run's bytes are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Encoding {
    /// All zeros: no bytes.
    Zero,
    /// As they are.
    Raw,
    /// By how they differ from what was sent before: see [`delta`]. One page.
    Delta {
        /// Length of the delta in bytes.
        bytes: u32,
    },
    /// Not at all: the receiver takes them from where the sender has them, as they are then. Only
    /// within one host, once both have agreed on
    /// [`Features::NEAR`](crate::message::Features::NEAR).
    Shared,
}

impl Encoding {
    fn number(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Raw => 1,
            Self::Delta { .. } => 2,
            Self::Shared => 3,
        }
    }

    fn parse(found: u8, data_bytes: u32) -> Result<Self, Error> {
        match found {
            0 => Ok(Self::Zero),
            1 => Ok(Self::Raw),
            2 => Ok(Self::Delta { bytes: data_bytes }),
            3 => Ok(Self::Shared),
            found => Err(Error::UnknownEncoding { found }),
        }
    }

    fn max_pages(self) -> u32 {
        match self {
            Self::Zero => MAX_ZERO_PAGES,
            Self::Raw => MAX_RAW_PAGES,
            Self::Delta { .. } => 1,
            Self::Shared => MAX_SHARED_PAGES,
        }
    }
}

/// A run of pages of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The region, by its position in the offer.
    pub region: u16,
    /// The first page, counted from the region's start in units of
    /// [`PAGE_BYTES`].
    pub first: u64,
    /// How many pages: at least one.
    pub count: u32,
}

/// A run of pages and how its bytes are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The pages.
    pub run: PageRun,
    /// How their bytes are told.
    pub encoding: Encoding,
}

impl Record {
    /// Length in bytes of its data, unpacked.
    pub fn data_bytes(&self) -> u64 {
        match self.encoding {
            Encoding::Zero | Encoding::Shared => 0,
            Encoding::Raw => u64::from(self.run.count) * PAGE_BYTES as u64,
            Encoding::Delta { bytes } => bytes.into(),
        }
    }

    fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let data_bytes = u32::try_from(self.data_bytes()).unwrap_or(u32::MAX);
        bytes[0..2].copy_from_slice(&self.run.region.to_le_bytes());
        bytes[2] = self.encoding.number();
        bytes[4..8].copy_from_slice(&self.run.count.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.run.first.to_le_bytes());
        bytes[16..20].copy_from_slice(&data_bytes.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let kind = Kind::Pages;
        let data_bytes = u32::from_le_bytes(array(bytes, 16));
        let record = Self {
            run: PageRun {
                region: u16::from_le_bytes(array(bytes, 0)),
                first: u64::from_le_bytes(array(bytes, 8)),
                count: u32::from_le_bytes(array(bytes, 4)),
            },
            encoding: Encoding::parse(bytes[2], data_bytes)?,
        };
        record.check()?;
        let reserved = u32::from(bytes[3]) | u32::from_le_bytes(array(bytes, 20));
        if reserved != 0 {
            return Err(Error::BadReserved {
                kind,
                found: reserved,
            });
        }
        if u64::from(data_bytes) != record.data_bytes() {
            return Err(Error::WrongDataLength {
                needed: record.data_bytes(),
                found: data_bytes.into(),
            });
        }
        Ok(record)
    }

    fn check(&self) -> Result<(), Error> {
        let kind = Kind::Pages;
        let PageRun { first, count, .. } = self.run;
        if count == 0 || count > self.encoding.max_pages() {
            return Err(Error::BadField {
                kind,
                field: "the number of pages in a record",
                found: count.into(),
            });
        }
        if first > PAGE_NUMBER_END - u64::from(count) {
            return Err(Error::BadField {
                kind,
                field: "the first page of a record",
                found: first,
            });
        }
        if let Encoding::Delta { bytes } = self.encoding
            && !DELTA_BYTES.contains(&(bytes as usize))
        {
            return Err(Error::BadField {
                kind,
                field: "the length of a delta",
                found: bytes.into(),
            });
        }
        Ok(())
    }
}

/// The fixed part of a page frame's payload, as it came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix {
    pub(crate) round: Round,
    /// Length of the table in bytes, within its limit.
    pub(crate) table_bytes: usize,
    /// Length of the data in bytes as it travels, within its limit.
    pub(crate) wire_bytes: usize,
    /// How the data was packed.
    pub(crate) packing: Option<Packing>,
    table_crc: u32,
}

impl Prefix {
    pub(crate) fn parse(header: &Header, bytes: &[u8; PREFIX_BYTES]) -> Result<Self, Error> {
        let kind = Kind::Pages;
        let round = u32::from_le_bytes(array(bytes, 0));
        let records = usize::from(u16::from_le_bytes(array(bytes, 4)));
        let reserved = bytes[7];
        if reserved != 0 {
            return Err(Error::BadReserved {
                kind,
                found: reserved.into(),
            });
        }
        if records == 0 || records > MAX_RECORDS {
            return Err(Error::BadField {
                kind,
                field: "the number of records",
                found: records as u64,
            });
        }
        let table_bytes = records * RECORD_BYTES;
        let rest = (header.length as usize).checked_sub(PREFIX_BYTES + table_bytes);
        let wire_bytes = rest.ok_or(Error::ShortPayload { kind })?;
        Ok(Self {
            round: parse_round(kind, round)?,
            table_bytes,
            wire_bytes,
            packing: Packing::parse(bytes[6])?,
            table_crc: u32::from_le_bytes(array(bytes, 8)),
        })
    }

    /// Replaces `records` by those of `table`, all of them checked, and returns the length of their
    /// data in bytes, within its limit.
    pub(crate) fn parse_table(
        &self,
        header: &Header,
        prefix: &[u8; PREFIX_BYTES],
        table: &[u8],
        records: &mut Vec<Record>,
    ) -> Result<usize, Error> {
        header.verify(table_hasher(prefix, table), self.table_crc)?;
        records.clear();
        for bytes in table.chunks_exact(RECORD_BYTES) {
            records.push(Record::parse(bytes)?);
        }
        let needed: u64 = records.iter().map(Record::data_bytes).sum();
        let found = self.wire_bytes as u64;
        let fits = match self.packing {
            None => needed == found,
            // What is not smaller travels as it is.
            Some(_) => found > 0 && found < needed && needed <= MAX_PAGE_DATA as u64,
        };
        match usize::try_from(needed) {
            Ok(needed) if fits => Ok(needed),
            _ => Err(Error::WrongDataLength { needed, found }),
        }
    }
}

pub(crate) fn parse_round(kind: Kind, found: u32) -> Result<Round, Error> {
    if found == 0 {
        return Err(Error::BadField {
            kind,
            field: "the round",
            found: 0,
        });
    }
    Ok(Round(found))
}

fn table_hasher(prefix: &[u8], table: &[u8]) -> crc32fast::Hasher {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&prefix[..PREFIX_BYTES - 4]);
    hasher.update(table);
    hasher
}
