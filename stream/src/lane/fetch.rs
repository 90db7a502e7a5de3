//! Fetch lanes: pages of a guest that was handed over before them.
//!
//! The source's direction is that of a page lane, all of it one round that never ends. Against it the
//! target says which pages the guest waits for, and how many frames are in place: nothing there is
//! sent twice or relied on but by these counts, so a lane may die at any moment.

use std::io::{Read, Write};

use bytes::{BufMut as _, Bytes, BytesMut};

use super::page::{read_all, read_some};
use crate::codec::{absence, check_absence, put_absence};
use crate::error::Error;
use crate::frame::{HEADER_BYTES, Header, Kind, Position};
use crate::limits::{MAX_REGIONS, PAGE_NUMBER_END};
use crate::message::{Absence, LaneId, Round};

/// The round of every page frame of a fetch lane.
pub const FETCH_ROUND: Round = Round(1);

/// What a target says on a fetch lane.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// The guest waits for this page: send it next, and its neighbours after it.
    Fault {
        /// The region, by its position in the offer.
        region: u16,
        /// The page, counted from the region's start.
        page: u64,
    },
    /// So many page frames of this lane are in place, since it began.
    Placed {
        /// How many.
        frames: u64,
    },
    /// These pages are missing here. Told for all that are, when a lane joins in the middle.
    Lacking(Absence),
    /// Nothing is missing any more.
    Whole,
}

impl Request {
    fn kind(&self) -> Kind {
        match self {
            Self::Fault { .. } => Kind::Fault,
            Self::Placed { .. } => Kind::Placed,
            Self::Lacking(_) => Kind::Lacking,
            Self::Whole => Kind::Whole,
        }
    }

    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Fault { region, page } => {
                out.put_u16_le(*region);
                out.put_u64_le(*page);
            }
            Self::Placed { frames } => out.put_u64_le(*frames),
            Self::Lacking(lacking) => put_absence(out, lacking),
            Self::Whole => {}
        }
    }

    fn decode(kind: Kind, payload: Bytes, position: Position) -> Result<Self, Error> {
        let fixed = |length: usize| match payload.len() {
            found if found < length => Err(Error::ShortPayload { kind }),
            found if found > length => Err(Error::TrailingBytes {
                kind,
                count: found - length,
            }),
            _ => Ok(()),
        };
        let number = |at: usize| u64::from_le_bytes(crate::frame::array(&payload, at));
        let request = match kind {
            Kind::Fault => {
                fixed(10)?;
                Self::Fault {
                    region: u16::from_le_bytes(crate::frame::array(&payload, 0)),
                    page: number(2),
                }
            }
            Kind::Placed => {
                fixed(8)?;
                Self::Placed { frames: number(0) }
            }
            Kind::Lacking => Self::Lacking(absence(kind, payload)?),
            Kind::Whole => {
                fixed(0)?;
                Self::Whole
            }
            kind => {
                let lane = position.lane;
                return Err(Error::MisplacedKind { kind, lane });
            }
        };
        request.check()?;
        Ok(request)
    }

    fn check(&self) -> Result<(), Error> {
        let kind = self.kind();
        match self {
            Self::Fault { region, .. } if usize::from(*region) >= MAX_REGIONS => {
                Err(Error::BadField {
                    kind,
                    field: "the region",
                    found: u64::from(*region),
                })
            }
            Self::Fault { page, .. } if *page >= PAGE_NUMBER_END => Err(Error::BadField {
                kind,
                field: "the page",
                found: *page,
            }),
            Self::Lacking(lacking) => check_absence(kind, lacking),
            _ => Ok(()),
        }
    }
}

/// Numbers and writes what a target says on a fetch lane.
#[derive(Debug)]
pub struct RequestWriter {
    next: Position,
    buffer: BytesMut,
    broken: bool,
}

impl RequestWriter {
    /// A writer for a fresh connection.
    pub fn new(lane: LaneId) -> Self {
        Self {
            next: Position::first(lane.index, lane.generation),
            buffer: BytesMut::new(),
            broken: false,
        }
    }

    /// Sends requests, all with one system call where the socket takes them.
    pub fn send(
        &mut self,
        to: &mut (impl Write + ?Sized),
        requests: &[Request],
    ) -> Result<(), Error> {
        if self.broken {
            let lane = self.next.lane;
            return Err(Error::Broken { lane });
        }
        self.buffer.clear();
        self.broken = true;
        for request in requests {
            request.check()?;
            let at = self.buffer.len();
            self.buffer.resize(at + HEADER_BYTES, 0);
            request.encode(&mut self.buffer);
            let length = self.buffer.len() - at - HEADER_BYTES;
            let header = Header::new(request.kind(), self.next, length)?;
            let mut hasher = header.seed();
            hasher.update(&self.buffer[at + HEADER_BYTES..]);
            let header = header.to_bytes(hasher.finalize());
            self.buffer[at..at + HEADER_BYTES].copy_from_slice(&header);
            self.next.advance();
        }
        to.write_all(&self.buffer)?;
        to.flush()?;
        self.broken = false;
        Ok(())
    }
}

/// Reads and checks what a target says on a fetch lane.
#[derive(Debug)]
pub struct RequestReader {
    due: Position,
    broken: bool,
}

impl RequestReader {
    /// A reader for a fresh connection.
    pub fn new(lane: LaneId) -> Self {
        Self {
            due: Position::first(lane.index, lane.generation),
            broken: false,
        }
    }

    /// Waits for the next; `None` at the end of the stream, between two frames.
    pub fn next(&mut self, from: &mut (impl Read + ?Sized)) -> Result<Option<Request>, Error> {
        if self.broken {
            let lane = self.due.lane;
            return Err(Error::Broken { lane });
        }
        self.broken = true;
        let mut header = [0; HEADER_BYTES];
        match HEADER_BYTES - read_some(from, &mut header)? {
            0 => {}
            HEADER_BYTES => {
                self.broken = false;
                return Ok(None);
            }
            missing => return Err(Error::Truncated { missing }),
        }
        let (header, crc) = Header::parse(&header)?;
        self.due.admit(&header)?;
        // Bounded by its kind.
        let mut payload = BytesMut::zeroed(header.length as usize);
        read_all(from, &mut payload)?;
        let mut hasher = header.seed();
        hasher.update(&payload);
        header.verify(hasher, crc)?;
        let request = Request::decode(header.kind, payload.freeze(), header.position)?;
        self.due.advance();
        self.broken = false;
        Ok(Some(request))
    }
}
