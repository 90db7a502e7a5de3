//! Frames: a header of fixed size, and a payload whose length is bounded by its kind.
//!
//! No I/O here. [`Decoder`] takes the bytes of a lane in pieces of any size; it looks at a header
//! before it makes room for the payload, and lets nothing out before the checksum fits.

use bytes::{Bytes, BytesMut};
use crc32fast::Hasher;

use crate::error::Error;
use crate::limits::{
    AHEAD_RUN_BYTES, HIGHEST_VERSION, MAX_AHEAD_RUNS, MAX_MAP_BYTES, MAX_NAME, MAX_PAGE_DATA,
    MAX_RECORDS, MAX_REGIONS, MAX_STATE_CHUNK, MAX_TEXT, READ_CHUNK,
};
use crate::message::LaneIndex;
use crate::pages::{PREFIX_BYTES, RECORD_BYTES};

/// The first bytes of every frame. The first of them begins no text.
pub const MAGIC: [u8; 4] = *b"\xFErry";

/// Length of a frame's header in bytes.
pub const HEADER_BYTES: usize = 32;

/// The version in every frame's header.
const VERSION: u16 = HIGHEST_VERSION;

/// Bytes of the header that the checksum covers: all before the checksum itself.
const HASHED_BYTES: usize = HEADER_BYTES - 4;

/// Bytes before the map in a message that tells which pages are missing.
pub(crate) const ABSENT_BYTES: usize = 18;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// [`Message::Hello`](crate::message::Message::Hello)
    Hello = 1,
    /// [`Message::Welcome`](crate::message::Message::Welcome)
    Welcome = 2,
    /// [`Message::Prepared`](crate::message::Message::Prepared)
    Prepared = 3,
    /// [`Message::State`](crate::message::Message::State)
    State = 4,
    /// [`Message::RoundDone`](crate::message::Message::RoundDone)
    RoundDone = 5,
    /// [`Message::Complete`](crate::message::Message::Complete)
    Complete = 6,
    /// [`Message::Ready`](crate::message::Message::Ready)
    Ready = 7,
    /// [`Message::Go`](crate::message::Message::Go)
    Go = 8,
    /// [`Message::Running`](crate::message::Message::Running)
    Running = 9,
    /// [`Message::Returned`](crate::message::Message::Returned)
    Returned = 10,
    /// [`Message::Finished`](crate::message::Message::Finished)
    Finished = 11,
    /// [`Message::Ping`](crate::message::Message::Ping)
    Ping = 12,
    /// [`Message::Inquire`](crate::message::Message::Inquire)
    Inquire = 13,
    /// [`Message::Answer`](crate::message::Message::Answer)
    Answer = 14,
    /// [`Message::Abort`](crate::message::Message::Abort)
    Abort = 15,
    /// [`Message::Paused`](crate::message::Message::Paused)
    Paused = 16,
    /// [`Message::LaneLost`](crate::message::Message::LaneLost)
    LaneLost = 17,
    /// [`Message::Fence`](crate::message::Message::Fence)
    Fence = 18,
    /// [`Message::Fenced`](crate::message::Message::Fenced)
    Fenced = 19,
    /// [`Message::Mismatch`](crate::message::Message::Mismatch)
    Mismatch = 20,
    /// [`Message::Ahead`](crate::message::Message::Ahead)
    Ahead = 21,
    /// [`Message::Absent`](crate::message::Message::Absent)
    Absent = 22,
    /// [`Message::Discard`](crate::message::Message::Discard)
    Discard = 23,
    /// [`Message::Discarded`](crate::message::Message::Discarded)
    Discarded = 24,
    /// Pages; see [`pages`](crate::pages).
    Pages = 64,
    /// The end of a round on a page lane.
    RoundEnd = 65,
    /// Pages that the guest waits for, asked for on a fetch lane.
    Fault = 66,
    /// How many page frames of a fetch lane are in place.
    Placed = 67,
    /// Pages that a target still lacks, told on a fetch lane.
    Lacking = 68,
    /// Nothing is lacking any more, told on a fetch lane.
    Whole = 69,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 30] = [
        Self::Hello,
        Self::Welcome,
        Self::Prepared,
        Self::State,
        Self::RoundDone,
        Self::Complete,
        Self::Ready,
        Self::Go,
        Self::Running,
        Self::Returned,
        Self::Finished,
        Self::Ping,
        Self::Inquire,
        Self::Answer,
        Self::Abort,
        Self::Paused,
        Self::LaneLost,
        Self::Fence,
        Self::Fenced,
        Self::Mismatch,
        Self::Ahead,
        Self::Absent,
        Self::Discard,
        Self::Discarded,
        Self::Pages,
        Self::RoundEnd,
        Self::Fault,
        Self::Placed,
        Self::Lacking,
        Self::Whole,
    ];

    fn parse(found: u8) -> Result<Self, Error> {
        let known = Self::ALL.into_iter().find(|kind| *kind as u8 == found);
        known.ok_or(Error::UnknownKind { found })
    }

    /// The longest payload of this kind, in bytes.
    pub const fn max_payload(self) -> usize {
        match self {
            Self::Hello => {
                let name = 2 + MAX_NAME;
                let offer = 3 + 3 * name + 2 + MAX_REGIONS * (name + 12);
                33 + offer
            }
            Self::Welcome | Self::RoundDone => 12,
            Self::State => 8 + MAX_STATE_CHUNK,
            Self::Complete => 24,
            Self::Go | Self::Answer => 1,
            Self::Returned => 2 + MAX_TEXT,
            Self::Abort => 4 + MAX_TEXT,
            Self::LaneLost => 6 + MAX_TEXT,
            Self::Fence | Self::Ready | Self::Running => 4,
            Self::Fenced => 20,
            Self::Mismatch => 18,
            Self::Ahead => 4 + MAX_AHEAD_RUNS * AHEAD_RUN_BYTES,
            Self::Absent | Self::Lacking => ABSENT_BYTES + MAX_MAP_BYTES,
            Self::Fault => 10,
            Self::Placed => 8,
            Self::Prepared
            | Self::Paused
            | Self::Finished
            | Self::Ping
            | Self::Inquire
            | Self::Discard
            | Self::Discarded
            | Self::Whole => 0,
            Self::Pages => PREFIX_BYTES + MAX_RECORDS * RECORD_BYTES + MAX_PAGE_DATA,
            Self::RoundEnd => PREFIX_BYTES,
        }
    }

    /// True for the kinds of page lanes, false for those of the control lane.
    pub fn is_for_page_lanes(self) -> bool {
        matches!(
            self,
            Self::Pages | Self::RoundEnd | Self::Fault | Self::Placed | Self::Lacking | Self::Whole
        )
    }
}

/// How often a lane has been opened anew. Frames of an older generation are refused, so that what a
/// dead connection still holds cannot overwrite what was sent again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u16);

/// A frame's place: one direction of one life of one lane, and the number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The lane.
    pub lane: LaneIndex,
    /// Its generation.
    pub generation: Generation,
    /// Number of the frame in its direction, from 0.
    pub sequence: u64,
}

impl Position {
    /// The place of the first frame.
    pub fn first(lane: LaneIndex, generation: Generation) -> Self {
        Self {
            lane,
            generation,
            sequence: 0,
        }
    }

    pub(crate) fn advance(&mut self) {
        self.sequence += 1;
    }

    /// Refuses a frame that is not the one due here.
    pub(crate) fn admit(self, header: &Header) -> Result<(), Error> {
        let found = header.position;
        if found.lane != self.lane {
            return Err(Error::WrongLane {
                expected: self.lane,
                found: found.lane,
            });
        }
        if found.generation != self.generation {
            return Err(Error::WrongGeneration {
                lane: self.lane,
                expected: self.generation,
                found: found.generation,
            });
        }
        if found.sequence != self.sequence {
            return Err(Error::OutOfSequence {
                lane: self.lane,
                expected: self.sequence,
                found: found.sequence,
            });
        }
        if header.kind.is_for_page_lanes() == (self.lane == LaneIndex::CONTROL) {
            return Err(Error::MisplacedKind {
                kind: header.kind,
                lane: self.lane,
            });
        }
        Ok(())
    }
}

/// A frame's header, without its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Its place.
    pub position: Position,
    /// Length of its payload in bytes.
    pub length: u32,
}

impl Header {
    /// The header of a payload of `length` bytes, refused when its kind allows fewer.
    pub(crate) fn new(kind: Kind, position: Position, length: usize) -> Result<Self, Error> {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        check_length(kind, length)?;
        Ok(Self {
            kind,
            position,
            length,
        })
    }

    /// Reads a header and, with it, the checksum of its frame.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<(Self, u32), Error> {
        let magic = array(bytes, 0);
        if magic != MAGIC {
            return Err(Error::BadMagic { found: magic });
        }
        let version = u16::from_le_bytes(array(bytes, 4));
        if version != VERSION {
            return Err(Error::BadVersion { found: version });
        }
        let kind = Kind::parse(bytes[6])?;
        if bytes[7] != 0 {
            return Err(Error::BadFlags {
                kind,
                found: bytes[7],
            });
        }
        let length = u32::from_le_bytes(array(bytes, 20));
        check_length(kind, length)?;
        let reserved = u32::from_le_bytes(array(bytes, 24));
        if reserved != 0 {
            return Err(Error::BadReserved {
                kind,
                found: reserved,
            });
        }
        let position = Position {
            lane: LaneIndex(u16::from_le_bytes(array(bytes, 8))),
            generation: Generation(u16::from_le_bytes(array(bytes, 10))),
            sequence: u64::from_le_bytes(array(bytes, 12)),
        };
        let header = Self {
            kind,
            position,
            length,
        };
        Ok((header, u32::from_le_bytes(array(bytes, 28))))
    }

    /// The checksum of a frame with this header, yet without its payload.
    pub fn seed(&self) -> Hasher {
        let mut hasher = Hasher::new();
        hasher.update(&self.to_bytes(0)[..HASHED_BYTES]);
        hasher
    }

    /// The header as it travels, with the checksum of its frame.
    pub fn to_bytes(&self, crc: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.kind as u8;
        bytes[8..10].copy_from_slice(&self.position.lane.0.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.position.generation.0.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.position.sequence.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Refuses a frame whose bytes are not those that were sent.
    pub(crate) fn verify(&self, hasher: Hasher, crc: u32) -> Result<(), Error> {
        if hasher.finalize() == crc {
            return Ok(());
        }
        Err(Error::Corrupt {
            kind: self.kind,
            lane: self.position.lane,
            sequence: self.position.sequence,
        })
    }
}

fn check_length(kind: Kind, length: u32) -> Result<(), Error> {
    let limit = kind.max_payload();
    if length as usize > limit {
        return Err(Error::Oversized {
            kind,
            length,
            limit,
        });
    }
    Ok(())
}

/// The `N` bytes at `at`, which the caller knows to be there.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// A whole frame whose checksum fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub payload: Bytes,
}

/// Makes frames of one direction of a lane out of its bytes, however they are split.
///
/// An error stays: the same one comes again on every later call.
#[derive(Debug)]
pub struct Decoder {
    due: Position,
    buffer: BytesMut,
}

impl Decoder {
    /// A decoder for a lane from its first frame on.
    pub fn new(lane: LaneIndex, generation: Generation) -> Self {
        Self {
            due: Position::first(lane, generation),
            buffer: BytesMut::new(),
        }
    }

    /// Takes the lane's next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, when all of it is there.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Error> {
        let Some((header, crc)) = self.header()? else {
            return Ok(None);
        };
        let end = HEADER_BYTES + header.length as usize;
        let Some(payload) = self.buffer.get(HEADER_BYTES..end) else {
            return Ok(None);
        };
        let mut hasher = header.seed();
        hasher.update(payload);
        header.verify(hasher, crc)?;
        self.due.advance();
        let payload = self.buffer.split_to(end).freeze().slice(HEADER_BYTES..);
        Ok(Some(Frame { header, payload }))
    }

    /// To be called at the end of the stream: an error unless it is the end of a frame too.
    pub fn finish(&self) -> Result<(), Error> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let missing = self.missing()?;
        Err(Error::Truncated { missing })
    }

    /// True when no byte waits for the rest of its frame.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Where the lane's next bytes may be read to, with room for what the frame lacks.
    pub(crate) fn room(&mut self) -> Result<&mut BytesMut, Error> {
        let missing = self.missing()?;
        self.buffer.reserve(missing.max(READ_CHUNK));
        Ok(&mut self.buffer)
    }

    /// How many bytes the frame at the front lacks, as far as is known.
    fn missing(&self) -> Result<usize, Error> {
        let needed = match self.header()? {
            Some((header, _)) => HEADER_BYTES + header.length as usize,
            None => HEADER_BYTES,
        };
        Ok(needed.saturating_sub(self.buffer.len()))
    }

    fn header(&self) -> Result<Option<(Header, u32)>, Error> {
        let Some(bytes) = self.buffer.first_chunk() else {
            return Ok(None);
        };
        let (header, crc) = Header::parse(bytes)?;
        self.due.admit(&header)?;
        Ok(Some((header, crc)))
    }
}
