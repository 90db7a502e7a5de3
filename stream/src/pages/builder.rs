//! Making page frames.

use std::io::IoSlice;

use super::{
    Effort, Encoding, PREFIX_BYTES, Packer, Packing, PageRun, RECORD_BYTES, Record, delta,
    table_hasher,
};
use crate::error::Error;
use crate::frame::{HEADER_BYTES, Header, Kind, Position};
use crate::limits::{MAX_DELTA_BYTES, MAX_RAW_PAGES, MAX_RECORDS, MAX_ZERO_PAGES, PAGE_BYTES};
use crate::message::Round;

/// What becomes of pages that were found to be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// A zero record tells of them.
    Tell,
    /// Nothing does: the target is known to have zeros there.
    Skip,
}

/// Room for one delta.
#[derive(Debug)]
pub struct DeltaBuffer([u8; MAX_DELTA_BYTES]);

impl DeltaBuffer {
    /// An empty one.
    #[expect(
        clippy::new_without_default,
        reason = "a large thing is not made in passing"
    )]
    pub fn new() -> Self {
        Self([0; MAX_DELTA_BYTES])
    }
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
    /// How `data` is packed. Nothing can be added to it then.
    packing: Option<Packing>,
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
            packing: None,
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
        self.packing = None;
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
        self.push_bare(run, Encoding::Zero)
    }

    /// Adds a run of at most [`MAX_SHARED_PAGES`](crate::limits::MAX_SHARED_PAGES) pages that the
    /// receiver takes from the sender's own memory.
    pub fn push_shared(&mut self, run: PageRun) -> Result<(), Error> {
        self.push_bare(run, Encoding::Shared)
    }

    /// Adds a run that is told without bytes.
    fn push_bare(&mut self, run: PageRun, encoding: Encoding) -> Result<(), Error> {
        if self.records_left() == 0 {
            return Err(Error::FrameFull { count: run.count });
        }
        let record = Record { run, encoding };
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
            self.last_raw = Some(run);
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
                _ => self.keep(start + done as usize * PAGE_BYTES, count),
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

    /// Tells the page pushed last by how it differs from `base`, which was sent of it before, when
    /// that is much shorter. `scratch` is for the delta. Returns whether it was.
    ///
    /// The page must have been pushed by itself, and its bytes be there.
    pub fn tell_as_delta(&mut self, base: &[u8; PAGE_BYTES], scratch: &mut DeltaBuffer) -> bool {
        let Some(run) = self.last_raw.filter(|run| run.count == 1) else {
            return false;
        };
        let start = self.used - PAGE_BYTES;
        let page = &self.data[start..self.used];
        let Some(length) = delta::encode(base, page, &mut scratch.0) else {
            return false;
        };
        self.data[start..start + length].copy_from_slice(&scratch.0[..length]);
        self.used = start + length;
        self.head.truncate(self.head.len() - RECORD_BYTES);
        self.pages -= 1;
        let bytes = u32::try_from(length).expect("a delta is shorter than a page");
        let encoding = Encoding::Delta { bytes };
        self.append(Record { run, encoding });
        true
    }

    /// The data of its records, one after the other; packed after [`PageFrame::pack`].
    pub fn data(&self) -> &[u8] {
        &self.data[..self.used]
    }

    /// Packs the data when that makes it smaller by enough; returns whether it was. Nothing can be
    /// added to the frame afterwards.
    pub fn pack(&mut self, packer: &mut Packer, effort: Effort) -> bool {
        if self.packing.is_some() {
            return false;
        }
        let Some(packed) = packer.pack(effort, &self.data[..self.used]) else {
            return false;
        };
        self.used = packed.len();
        self.data[..self.used].copy_from_slice(packed);
        self.packing = Some(effort.packing());
        self.last_raw = None;
        true
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
        let records = u16::try_from(records).unwrap_or(u16::MAX);
        let length = self.head.len() - HEADER_BYTES + self.used;
        let header = Header::new(Kind::Pages, position, length)?;
        let (fixed, table) = self.head.split_at_mut(TABLE_AT);
        let prefix = &mut fixed[PREFIX_AT..];
        prefix[0..4].copy_from_slice(&self.round.0.to_le_bytes());
        prefix[4..6].copy_from_slice(&records.to_le_bytes());
        prefix[6] = Packing::number(self.packing);
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
        if self.packing.is_some() {
            return 0;
        }
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
