//! Page frames: many runs of pages, told by a table, then the bytes of those that have any.
//!
//! A receiver reads the bytes straight into guest RAM, before it can know the frame's checksum. So
//! the table has a checksum of its own, and no address is used before that fits: what a corrupted
//! frame can spoil are the pages that it names, which come again, and never others.

mod builder;

pub use self::builder::{PageFrame, Zeros};
use crate::error::Error;
use crate::frame::{Header, Kind, array};
use crate::limits::{MAX_RAW_PAGES, MAX_RECORDS, MAX_ZERO_PAGES, PAGE_BYTES, PAGE_NUMBER_END};
use crate::message::Round;

/// Length in bytes of what comes before the table: round (u32), number of records (u32), CRC32 of
/// these two and the table. The whole payload of a round's end is as long.
pub(crate) const PREFIX_BYTES: usize = 12;

/// Length in bytes of a record in the table.
pub(crate) const RECORD_BYTES: usize = 24;

/// How a run's bytes travel. 2 is set aside for compressed pages, 3 for deltas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Encoding {
    /// All zeros: no bytes.
    Zero,
    /// As they are.
    Raw,
}

impl Encoding {
    fn number(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Raw => 1,
        }
    }

    fn parse(found: u8) -> Result<Self, Error> {
        match found {
            0 => Ok(Self::Zero),
            1 => Ok(Self::Raw),
            found => Err(Error::UnknownEncoding { found }),
        }
    }

    fn max_pages(self) -> u32 {
        match self {
            Self::Zero => MAX_ZERO_PAGES,
            Self::Raw => MAX_RAW_PAGES,
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

/// A run of pages and how its bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The pages.
    pub run: PageRun,
    /// How their bytes travel.
    pub encoding: Encoding,
}

impl Record {
    /// Length in bytes of its data in the frame.
    pub fn data_bytes(&self) -> u64 {
        match self.encoding {
            Encoding::Zero => 0,
            Encoding::Raw => u64::from(self.run.count) * PAGE_BYTES as u64,
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
        let record = Self {
            run: PageRun {
                region: u16::from_le_bytes(array(bytes, 0)),
                first: u64::from_le_bytes(array(bytes, 8)),
                count: u32::from_le_bytes(array(bytes, 4)),
            },
            encoding: Encoding::parse(bytes[2])?,
        };
        record.check()?;
        let reserved = u32::from(bytes[3]) | u32::from_le_bytes(array(bytes, 20));
        if reserved != 0 {
            return Err(Error::BadReserved {
                kind,
                found: reserved,
            });
        }
        let data_bytes = u64::from(u32::from_le_bytes(array(bytes, 16)));
        if data_bytes != record.data_bytes() {
            return Err(Error::WrongDataLength {
                needed: record.data_bytes(),
                found: data_bytes,
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
        Ok(())
    }
}

/// The fixed part of a page frame's payload, as it came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix {
    pub(crate) round: Round,
    /// Length of the table in bytes, within its limit.
    pub(crate) table_bytes: usize,
    /// Length of the data in bytes, within its limit.
    pub(crate) data_bytes: u64,
    table_crc: u32,
}

impl Prefix {
    pub(crate) fn parse(header: &Header, bytes: &[u8; PREFIX_BYTES]) -> Result<Self, Error> {
        let kind = Kind::Pages;
        let round = u32::from_le_bytes(array(bytes, 0));
        let records = u32::from_le_bytes(array(bytes, 4)) as usize;
        if records == 0 || records > MAX_RECORDS {
            return Err(Error::BadField {
                kind,
                field: "the number of records",
                found: records as u64,
            });
        }
        let table_bytes = records * RECORD_BYTES;
        let rest = (header.length as usize).checked_sub(PREFIX_BYTES + table_bytes);
        let data_bytes = rest.ok_or(Error::ShortPayload { kind })? as u64;
        Ok(Self {
            round: parse_round(kind, round)?,
            table_bytes,
            data_bytes,
            table_crc: u32::from_le_bytes(array(bytes, 8)),
        })
    }

    /// Replaces `records` by those of `table`, all of them checked.
    pub(crate) fn parse_table(
        &self,
        header: &Header,
        prefix: &[u8; PREFIX_BYTES],
        table: &[u8],
        records: &mut Vec<Record>,
    ) -> Result<(), Error> {
        header.verify(table_hasher(prefix, table), self.table_crc)?;
        records.clear();
        for bytes in table.chunks_exact(RECORD_BYTES) {
            records.push(Record::parse(bytes)?);
        }
        let needed = records.iter().map(Record::data_bytes).sum();
        if needed != self.data_bytes {
            return Err(Error::WrongDataLength {
                needed,
                found: self.data_bytes,
            });
        }
        Ok(())
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
