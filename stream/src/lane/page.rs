//! Page lanes: page frames and the ends of rounds over anything that blocks.

use std::io::{self, IoSlice, Read, Write};

use crc32fast::Hasher;

use crate::error::Error;
use crate::frame::{HEADER_BYTES, Header, Kind, Position, array};
use crate::limits::MAX_RECORDS;
use crate::message::{LaneId, Round};
use crate::pages::{PREFIX_BYTES, PageFrame, Prefix, RECORD_BYTES, Record, Unpacker, parse_round};

/// What every frame of a page lane begins with: a header and twelve bytes.
const LEAD_BYTES: usize = HEADER_BYTES + PREFIX_BYTES;

/// Numbers and writes the frames of a page lane.
#[derive(Debug)]
pub struct PageLaneWriter {
    next: Position,
    /// Pages sent since the last end of a round.
    pages: u64,
    broken: bool,
}

impl PageLaneWriter {
    /// A writer for a fresh connection.
    pub fn new(lane: LaneId) -> Self {
        Self {
            next: Position::first(lane.index, lane.generation),
            pages: 0,
            broken: false,
        }
    }

    /// The number of the next frame: how many were sent.
    pub fn frames(&self) -> u64 {
        self.next.sequence
    }

    /// Sends a frame, with one system call where the socket takes it, and returns its length in
    /// bytes. An empty one is not sent.
    pub fn send(
        &mut self,
        to: &mut (impl Write + ?Sized),
        frame: &mut PageFrame,
    ) -> Result<u64, Error> {
        if frame.is_empty() {
            return Ok(0);
        }
        let bytes = frame.wire_bytes();
        let pages = frame.pages();
        self.write(to, &mut frame.seal(self.next)?)?;
        self.pages += pages;
        Ok(bytes)
    }

    /// Tells the receiver that it has every page of `round` that this lane carries. Returns the
    /// bytes sent.
    pub fn end_round(
        &mut self,
        to: &mut (impl Write + ?Sized),
        round: Round,
    ) -> Result<u64, Error> {
        let mut payload = [0; PREFIX_BYTES];
        payload[0..4].copy_from_slice(&round.0.to_le_bytes());
        payload[4..12].copy_from_slice(&self.pages.to_le_bytes());
        let header = Header::new(Kind::RoundEnd, self.next, payload.len())?;
        let mut hasher = header.seed();
        hasher.update(&payload);
        let header = header.to_bytes(hasher.finalize());
        self.write(to, &mut [IoSlice::new(&header), IoSlice::new(&payload)])?;
        self.pages = 0;
        Ok(LEAD_BYTES as u64)
    }

    fn write(
        &mut self,
        to: &mut (impl Write + ?Sized),
        mut slices: &mut [IoSlice<'_>],
    ) -> Result<(), Error> {
        if self.broken {
            return Err(Error::Broken {
                lane: self.next.lane,
            });
        }
        self.broken = true;
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            match to.write_vectored(slices) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(count) => IoSlice::advance_slices(&mut slices, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        to.flush()?;
        self.next.advance();
        self.broken = false;
        Ok(())
    }
}

/// Reads and checks the frames of a page lane.
#[derive(Debug)]
pub struct PageLaneReader {
    due: Position,
    /// The round that the lane is at; none before its first frame.
    round: Option<Round>,
    /// Pages that came since the last end of a round.
    pages: u64,
    table: Vec<u8>,
    records: Vec<Record>,
    unpacker: Unpacker,
    /// Set from the first byte of a frame until it is checked.
    broken: bool,
}

/// What came on a page lane.
#[derive(Debug)]
pub enum Incoming<'a, R: ?Sized> {
    /// Pages. The lane goes on only after [`PageBody::place`].
    Pages(PageBody<'a, R>),
    /// The end of a round on this lane.
    RoundEnd {
        /// The round.
        round: Round,
        /// Pages of this round that came on this lane: counted, and compared with what was sent.
        pages: u64,
    },
    /// The end of the stream, between two frames.
    End,
}

impl PageLaneReader {
    /// A reader for a fresh connection.
    pub fn new(lane: LaneId) -> Self {
        Self {
            due: Position::first(lane.index, lane.generation),
            round: None,
            pages: 0,
            table: Vec::with_capacity(MAX_RECORDS * RECORD_BYTES),
            records: Vec::with_capacity(MAX_RECORDS),
            unpacker: Unpacker::default(),
            broken: false,
        }
    }

    /// How many whole frames came, each checked and in place.
    pub fn frames(&self) -> u64 {
        self.due.sequence
    }

    /// Pages of those that came since the lane's last end of a round.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Waits for the next frame. Pages are told with their table read and checked, and their bytes
    /// still in `from`, which must be the same at every call.
    pub fn next<'a, R: Read + ?Sized>(
        &'a mut self,
        from: &'a mut R,
    ) -> Result<Incoming<'a, R>, Error> {
        if self.broken {
            return Err(Error::Broken {
                lane: self.due.lane,
            });
        }
        self.broken = true;
        let mut lead = [0; LEAD_BYTES];
        if !read_lead(from, &mut lead)? {
            self.broken = false;
            return Ok(Incoming::End);
        }
        let (header, crc) = Header::parse(&array(&lead, 0))?;
        self.due.admit(&header)?;
        let prefix = array(&lead, HEADER_BYTES);
        if header.kind == Kind::RoundEnd {
            return self.end_round(&header, crc, &prefix);
        }
        let (prefix, data_bytes, hasher) = self.read_table(from, &header, &prefix)?;
        Ok(Incoming::Pages(PageBody {
            reader: self,
            from,
            prefix,
            data_bytes,
            header,
            crc,
            hasher,
        }))
    }

    fn end_round<'a, R: ?Sized>(
        &mut self,
        header: &Header,
        crc: u32,
        payload: &[u8; PREFIX_BYTES],
    ) -> Result<Incoming<'a, R>, Error> {
        let kind = Kind::RoundEnd;
        if (header.length as usize) < PREFIX_BYTES {
            return Err(Error::ShortPayload { kind });
        }
        let mut hasher = header.seed();
        hasher.update(payload);
        header.verify(hasher, crc)?;
        let round = parse_round(kind, u32::from_le_bytes(array(payload, 0)))?;
        self.admit_round(round)?;
        let told = u64::from_le_bytes(array(payload, 4));
        if told != self.pages {
            return Err(Error::WrongPageCount {
                lane: self.due.lane,
                round,
                told,
                came: self.pages,
            });
        }
        self.round = Some(Round(round.0.saturating_add(1)));
        self.pages = 0;
        self.due.advance();
        self.broken = false;
        Ok(Incoming::RoundEnd { round, pages: told })
    }

    /// Reads the table into `self.records`; returns what came before it, the length of the data
    /// unpacked, and the frame's checksum so far.
    fn read_table(
        &mut self,
        from: &mut (impl Read + ?Sized),
        header: &Header,
        prefix: &[u8; PREFIX_BYTES],
    ) -> Result<(Prefix, usize, Hasher), Error> {
        let parsed = Prefix::parse(header, prefix)?;
        self.table.resize(parsed.table_bytes, 0);
        read_all(from, &mut self.table)?;
        let data_bytes = parsed.parse_table(header, prefix, &self.table, &mut self.records)?;
        self.admit_round(parsed.round)?;
        let mut hasher = header.seed();
        hasher.update(prefix);
        hasher.update(&self.table);
        Ok((parsed, data_bytes, hasher))
    }

    /// Rounds are barriers: after the end of one, the next is the only one that may follow.
    fn admit_round(&mut self, found: Round) -> Result<(), Error> {
        let expected = *self.round.get_or_insert(found);
        if found != expected {
            return Err(Error::WrongRound {
                lane: self.due.lane,
                expected,
                found,
            });
        }
        Ok(())
    }
}

/// A page frame of which the bytes are still to be read.
///
/// Dropped without [`PageBody::place`] it leaves the lane broken: nothing of it counts as received.
#[derive(Debug)]
#[must_use = "the lane goes on only after the pages were placed"]
pub struct PageBody<'a, R: ?Sized> {
    reader: &'a mut PageLaneReader,
    from: &'a mut R,
    prefix: Prefix,
    /// Length of the data, unpacked.
    data_bytes: usize,
    header: Header,
    crc: u32,
    hasher: Hasher,
}

/// A page frame that is in place and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The round that its pages belong to.
    pub round: Round,
    /// Pages of all its records, zero pages included.
    pub pages: u64,
    /// Length in bytes of the whole frame.
    pub wire_bytes: u64,
}

impl<R: Read + ?Sized> PageBody<'_, R> {
    /// The round that the pages belong to.
    pub fn round(&self) -> Round {
        self.prefix.round
    }

    /// The runs of pages, each within the wire's limits, none compared with any layout yet.
    pub fn records(&self) -> &[Record] {
        &self.reader.records
    }

    /// Calls `place` for every record, then checks the frame. Only when this returns `Ok` are the
    /// pages what the sender sent.
    ///
    /// `place` reads exactly [`Record::data_bytes`] bytes, and returns the hasher that it was given
    /// continued over them; for pages without data, the hasher as it was. Packed data has been checked and
    /// unpacked before the first call. When the connection fails
    /// underneath, the error is the lane's own, whatever `place` makes of it.
    pub fn place<E: From<Error>>(
        self,
        mut place: impl FnMut(&Record, &mut dyn Read, Hasher) -> Result<Hasher, E>,
    ) -> Result<Placed, E> {
        let pages = self
            .reader
            .records
            .iter()
            .map(|record| u64::from(record.run.count));
        let placed = Placed {
            round: self.prefix.round,
            pages: pages.sum(),
            wire_bytes: (HEADER_BYTES + self.header.length as usize) as u64,
        };
        match self.prefix.packing {
            None => {
                let crc = place_all(&self.reader.records, &mut *self.from, self.hasher, place)?;
                self.header.verify(crc, self.crc)?;
            }
            Some(packing) => {
                let packed = self.reader.unpacker.room(self.prefix.wire_bytes);
                read_all(self.from, packed)?;
                let mut hasher = self.hasher;
                hasher.update(packed);
                self.header.verify(hasher, self.crc)?;
                let mut data = self.reader.unpacker.unpack(packing, self.data_bytes)?;
                place_all(&self.reader.records, &mut data, Hasher::new(), &mut place)?;
            }
        }
        self.reader.pages += placed.pages;
        self.reader.due.advance();
        self.reader.broken = false;
        Ok(placed)
    }
}

/// Calls `place` for every record, with its data in `from`; returns the hasher continued over all.
fn place_all<E: From<Error>>(
    records: &[Record],
    from: &mut (impl Read + ?Sized),
    mut hasher: Hasher,
    mut place: impl FnMut(&Record, &mut dyn Read, Hasher) -> Result<Hasher, E>,
) -> Result<Hasher, E> {
    for record in records {
        let mut data = Data {
            from: &mut *from,
            left: record.data_bytes(),
            failure: None,
        };
        let placed = place(record, &mut data, hasher);
        let left = data.left;
        if let Some(failure) = data.failure {
            return Err(failure.into());
        }
        hasher = placed?;
        if left > 0 {
            return Err(Error::Unread { left }.into());
        }
    }
    Ok(hasher)
}

/// The bytes of one record. Keeps the failure of the connection, which would else be lost among the
/// errors of whoever reads.
struct Data<'a, R: ?Sized> {
    from: &'a mut R,
    left: u64,
    failure: Option<Error>,
}

impl<R: Read + ?Sized> Read for Data<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let wanted = into.len().min(most);
        if wanted == 0 {
            return Ok(0);
        }
        match self.from.read(&mut into[..wanted]) {
            Ok(0) => {
                self.failure = Some(Error::Truncated { missing: most });
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(count) => {
                self.left -= count as u64;
                Ok(count)
            }
            Err(error) => {
                let kind = error.kind();
                if kind != io::ErrorKind::Interrupted {
                    self.failure = Some(error.into());
                }
                Err(kind.into())
            }
        }
    }
}

/// Reads the beginning of a frame; false at the end of the stream.
fn read_lead(from: &mut (impl Read + ?Sized), lead: &mut [u8; LEAD_BYTES]) -> Result<bool, Error> {
    let came = read_some(from, lead)?;
    match LEAD_BYTES - came {
        0 => Ok(true),
        LEAD_BYTES => Ok(false),
        missing => Err(Error::Truncated { missing }),
    }
}

pub(super) fn read_all(from: &mut (impl Read + ?Sized), into: &mut [u8]) -> Result<(), Error> {
    let missing = into.len() - read_some(from, into)?;
    if missing > 0 {
        return Err(Error::Truncated { missing });
    }
    Ok(())
}

/// Reads until `into` is full or the stream ends; returns how much came.
pub(super) fn read_some(from: &mut (impl Read + ?Sized), into: &mut [u8]) -> Result<usize, Error> {
    let mut came = 0;
    while came < into.len() {
        match from.read(&mut into[came..]) {
            Ok(0) => break,
            Ok(count) => came += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(came)
}
