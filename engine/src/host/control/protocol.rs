//! The lines of the protocol.

use std::io;
use std::num::NonZeroU64;
use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _};

use crate::core::meter::Progress;
use crate::pacer::Bandwidth;

/// The version of the protocol.
pub const VERSION: u32 = 1;

/// The longest line, its end included. An answer is some hundred bytes; paths in it may be long.
pub const MAX_LINE_BYTES: usize = 16 << 10;

/// The longest downtime limit: a day. Whoever wants more moves without `--live`.
pub const MAX_DOWNTIME_MS: u64 = 24 * 60 * 60 * 1000;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Command {
    /// How far it is. Answered by [`Answer::Info`].
    Info,
    /// Another limit of the bandwidth.
    SetSpeed {
        /// The limit.
        limit: Speed,
    },
    /// Another downtime limit.
    SetMaxDowntime {
        /// The limit, in milliseconds; at most [`MAX_DOWNTIME_MS`].
        ms: u64,
    },
    /// Hand the guest over now, before its pages. Answered when that has begun.
    Postcopy,
    /// Give up; the guest stays. Answered when that has begun.
    Abort,
}

/// A limit of the bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Speed {
    /// None.
    Unlimited,
    /// At most so many bytes a second.
    BytesPerS(NonZeroU64),
}

impl From<Speed> for Bandwidth {
    fn from(speed: Speed) -> Self {
        match speed {
            Speed::Unlimited => Self::Unlimited,
            Speed::BytesPerS(bytes) => Self::BytesPerSecond(bytes),
        }
    }
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Answer {
    /// How far it is.
    Info {
        /// The migration.
        job: Box<JobInfo>,
    },
    /// It is done as wanted.
    Done,
    /// It is not done.
    Refused {
        /// Why, for programs.
        code: RefusalCode,
        /// Why, for people.
        reason: String,
    },
}

/// Why something is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RefusalCode {
    /// That was no request.
    Malformed,
    /// A request of another version of the protocol.
    Version,
    /// A value that cannot be had.
    Invalid,
    /// There are too many clients.
    Busy,
    /// The guest is being handed over, or is gone.
    TooLate,
    /// The engine has not done it in time. It may still.
    Silent,
    /// Something that this version does not know.
    #[serde(other)]
    Other,
}

/// A running migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its name.
    pub name: String,
    /// The QMP socket of the guest, where there is one.
    pub qmp: Option<String>,
    /// Where the guest goes.
    pub target: String,
    /// The engine's process.
    pub engine_pid: u32,
    /// The limit of the bandwidth in bytes a second; none when there is none.
    pub bandwidth_bytes_per_s: Option<NonZeroU64>,
    /// How far it is.
    #[serde(flatten)]
    pub figures: Figures,
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// What is going on, as [`crate::core::message::Phase::name`] has it.
    pub phase: String,
    /// The same for people.
    pub doing: String,
    /// Of the whole move, as far as that can be told.
    pub percent: u8,
    /// The round at work; 0 before the first.
    pub round: u32,
    /// Since the start.
    pub elapsed_ms: u64,
    /// Guest RAM dealt with in this round.
    pub done_bytes: u64,
    /// Guest RAM still to send in this round.
    pub remaining_bytes: u64,
    /// On the wire so far.
    pub bytes_wire: u64,
    /// What the lanes bring over, in bytes of pages.
    pub rate_bytes_per_s: u64,
    /// What the guest writes.
    pub dirty_bytes_per_s: u64,
    /// The blackout if the guest were stopped now; none before the first round is over.
    pub predicted_blackout_ms: Option<u64>,
    /// The downtime limit.
    pub max_downtime_ms: u64,
    /// By how much the guest is slowed, in percent of its time.
    #[serde(default)]
    pub throttled_percent: u8,
    /// The most that it was slowed by so far.
    #[serde(default)]
    pub throttled_percent_max: u8,
    /// To the end of this round at the present rate.
    pub left_ms: Option<u64>,
    /// Page lanes that stand.
    pub lanes: u16,
    /// Page lanes that died, or could not be opened.
    pub lanes_lost: u32,
    /// How pages are packed; none when they are not.
    pub compression: Option<Packed>,
}

/// How pages are packed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Packed {
    /// In which way most of them.
    pub with: String,
    /// Bytes of all pages for each byte sent of them.
    pub ratio: f64,
}

impl From<&Progress> for Figures {
    fn from(look: &Progress) -> Self {
        let with = look.encoding.most_used();
        Self {
            phase: look.phase.name().to_owned(),
            doing: look.phase.to_string(),
            percent: look.percent_of_move(),
            round: look.round,
            elapsed_ms: ms(look.elapsed),
            done_bytes: look.done_bytes,
            remaining_bytes: look.remaining_bytes,
            bytes_wire: look.bytes_wire,
            rate_bytes_per_s: look.rate_bytes_per_s,
            dirty_bytes_per_s: look.dirty_bytes_per_s,
            predicted_blackout_ms: look.predicted_blackout.map(ms),
            max_downtime_ms: ms(look.downtime_limit),
            throttled_percent: look.throttled_percent,
            throttled_percent_max: look.throttled_percent_max,
            left_ms: look.left.map(ms),
            lanes: look.lanes,
            lanes_lost: look.lanes_lost,
            compression: with.map(|with| Packed {
                with: with.to_owned(),
                ratio: look.encoding.ratio(),
            }),
        }
    }
}

fn ms(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// What every line says before anything else.
#[derive(Serialize, Deserialize)]
struct Line<T> {
    version: u32,
    #[serde(flatten)]
    body: T,
}

/// The part of a line that every version has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// Why a line cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LineError {
    #[error("a line is one JSON object with a version and what that version knows")]
    Malformed,
    #[error("the line is of version {found} of the control protocol, and {VERSION} is spoken here")]
    Version { found: u32 },
}

/// The line that says `body`.
pub(super) fn encode<T: Serialize>(body: T) -> Vec<u8> {
    let line = Line {
        version: VERSION,
        body,
    };
    let mut text =
        serde_json::to_vec(&line).expect("strings and numbers under names are always JSON");
    text.push(b'\n');
    text
}

/// What a line says.
pub(super) fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, LineError> {
    let malformed = |_| LineError::Malformed;
    let Versioned { version } = serde_json::from_slice(line).map_err(malformed)?;
    if version != VERSION {
        return Err(LineError::Version { found: version });
    }
    let line: Line<T> = serde_json::from_slice(line).map_err(malformed)?;
    Ok(line.body)
}

/// How reading a line ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// It is whole.
    Line,
    /// The peer has gone, perhaps in the middle of a line.
    End,
    /// It has no end within [`MAX_LINE_BYTES`].
    TooLong,
}

/// Replaces `line` by the next one, of which no more than the limit is ever held.
pub(super) async fn read_line<R>(reader: &mut R, line: &mut Vec<u8>) -> io::Result<Came>
where
    R: AsyncBufRead + Unpin,
{
    line.clear();
    let mut bounded = reader.take(MAX_LINE_BYTES as u64);
    bounded.read_until(b'\n', line).await?;
    Ok(match line.last() {
        Some(b'\n') => Came::Line,
        _ if line.len() == MAX_LINE_BYTES => Came::TooLong,
        _ => Came::End,
    })
}
