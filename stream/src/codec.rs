//! The payloads of control messages.
//!
//! Numbers are little-endian; a text is its length (u16) and its UTF-8 bytes. The same
//! [`check`](Message::check) guards both directions, so that a side cannot send what the other
//! refuses.

mod fields;

use bytes::{BufMut, Bytes, BytesMut};

use self::fields::Fields;
use crate::error::Error;
use crate::frame::Kind;
use crate::limits::{
    MAX_AHEAD_RUNS, MAX_LANES, MAX_MAPPED_PAGES, MAX_NAME, MAX_REGIONS, MAX_STATE_BYTES,
    MAX_STATE_CHUNK, MAX_TEXT, PAGE_NUMBER_END,
};
use crate::message::{
    AbortCode, Absence, DataRun, Hello, LaneId, LaneIndex, Message, Mode, Offer, Purpose, Run,
    Verdict, Versions,
};

impl Message {
    /// The kind of frame that carries it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Welcome(_) => Kind::Welcome,
            Self::Prepared => Kind::Prepared,
            Self::State { .. } => Kind::State,
            Self::Paused => Kind::Paused,
            Self::RoundDone { .. } => Kind::RoundDone,
            Self::Complete { .. } => Kind::Complete,
            Self::Ready { .. } => Kind::Ready,
            Self::Go { .. } => Kind::Go,
            Self::Running { .. } => Kind::Running,
            Self::Returned { .. } => Kind::Returned,
            Self::Finished => Kind::Finished,
            Self::LaneLost { .. } => Kind::LaneLost,
            Self::Fence(_) => Kind::Fence,
            Self::Fenced { .. } => Kind::Fenced,
            Self::Mismatch { .. } => Kind::Mismatch,
            Self::Ahead { .. } => Kind::Ahead,
            Self::Absent(_) => Kind::Absent,
            Self::Discard => Kind::Discard,
            Self::Discarded => Kind::Discarded,
            Self::Ping => Kind::Ping,
            Self::Inquire => Kind::Inquire,
            Self::Answer(_) => Kind::Answer,
            Self::Abort { .. } => Kind::Abort,
        }
    }

    /// Appends the payload to `out`. Texts for people are shortened and cleaned; everything else
    /// that breaks a limit is an error.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), Error> {
        self.check()?;
        match self {
            Self::Hello(hello) => put_hello(out, hello),
            Self::Welcome(welcome) => {
                out.put_u16_le(welcome.version);
                out.put_u64_le(welcome.features.0);
                out.put_u16_le(welcome.lanes);
            }
            Self::State { offset, bytes } => {
                out.put_u64_le(*offset);
                out.put_slice(bytes);
            }
            Self::RoundDone { round, pages } => {
                out.put_u32_le(round.0);
                out.put_u64_le(*pages);
            }
            Self::Complete {
                round,
                pages,
                state_bytes,
                state_crc,
            } => {
                out.put_u32_le(round.0);
                out.put_u64_le(*pages);
                out.put_u64_le(*state_bytes);
                out.put_u32_le(*state_crc);
            }
            Self::Go { run } => out.put_u8(match run {
                Run::Run => 1,
                Run::StayPaused => 2,
            }),
            Self::Ready { load_us } => out.put_u32_le(*load_us),
            Self::Running { resume_us } => out.put_u32_le(*resume_us),
            Self::LaneLost { lane, text } => {
                put_lane(out, *lane);
                put_text(out, &clean(text));
            }
            Self::Fence(lane) => put_lane(out, *lane),
            Self::Fenced {
                lane,
                frames,
                pages,
            } => {
                put_lane(out, *lane);
                out.put_u64_le(*frames);
                out.put_u64_le(*pages);
            }
            Self::Mismatch {
                lane,
                round,
                region,
                page,
            } => {
                put_lane(out, *lane);
                out.put_u32_le(round.0);
                out.put_u16_le(*region);
                out.put_u64_le(*page);
            }
            Self::Ahead { region, runs } => put_ahead(out, *region, runs),
            Self::Absent(absence) => put_absence(out, absence),
            Self::Returned { reason } => put_text(out, &clean(reason)),
            Self::Answer(verdict) => out.put_u8(match verdict {
                Verdict::Taken => 1,
                Verdict::Refused => 2,
                Verdict::Returned => 3,
            }),
            Self::Abort { code, text } => {
                out.put_u16_le(code.number());
                put_text(out, &clean(text));
            }
            Self::Prepared
            | Self::Paused
            | Self::Finished
            | Self::Discard
            | Self::Discarded
            | Self::Ping
            | Self::Inquire => {}
        }
        Ok(())
    }

    /// Reads the payload of a frame of kind `kind`.
    pub fn decode(kind: Kind, payload: Bytes) -> Result<Self, Error> {
        let mut fields = Fields::new(kind, payload);
        let message = fields.message()?;
        fields.finish()?;
        message.check()?;
        Ok(message)
    }

    /// Refuses a message that breaks a limit, or contradicts itself.
    fn check(&self) -> Result<(), Error> {
        let kind = self.kind();
        match self {
            Self::Hello(hello) => check_hello(hello),
            Self::Welcome(welcome) => {
                bounded(kind, "the number of lanes", welcome.lanes, 0, MAX_LANES)
            }
            Self::State { offset, bytes } => {
                let length = bytes.len() as u64;
                bounded(kind, "the length", length, 1, MAX_STATE_CHUNK as u64)?;
                bounded(kind, "the offset", *offset, 0, MAX_STATE_BYTES - length)
            }
            Self::RoundDone { round, .. } => bounded(kind, "the round", round.0, 1, u32::MAX),
            Self::Complete {
                round, state_bytes, ..
            } => {
                // 0 where nothing was sent before the guest was handed over.
                bounded(kind, "the round", round.0, 0, u32::MAX)?;
                let length = *state_bytes;
                bounded(kind, "the state's length", length, 0, MAX_STATE_BYTES)
            }
            Self::LaneLost { lane, .. } | Self::Fence(lane) | Self::Fenced { lane, .. } => {
                check_lane(kind, *lane)
            }
            Self::Mismatch {
                lane, round, page, ..
            } => {
                check_lane(kind, *lane)?;
                bounded(kind, "the round", round.0, 1, u32::MAX)?;
                bounded(kind, "the page", *page, 0, PAGE_NUMBER_END - 1)
            }
            Self::Ahead { region, runs } => check_ahead(*region, runs),
            Self::Absent(absence) => check_absence(kind, absence),
            Self::Prepared
            | Self::Paused
            | Self::Discard
            | Self::Discarded
            | Self::Ready { .. }
            | Self::Go { .. }
            | Self::Running { .. }
            | Self::Returned { .. }
            | Self::Finished
            | Self::Ping
            | Self::Inquire
            | Self::Answer(_)
            | Self::Abort { .. } => Ok(()),
        }
    }
}

fn check_hello(hello: &Hello) -> Result<(), Error> {
    let kind = Kind::Hello;
    let Versions { lowest, highest } = hello.versions;
    bounded(kind, "the lowest version", lowest, 1, highest)?;
    if let Purpose::Lane(lane) | Purpose::Fetch(lane) = hello.purpose {
        check_lane(kind, lane)?;
    }
    let has_offer = u64::from(hello.offer.is_some());
    let needs_offer = u64::from(hello.purpose == Purpose::Migrate);
    bounded(
        kind,
        "the number of offers",
        has_offer,
        needs_offer,
        needs_offer,
    )?;
    hello.offer.as_ref().map_or(Ok(()), check_offer)
}

fn check_lane(kind: Kind, lane: LaneId) -> Result<(), Error> {
    bounded(kind, "the lane", lane.index.0, 1, MAX_LANES)
}

/// In order and apart: so what one message asks for is bounded by a region's size.
fn check_ahead(region: u16, runs: &[DataRun]) -> Result<(), Error> {
    let kind = Kind::Ahead;
    let regions = MAX_REGIONS as u64;
    bounded(kind, "the region", u64::from(region), 0, regions - 1)?;
    let (count, most) = (runs.len() as u64, MAX_AHEAD_RUNS as u64);
    bounded(kind, "the number of runs", count, 1, most)?;
    let mut free = 0;
    for DataRun { first, count } in runs {
        bounded(
            kind,
            "a run's first page",
            *first,
            free,
            PAGE_NUMBER_END - 1,
        )?;
        let most = PAGE_NUMBER_END - first;
        bounded(kind, "a run's length", *count, 1, most)?;
        free = first + count;
    }
    Ok(())
}

pub(crate) fn check_absence(kind: Kind, absence: &Absence) -> Result<(), Error> {
    let Absence {
        region,
        first,
        count,
        map,
    } = absence;
    let regions = MAX_REGIONS as u64;
    bounded(kind, "the region", u64::from(*region), 0, regions - 1)?;
    bounded(kind, "the first page", *first, 0, PAGE_NUMBER_END - 1)?;
    bounded(
        kind,
        "the number of pages",
        *count,
        1,
        PAGE_NUMBER_END - first,
    )?;
    if map.is_empty() {
        return Ok(());
    }
    bounded(kind, "the number of pages", *count, 1, MAX_MAPPED_PAGES)?;
    let (bytes, due) = (map.len() as u64, count.div_ceil(8));
    bounded(kind, "the length of the map", bytes, due, due)?;
    let spare = match count % 8 {
        0 => 0,
        used => map.last().map_or(0, |last| last >> used),
    };
    bounded(kind, "the end of the map", spare, 0, 0)
}

fn check_offer(offer: &Offer) -> Result<(), Error> {
    let kind = Kind::Hello;
    check_name("the architecture", &offer.arch)?;
    check_name("the machine type", &offer.machine)?;
    check_name("the VMM's name", &offer.vmm)?;
    bounded(kind, "the number of lanes", offer.lanes, 1, MAX_LANES)?;
    let regions = offer.regions.len();
    bounded(
        kind,
        "the number of regions",
        regions as u64,
        1,
        MAX_REGIONS as u64,
    )?;
    offer
        .regions
        .iter()
        .try_for_each(|region| check_name("a region's name", &region.name))
}

/// Names reach terminals and logs: no control characters.
fn check_name(field: &'static str, name: &str) -> Result<(), Error> {
    let kind = Kind::Hello;
    bounded(kind, field, name.len() as u64, 1, MAX_NAME as u64)?;
    if name.chars().any(char::is_control) {
        return Err(Error::BadText { kind, field });
    }
    Ok(())
}

fn bounded<N>(kind: Kind, field: &'static str, found: N, least: N, most: N) -> Result<(), Error>
where
    N: Copy + PartialOrd + Into<u64>,
{
    if found < least || found > most {
        return Err(Error::BadField {
            kind,
            field,
            found: found.into(),
        });
    }
    Ok(())
}

/// In the place of a lane where a hello is not about one.
const NO_LANE: LaneId = LaneId::first(LaneIndex::CONTROL);

fn put_lane(out: &mut BytesMut, lane: LaneId) {
    out.put_u16_le(lane.index.0);
    out.put_u16_le(lane.generation.0);
}

fn put_ahead(out: &mut BytesMut, region: u16, runs: &[DataRun]) {
    out.put_u16_le(region);
    put_length(out, runs.len());
    for run in runs {
        out.put_u64_le(run.first);
        out.put_u64_le(run.count);
    }
}

/// Reads the payload of a frame that tells which pages are missing.
pub(crate) fn absence(kind: Kind, payload: Bytes) -> Result<Absence, Error> {
    Fields::new(kind, payload).absence()
}

pub(crate) fn put_absence(out: &mut BytesMut, absence: &Absence) {
    out.put_u16_le(absence.region);
    out.put_u64_le(absence.first);
    out.put_u64_le(absence.count);
    out.put_slice(&absence.map);
}

fn put_hello(out: &mut BytesMut, hello: &Hello) {
    out.put_u16_le(hello.versions.lowest);
    out.put_u16_le(hello.versions.highest);
    out.put_u64_le(hello.features.0);
    out.put_slice(&hello.session.0);
    let (purpose, lane) = match hello.purpose {
        Purpose::Migrate => (1, NO_LANE),
        Purpose::Lane(lane) => (2, lane),
        Purpose::Inquire => (3, NO_LANE),
        Purpose::Fetch(lane) => (4, lane),
    };
    out.put_u8(purpose);
    put_lane(out, lane);
    if let Some(offer) = &hello.offer {
        put_offer(out, offer);
    }
}

fn put_offer(out: &mut BytesMut, offer: &Offer) {
    out.put_u8(match offer.mode {
        Mode::Live => 1,
        Mode::Paused => 2,
    });
    out.put_u16_le(offer.lanes);
    put_text(out, &offer.arch);
    put_text(out, &offer.machine);
    put_text(out, &offer.vmm);
    put_length(out, offer.regions.len());
    for region in &offer.regions {
        put_text(out, &region.name);
        out.put_u64_le(region.bytes);
        out.put_u32_le(region.backing_page_bytes);
    }
}

fn put_text(out: &mut BytesMut, text: &str) {
    put_length(out, text.len());
    out.put_slice(text.as_bytes());
}

fn put_length(out: &mut BytesMut, length: usize) {
    let length = u16::try_from(length).expect("every list and text was checked against its limit");
    out.put_u16_le(length);
}

/// A text for people: without control characters, at most [`MAX_TEXT`] bytes.
fn clean(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let printable = |letter: char| if letter.is_control() { ' ' } else { letter };
    // Control characters of two bytes become one: never longer.
    text[..end].chars().map(printable).collect()
}

impl AbortCode {
    /// Its number on the wire.
    pub fn number(self) -> u16 {
        match self {
            Self::Cancelled => 1,
            Self::Version => 2,
            Self::Layout => 3,
            Self::Machine => 4,
            Self::Busy => 5,
            Self::Session => 6,
            Self::Protocol => 7,
            Self::Corrupt => 8,
            Self::Vmm => 9,
            Self::Memory => 10,
            Self::GuestGone => 11,
            Self::Internal => 12,
            Self::Timeout => 13,
            Self::Unknown(number) => number,
        }
    }

    /// The code with this number.
    pub fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Cancelled,
            2 => Self::Version,
            3 => Self::Layout,
            4 => Self::Machine,
            5 => Self::Busy,
            6 => Self::Session,
            7 => Self::Protocol,
            8 => Self::Corrupt,
            9 => Self::Vmm,
            10 => Self::Memory,
            11 => Self::GuestGone,
            12 => Self::Internal,
            13 => Self::Timeout,
            unknown => Self::Unknown(unknown),
        }
    }
}
