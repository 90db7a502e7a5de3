//! Page frames: many runs of pages, told by a table, then the bytes of those that have any.
//!
//! A receiver reads the bytes straight into guest RAM, before it can know the frame's checksum. So
//! the table has a checksum of its own, and no address is used before that fits: what a corrupted
//! frame can spoil are the pages that it names, which come again, and never others.

use std::io::IoSlice;

use crate::error::Error;
use crate::frame::{HEADER_BYTES, Header, Kind, Position, array};
use crate::limits::{
    MAX_PAGE_DATA, MAX_RAW_PAGES, MAX_RECORDS, MAX_ZERO_PAGES, PAGE_BYTES, PAGE_NUMBER_END,
};
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

/// What becomes of pages that were found to be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// A zero record tells of them.
    Tell,
    /// Nothing does: the target is known to have zeros there.
    Skip,
}

/// Where `head` holds the prefix.
const PREFIX_AT: usize = HEADER_BYTES;

/// Where `head` holds the table.
const TABLE_AT: usize = HEADER_BYTES + PREFIX_BYTES;

/// A page frame in the making. Its buffers are allocated once and used again for frame after frame.
///
/// The data is copied into it once, from guest RAM, and leaves it in the same write as the table:
/// the checksum is over this copy, since guest RAM changes underneath.
#[derive(Debug)]
pub struct PageFrame {
    round: Round,
    /// Header, prefix and table. The first two are filled in when the frame is sealed.
    head: Vec<u8>,
    data: Box<[u8]>,
    /// How many bytes of `data` are in use.
    used: usize,
    /// Pages of all records.
    pages: u64,
    /// The last record, if it is a raw one.
    last_raw: Option<PageRun>,
}

impl PageFrame {
    /// A frame with room for the bytes of `raw_pages` pages, at most [`MAX_RAW_PAGES`] and at least
    /// one. [`PageFrame::begin`] comes next.
    pub fn new(raw_pages: u32) -> Self {
        let raw_pages = raw_pages.clamp(1, MAX_RAW_PAGES) as usize;
        let mut frame = Self {
            round: Round(0),
            head: Vec::with_capacity(TABLE_AT + MAX_RECORDS * RECORD_BYTES),
            data: vec![0; raw_pages * PAGE_BYTES].into(),
            used: 0,
            pages: 0,
            last_raw: None,
        };
        frame.begin(Round(1));
        frame
    }

    /// Empties the frame and begins another, of pages of `round`.
    pub fn begin(&mut self, round: Round) {
        self.round = round;
        self.head.clear();
        self.head.resize(TABLE_AT, 0);
        self.used = 0;
        self.pages = 0;
        self.last_raw = None;
    }

    /// How many pages [`PageFrame::push_raw`] takes now.
    pub fn raw_room(&self) -> u32 {
        if self.records_left() == 0 {
            return 0;
        }
        let pages = (self.data.len() - self.used) / PAGE_BYTES;
        u32::try_from(pages).unwrap_or(MAX_RAW_PAGES)
    }

    /// How many pages [`PageFrame::push_zero`] takes now.
    pub fn zero_room(&self) -> u32 {
        if self.records_left() == 0 {
            0
        } else {
            MAX_ZERO_PAGES
        }
    }

    /// Adds a run of zero pages.
    pub fn push_zero(&mut self, run: PageRun) -> Result<(), Error> {
        if self.records_left() == 0 {
            return Err(Error::FrameFull { count: run.count });
        }
        let record = Record {
            run,
            encoding: Encoding::Zero,
        };
        record.check()?;
        self.append(record);
        Ok(())
    }

    /// Adds a run of pages and gives the place for their bytes, which holds anything until the
    /// caller has copied them there.
    pub fn push_raw(&mut self, run: PageRun) -> Result<&mut [u8], Error> {
        if run.count > self.raw_room() {
            return Err(Error::FrameFull { count: run.count });
        }
        let record = Record {
            run,
            encoding: Encoding::Raw,
        };
        record.check()?;
        self.append(record);
        let start = self.used;
        self.used += run.count as usize * PAGE_BYTES;
        self.last_raw = Some(run);
        Ok(&mut self.data[start..self.used])
    }

    /// Looks for zero pages in the run pushed last, once its bytes are there, and takes their bytes
    /// out of the frame again. Returns how many they were.
    ///
    /// Zero pages stay as bytes when the table has no room to tell the run in pieces.
    pub fn elide_zeros(&mut self, zeros: Zeros) -> u64 {
        let Some(run) = self.last_raw.take() else {
            return 0;
        };
        let start = self.used - run.count as usize * PAGE_BYTES;
        let any_zero = self.data[start..self.used]
            .chunks_exact(PAGE_BYTES)
            .any(is_zero);
        if !any_zero {
            return 0;
        }
        self.head.truncate(self.head.len() - RECORD_BYTES);
        self.pages -= u64::from(run.count);
        self.used = start;
        let mut elided = 0;
        let mut done = 0;
        while done < run.count {
            let (count, encoding) = self.next_piece(start, run, done);
            let piece = PageRun {
                region: run.region,
                first: run.first + u64::from(done),
                count,
            };
            match encoding {
                Encoding::Zero => elided += u64::from(count),
                Encoding::Raw => self.keep(start + done as usize * PAGE_BYTES, count),
            }
            if encoding == Encoding::Raw || zeros == Zeros::Tell {
                self.append(Record {
                    run: piece,
                    encoding,
                });
            }
            done += count;
        }
        elided
    }

    /// The pages of `run`, whose bytes began at `start`, from its page `done` on that are alike:
    /// their number and encoding. All the rest, raw, when this is the last record.
    fn next_piece(&self, start: usize, run: PageRun, done: u32) -> (u32, Encoding) {
        let bytes = start + done as usize * PAGE_BYTES..start + run.count as usize * PAGE_BYTES;
        let mut pages = self.data[bytes].chunks_exact(PAGE_BYTES).map(is_zero);
        let zero = pages.next().unwrap_or(false);
        let alike = pages.take_while(|other| *other == zero).count();
        let count = 1 + u32::try_from(alike).unwrap_or(MAX_RAW_PAGES);
        if self.records_left() == 1 && done + count < run.count {
            return (run.count - done, Encoding::Raw);
        }
        let encoding = if zero { Encoding::Zero } else { Encoding::Raw };
        (count, encoding)
    }

    /// Moves the bytes of `count` pages from `from` to the end of those in use.
    fn keep(&mut self, from: usize, count: u32) {
        let length = count as usize * PAGE_BYTES;
        if from != self.used {
            self.data.copy_within(from..from + length, self.used);
        }
        self.used += length;
    }

    /// True when there is no record in it.
    pub fn is_empty(&self) -> bool {
        self.head.len() == TABLE_AT
    }

    /// The round that its pages belong to.
    pub fn round(&self) -> Round {
        self.round
    }

    /// Pages of all its records, zero pages included.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Length in bytes of the whole frame as it travels.
    pub fn wire_bytes(&self) -> u64 {
        (self.head.len() + self.used) as u64
    }

    /// Fills in header and checksums for a frame at `position`; the slices, one after the other,
    /// are what travels.
    pub(crate) fn seal(&mut self, position: Position) -> Result<[IoSlice<'_>; 2], Error> {
        let records = (self.head.len() - TABLE_AT) / RECORD_BYTES;
        let records = u32::try_from(records).unwrap_or(u32::MAX);
        let length = self.head.len() - HEADER_BYTES + self.used;
        let header = Header::new(Kind::Pages, position, length)?;
        let (fixed, table) = self.head.split_at_mut(TABLE_AT);
        let prefix = &mut fixed[PREFIX_AT..];
        prefix[0..4].copy_from_slice(&self.round.0.to_le_bytes());
        prefix[4..8].copy_from_slice(&records.to_le_bytes());
        let table_crc = table_hasher(prefix, table).finalize();
        prefix[8..12].copy_from_slice(&table_crc.to_le_bytes());
        let data = &self.data[..self.used];
        let mut hasher = header.seed();
        hasher.update(prefix);
        hasher.update(table);
        hasher.update(data);
        fixed[..HEADER_BYTES].copy_from_slice(&header.to_bytes(hasher.finalize()));
        Ok([IoSlice::new(&self.head), IoSlice::new(data)])
    }

    fn records_left(&self) -> usize {
        MAX_RECORDS - (self.head.len() - TABLE_AT) / RECORD_BYTES
    }

    fn append(&mut self, record: Record) {
        self.head.extend_from_slice(&record.to_bytes());
        self.pages += u64::from(record.run.count);
        self.last_raw = None;
    }
}

fn is_zero(page: &[u8]) -> bool {
    // A comparison with a constant page is a memcmp: it ends at the first difference, and is fast
    // without optimisation too.
    static ZERO: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    page == ZERO
}

const _: () = assert!(MAX_PAGE_DATA == MAX_RAW_PAGES as usize * PAGE_BYTES);
