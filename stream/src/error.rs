//! What can go wrong on the wire.

use std::io;

use crate::frame::{Generation, Kind, MAGIC};
use crate::limits::{HIGHEST_VERSION, LOWEST_VERSION};
use crate::message::{AbortCode, LaneIndex, Round};
use crate::pages::Packing;

/// What went wrong on a lane. After any of them the lane is of no further use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The transport failed.
    #[error("the connection failed")]
    Io {
        /// How.
        #[from]
        source: io::Error,
    },
    /// The stream ended within a frame.
    #[error("the connection ended within a frame, {missing} bytes short")]
    Truncated {
        /// How many bytes are known to be missing.
        missing: usize,
    },
    /// The lane was used after an error, or after a frame that was not finished.
    #[error("{lane} is broken by what went wrong on it before")]
    Broken {
        /// The lane.
        lane: LaneIndex,
    },
    /// A frame does not begin with [`MAGIC`]: the peer is something else.
    #[error("the peer is not a ferry: its frame begins with {found:02x?} instead of {MAGIC:02x?}")]
    BadMagic {
        /// What it begins with.
        found: [u8; 4],
    },
    /// A frame of another wire version.
    #[error(
        "the peer speaks wire version {found}, this side {LOWEST_VERSION} to {HIGHEST_VERSION}"
    )]
    BadVersion {
        /// The frame's version.
        found: u16,
    },
    /// A frame of no known kind.
    #[error("a frame of unknown kind {found}")]
    UnknownKind {
        /// The kind's number.
        found: u8,
    },
    /// Flags are set that no version 1 frame has.
    #[error("a {kind:?} frame has unknown flags {found:#04x}")]
    BadFlags {
        /// The frame's kind.
        kind: Kind,
        /// Its flags.
        found: u8,
    },
    /// Bytes that must be zero are not.
    #[error("reserved bytes of a {kind:?} frame hold {found:#x}")]
    BadReserved {
        /// The frame's kind.
        kind: Kind,
        /// What they hold.
        found: u32,
    },
    /// A payload is longer than its kind allows.
    #[error("a {kind:?} frame of {length} bytes, at most {limit} are allowed")]
    Oversized {
        /// The frame's kind.
        kind: Kind,
        /// Length of the payload in bytes.
        length: u32,
        /// The most bytes that the kind allows.
        limit: usize,
    },
    /// A frame of a kind that does not travel on this lane.
    #[error("a {kind:?} frame on {lane}")]
    MisplacedKind {
        /// The frame's kind.
        kind: Kind,
        /// The lane.
        lane: LaneIndex,
    },
    /// A frame of another lane.
    #[error("a frame of {found} on {expected}")]
    WrongLane {
        /// The lane that it came on.
        expected: LaneIndex,
        /// The lane that it names.
        found: LaneIndex,
    },
    /// A frame of another generation of the lane.
    #[error("a frame of generation {} on {lane}, which is at {}", .found.0, .expected.0)]
    WrongGeneration {
        /// The lane.
        lane: LaneIndex,
        /// The lane's generation.
        expected: Generation,
        /// The frame's.
        found: Generation,
    },
    /// A frame was lost, repeated or moved.
    #[error("frame {found} came on {lane} where frame {expected} was due")]
    OutOfSequence {
        /// The lane.
        lane: LaneIndex,
        /// The sequence number that was due.
        expected: u64,
        /// The frame's.
        found: u64,
    },
    /// A frame's bytes are not those that were sent.
    #[error("{kind:?} frame {sequence} of {lane} was corrupted on its way")]
    Corrupt {
        /// The frame's kind.
        kind: Kind,
        /// The lane.
        lane: LaneIndex,
        /// The frame's sequence number.
        sequence: u64,
    },
    /// A payload ends before its last field.
    #[error("the payload of a {kind:?} frame is too short")]
    ShortPayload {
        /// The frame's kind.
        kind: Kind,
    },
    /// A payload goes on after its last field.
    #[error("the payload of a {kind:?} frame has {count} bytes too many")]
    TrailingBytes {
        /// The frame's kind.
        kind: Kind,
        /// How many.
        count: usize,
    },
    /// A text that is no UTF-8, or a name with control characters in it.
    #[error("{field} of a {kind:?} frame is no clean text")]
    BadText {
        /// The frame's kind.
        kind: Kind,
        /// Which of its fields.
        field: &'static str,
    },
    /// A field is outside its bounds.
    #[error("{field} of a {kind:?} frame is {found}")]
    BadField {
        /// The frame's kind.
        kind: Kind,
        /// Which of its fields.
        field: &'static str,
        /// Its value, or its length where it is a list or a text.
        found: u64,
    },
    /// A page record in an unknown encoding.
    #[error("a page record in unknown encoding {found}")]
    UnknownEncoding {
        /// The encoding's number.
        found: u8,
    },
    /// A page frame that was packed in an unknown way.
    #[error("a page frame in unknown packing {found}")]
    UnknownPacking {
        /// The packing's number.
        found: u8,
    },
    /// The data of a page frame does not unpack to what its table tells.
    #[error("the {packing:?} data of a page frame does not unpack to {needed} bytes")]
    BadPacking {
        /// How it was packed.
        packing: Packing,
        /// How many bytes its records need.
        needed: usize,
        /// How many came out, when it could be unpacked at all.
        found: Option<usize>,
    },
    /// A delta breaks its own form.
    #[error("a delta is malformed in {field}")]
    BadDelta {
        /// In what.
        field: &'static str,
    },
    /// The data lengths of a page frame's records do not add up to what the frame carries.
    #[error("the records of a page frame need {needed} bytes of data, it has {found}")]
    WrongDataLength {
        /// Bytes that the records need.
        needed: u64,
        /// Bytes that the frame has.
        found: u64,
    },
    /// Pages of a round that is over, or has not begun.
    #[error("pages of round {} on {lane} in round {}", .found.0, .expected.0)]
    WrongRound {
        /// The lane.
        lane: LaneIndex,
        /// The round that the lane is at.
        expected: Round,
        /// The frame's.
        found: Round,
    },
    /// A round's end tells of other pages than came.
    #[error("{lane} ends {round} with {told} pages, {came} came")]
    WrongPageCount {
        /// The lane.
        lane: LaneIndex,
        /// The round.
        round: Round,
        /// Pages that the sender counted.
        told: u64,
        /// Pages that came.
        came: u64,
    },
    /// A receiver of pages left bytes of a record unread.
    #[error("{left} bytes of a page record were left unread")]
    Unread {
        /// How many.
        left: u64,
    },
    /// A page frame has no room for the run.
    #[error("the page frame has no room for {count} more pages")]
    FrameFull {
        /// Pages in the run.
        count: u32,
    },
}

impl Error {
    /// The code to give the peer when this ends the migration.
    pub fn abort_code(&self) -> AbortCode {
        match self {
            Self::BadVersion { .. } => AbortCode::Version,
            Self::Corrupt { .. } => AbortCode::Corrupt,
            Self::Io { .. }
            | Self::Broken { .. }
            | Self::Unread { .. }
            | Self::FrameFull { .. } => AbortCode::Internal,
            _ => AbortCode::Protocol,
        }
    }
}
