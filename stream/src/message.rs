//! What the two engines say to each other on the control lane.
//!
//! These are the meanings; the codec turns them into the payloads of
//! frames. Every message is small but [`Message::State`]; pages travel on lanes of their own.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;

use crate::frame::Generation;
use crate::limits::{HIGHEST_VERSION, LOWEST_VERSION};

/// Names one migration: 128 random bits, chosen by the source, presented by every connection of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A text that is no session: not exactly 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a session is written as 32 hexadecimal digits")]
pub struct ParseSessionError;

impl FromStr for SessionId {
    type Err = ParseSessionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all_digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if text.len() != 32 || !all_digits {
            return Err(ParseSessionError);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| ParseSessionError)?;
        Ok(Self(number.to_be_bytes()))
    }
}

/// A pass over guest RAM, counted from 1; 0 before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round(pub u32);

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {}", self.0)
    }
}

/// A lane of a migration: 0 is the control lane, page lanes count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneIndex(pub u16);

impl LaneIndex {
    /// The lane of every [`Message`].
    pub const CONTROL: Self = Self(0);
}

impl fmt::Display for LaneIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane {}", self.0)
    }
}

/// One connection of a page lane. A lane that is opened anew is another one, of the next generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId {
    /// The lane.
    pub index: LaneIndex,
    /// How often it was opened before.
    pub generation: Generation,
}

impl LaneId {
    /// The first connection of a lane.
    pub const fn first(index: LaneIndex) -> Self {
        let generation = Generation(0);
        Self { index, generation }
    }

    /// The connection that replaces this one; none after the last generation.
    pub fn successor(self) -> Option<Self> {
        let generation = Generation(self.generation.0.checked_add(1)?);
        Some(Self { generation, ..self })
    }
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.index.fmt(f)?;
        match self.generation.0 {
            0 => Ok(()),
            again => write!(f, " (generation {again})"),
        }
    }
}

/// The wire versions that a side speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The lowest.
    pub lowest: u16,
    /// The highest; never below the lowest.
    pub highest: u16,
}

impl Versions {
    /// What this crate speaks.
    pub const OURS: Self = Self {
        lowest: LOWEST_VERSION,
        highest: HIGHEST_VERSION,
    };

    /// The highest version that both speak, if there is one.
    pub fn agree(self, other: Self) -> Option<u16> {
        let lowest = self.lowest.max(other.lowest);
        let highest = self.highest.min(other.highest);
        (lowest <= highest).then_some(highest)
    }
}

/// Optional abilities of a side, one bit each. Both sides use the intersection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// None: what every peer of this version has.
    pub const NONE: Self = Self(0);

    /// Page frames packed with LZ4.
    pub const LZ4: Self = Self(1 << 0);

    /// Page frames packed with Zstandard.
    pub const ZSTD: Self = Self(1 << 1);

    /// Pages told by how they differ from what was sent before.
    pub const DELTA: Self = Self(1 << 2);

    /// Pages taken by the target from the source's own RAM files, within one host.
    pub const NEAR: Self = Self(1 << 3);

    /// Being told where the source has data, ahead of its pages.
    pub const AHEAD: Self = Self(1 << 4);

    /// Handing the guest over before all of its pages.
    pub const POSTCOPY: Self = Self(1 << 5);

    /// What either has.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What both have.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What this set has and `other` has not.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// True when every feature of `other` is in this set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a connection is for; the first thing told on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The control lane of a new migration.
    Migrate,
    /// A page lane of the session named.
    Lane(LaneId),
    /// To ask who owns the guest of the session named.
    Inquire,
    /// A fetch lane of the session named: pages of a guest that was handed over before them.
    Fetch(LaneId),
}

/// A RAM region of the source's guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// The VMM's name for it.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Bytes in a page of the memory behind it.
    pub backing_page_bytes: u32,
}

/// Whether the guest runs while its RAM is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It runs, and what it writes is copied again.
    Live,
    /// It is paused before the first round.
    Paused,
}

/// The guest that a source offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its architecture, as the VMM names it.
    pub arch: String,
    /// Its versioned machine type.
    pub machine: String,
    /// The source's VMM and its version, for people.
    pub vmm: String,
    /// Its RAM, in the order that page frames count regions by.
    pub regions: Vec<RegionInfo>,
    /// How many page lanes the source may have open at one time, at least 1.
    pub lanes: u16,
    /// Whether it runs while it is copied.
    pub mode: Mode,
}

/// The first message of every connection, by whoever opened it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The wire versions that the sender speaks.
    pub versions: Versions,
    /// What the sender is able to do besides.
    pub features: Features,
    /// The migration that the connection belongs to.
    pub session: SessionId,
    /// What the connection is for.
    pub purpose: Purpose,
    /// The guest; present exactly for [`Purpose::Migrate`].
    pub offer: Option<Offer>,
}

/// The answer to a [`Hello`] that is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The wire version of everything that follows.
    pub version: u16,
    /// The features in use: never one that the hello lacks.
    pub features: Features,
    /// How many page lanes the target accepts at one time, at most as many as were offered.
    pub lanes: u16,
}

/// In which state the target leaves the guest that it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// It runs.
    Run,
    /// It stays paused, for somebody else to resume.
    StayPaused,
}

/// Who owns a guest, by the target's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The target: it took the guest.
    Taken,
    /// The source: the target never took the guest, and a Go still on its way is void.
    Refused,
    /// The source: the target took the guest, could not resume it, and ended its VMM.
    Returned,
}

/// Pages of a region in which the source has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRun {
    /// The first, counted from the region's start.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Which of a region's pages are missing at the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absence {
    /// The region, by its position in the offer.
    pub region: u16,
    /// The first page that is told of, counted from the region's start.
    pub first: u64,
    /// How many are told of, at least one; with a map at most
    /// [`MAX_MAPPED_PAGES`](crate::limits::MAX_MAPPED_PAGES).
    pub count: u64,
    /// A bit for each, the first page's the lowest of the first byte: set where it is missing. Empty
    /// when all of them are. Bits beyond the last page are 0.
    pub map: Bytes,
}

impl Absence {
    /// The runs of pages that are missing, in order, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = DataRun> + '_ {
        let is_missing = move |page: u64| {
            if self.map.is_empty() {
                return true;
            }
            let byte = usize::try_from(page / 8)
                .ok()
                .and_then(|at| self.map.get(at));
            byte.is_some_and(|byte| byte >> (page % 8) & 1 == 1)
        };
        let mut at = 0;
        std::iter::from_fn(move || {
            if self.map.is_empty() {
                let rest = self.count - std::mem::replace(&mut at, self.count);
                return (rest > 0).then_some(DataRun {
                    first: self.first,
                    count: rest,
                });
            }
            let start = (at..self.count).find(|page| is_missing(*page))?;
            let end = (start..self.count).find(|page| !is_missing(*page));
            at = end.unwrap_or(self.count);
            Some(DataRun {
                first: self.first + start,
                count: at - start,
            })
        })
    }
}

/// Why a side gave up. Travels as a number, so that peers of other versions can tell others apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AbortCode {
    /// Somebody asked for it.
    Cancelled,
    /// No wire version in common.
    Version,
    /// The RAM layouts differ.
    Layout,
    /// The architectures or machine types differ.
    Machine,
    /// The target is at another migration.
    Busy,
    /// The session named is not the one at work here.
    Session,
    /// A message that must not come now.
    Protocol,
    /// A frame whose bytes are not what was sent.
    Corrupt,
    /// The VMM refused or failed something.
    Vmm,
    /// No room for the guest's RAM.
    Memory,
    /// The guest, or its VMM, is gone.
    GuestGone,
    /// The engine's own fault, or its host's.
    Internal,
    /// Something took longer than its bound.
    Timeout,
    /// A code that this version does not know.
    Unknown(u16),
}

/// A message of the control lane. S→T: by the source alone; T→S: by the target alone.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// S→T. Opens every connection.
    Hello(Hello),
    /// T→S. Accepts it.
    Welcome(Welcome),
    /// T→S. RAM is blank and the VMM is ready to load.
    Prepared,
    /// S→T. A piece of the device state, in order.
    State {
        /// Offset of its first byte in the device state.
        offset: u64,
        /// The bytes: at least one, at most [`MAX_STATE_CHUNK`](crate::limits::MAX_STATE_CHUNK).
        bytes: Bytes,
    },
    /// S→T. The guest is paused: device state that follows must not be loaded before RAM is
    /// complete.
    Paused,
    /// T→S. The round's end came on every page lane, and all its pages are checked and in place.
    RoundDone {
        /// The round.
        round: Round,
        /// Pages that came in it, of all lanes.
        pages: u64,
    },
    /// S→T. `round` is the last: its pages may still be on their way, nothing else is.
    Complete {
        /// The last round.
        round: Round,
        /// Pages sent in all rounds together.
        pages: u64,
        /// Length of the device state in bytes.
        state_bytes: u64,
        /// CRC32 (IEEE) of the whole device state.
        state_crc: u32,
    },
    /// T→S. RAM is complete, the device state is loaded, and the guest is paused.
    Ready {
        /// How long the load took once RAM was complete, in microseconds.
        load_us: u32,
    },
    /// S→T. The guest is yours.
    Go {
        /// In which state to leave it.
        run: Run,
    },
    /// T→S. The guest is mine by my journal, and is in the state ordered.
    Running {
        /// How long it took to let it run, in microseconds; 0 when it stays paused.
        resume_us: u32,
    },
    /// T→S. The guest could not be resumed and never ran here. Its VMM has ended; it is yours
    /// again.
    Returned {
        /// Why, for people; at most [`MAX_TEXT`](crate::limits::MAX_TEXT) bytes.
        reason: String,
    },
    /// S→T. I know that the guest is yours.
    Finished,
    /// T→S. A page lane has died here; the source may not see that for long.
    LaneLost {
        /// Which.
        lane: LaneId,
        /// How that showed, for people; at most [`MAX_TEXT`](crate::limits::MAX_TEXT) bytes.
        text: String,
    },
    /// S→T. That lane is dead: end it for good, so that its pages can be sent again. A
    /// [`Message::Complete`] that was not yet acted upon is void.
    Fence(LaneId),
    /// T→S, the answer. Nothing of that lane is written to guest RAM any more.
    Fenced {
        /// Which.
        lane: LaneId,
        /// Whole frames of it that came, checked and in place: those before this sequence number.
        frames: u64,
        /// Pages of them that came after the lane's last end of a round.
        pages: u64,
    },
    /// T→S, before the [`Message::RoundDone`] of its round. A delta was not from what stands in that
    /// page here: the page is as it was before, and has to be sent again.
    Mismatch {
        /// The lane on which it came.
        lane: LaneId,
        /// The round in which it came.
        round: Round,
        /// The page's region, by its position in the offer.
        region: u16,
        /// The page, counted from the region's start.
        page: u64,
    },
    /// S→T, with [`Features::AHEAD`]. In these pages of a region there is data, which will come on the
    /// page lanes: room may be made for them. Nothing depends on it, and not all data need be told.
    Ahead {
        /// The region, by its position in the offer.
        region: u16,
        /// At least one, at most [`MAX_AHEAD_RUNS`](crate::limits::MAX_AHEAD_RUNS); in order, each
        /// with a page at least, none reaching into the next.
        runs: Vec<DataRun>,
    },
    /// S→T, with [`Features::POSTCOPY`], between the last round's end and [`Message::Complete`]. Pages
    /// that the guest is handed over without: whatever came of them is void, and they come on fetch
    /// lanes. Those that no such message tells of are in place.
    Absent(Absence),
    /// S→T, with the guest running still. Discard what was told to be absent, so that it need not be done
    /// while the guest stands.
    Discard,
    /// T→S, the answer. It is done.
    Discarded,
    /// Either way. I am here; no answer is due.
    Ping,
    /// S→T, after a [`Purpose::Inquire`]. Who owns the guest?
    Inquire,
    /// T→S. The answer, in the journal before it is sent.
    Answer(Verdict),
    /// Either way, the sender's last message. I give up.
    Abort {
        /// Why, for the peer.
        code: AbortCode,
        /// Why, for people; at most [`MAX_TEXT`](crate::limits::MAX_TEXT) bytes.
        text: String,
    },
}

impl Message {
    /// The message's kind, for errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Welcome(_) => "Welcome",
            Self::Prepared => "Prepared",
            Self::State { .. } => "State",
            Self::Paused => "Paused",
            Self::RoundDone { .. } => "RoundDone",
            Self::Complete { .. } => "Complete",
            Self::Ready { .. } => "Ready",
            Self::Go { .. } => "Go",
            Self::Running { .. } => "Running",
            Self::Returned { .. } => "Returned",
            Self::Finished => "Finished",
            Self::LaneLost { .. } => "LaneLost",
            Self::Fence(_) => "Fence",
            Self::Fenced { .. } => "Fenced",
            Self::Mismatch { .. } => "Mismatch",
            Self::Ahead { .. } => "Ahead",
            Self::Absent(_) => "Absent",
            Self::Discard => "Discard",
            Self::Discarded => "Discarded",
            Self::Ping => "Ping",
            Self::Inquire => "Inquire",
            Self::Answer(_) => "Answer",
            Self::Abort { .. } => "Abort",
        }
    }
}
