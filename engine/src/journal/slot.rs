//! The bytes of a journal's slot.
//!
//! Magic (4), version u16, record u8, wanted state u8, number u64, session (16), length of the peer
//! u16, the peer, zeros, and in the last four bytes the CRC32 of all before. Little-endian.

use ferry_stream::message::SessionId;

use super::Entry;
use crate::core::message::Record;
use crate::vmm::RunState;

/// Bytes in a slot: one sector, which a disk writes whole or not at all.
pub(super) const SLOT_BYTES: usize = 512;

/// Longest peer address that is kept, in bytes.
pub(super) const MAX_PEER: usize = 256;

const MAGIC: [u8; 4] = *b"FJNL";

const VERSION: u16 = 1;

pub(super) const VERSION_AT: usize = 4;
pub(super) const RECORD_AT: usize = 6;
const WANTED_AT: usize = 7;
const NUMBER_AT: usize = 8;
const SESSION_AT: usize = 16;
pub(super) const PEER_AT: usize = 34;
pub(super) const CRC_AT: usize = SLOT_BYTES - 4;

pub(super) fn encode(number: u64, entry: &Entry) -> [u8; SLOT_BYTES] {
    let mut slot = [0; SLOT_BYTES];
    let peer = entry.peer.as_bytes();
    slot[..4].copy_from_slice(&MAGIC);
    slot[VERSION_AT..RECORD_AT].copy_from_slice(&VERSION.to_le_bytes());
    slot[RECORD_AT] = record_number(entry.record);
    slot[WANTED_AT] = wanted_number(entry.wanted);
    slot[NUMBER_AT..NUMBER_AT + 8].copy_from_slice(&number.to_le_bytes());
    slot[SESSION_AT..SESSION_AT + 16].copy_from_slice(&entry.session.0);
    let length = u16::try_from(peer.len()).expect("a peer is shortened to MAX_PEER");
    slot[PEER_AT - 2..PEER_AT].copy_from_slice(&length.to_le_bytes());
    slot[PEER_AT..PEER_AT + peer.len()].copy_from_slice(peer);
    let crc = crc32fast::hash(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// What is in a slot.
pub(super) enum Slot {
    /// It was never written.
    Blank,
    /// It was not written to its end, or is damaged.
    Torn,
    /// It was written by another version.
    Foreign,
    Whole {
        number: u64,
        entry: Entry,
    },
}

pub(super) fn decode(slot: &[u8; SLOT_BYTES]) -> Slot {
    if slot.iter().all(|byte| *byte == 0) {
        return Slot::Blank;
    }
    if slot[..VERSION_AT] != MAGIC {
        return Slot::Torn;
    }
    if slot[VERSION_AT..RECORD_AT] != VERSION.to_le_bytes() {
        return Slot::Foreign;
    }
    if slot[CRC_AT..] != crc32fast::hash(&slot[..CRC_AT]).to_le_bytes() {
        return Slot::Torn;
    }
    // It is as somebody meant it.
    match parse(slot) {
        Some((number, entry)) => Slot::Whole { number, entry },
        None => Slot::Foreign,
    }
}

fn parse(slot: &[u8; SLOT_BYTES]) -> Option<(u64, Entry)> {
    let number = u64::from_le_bytes(slot[NUMBER_AT..NUMBER_AT + 8].try_into().ok()?);
    let session = SessionId(slot[SESSION_AT..SESSION_AT + 16].try_into().ok()?);
    let length = u16::from_le_bytes(slot[PEER_AT - 2..PEER_AT].try_into().ok()?);
    let peer = slot[..CRC_AT].get(PEER_AT..PEER_AT + usize::from(length))?;
    let wanted = |wanted: &Option<RunState>| wanted_number(*wanted) == slot[WANTED_AT];
    let entry = Entry {
        session,
        record: parse_record(slot[RECORD_AT])?,
        peer: String::from_utf8(peer.to_vec()).ok()?,
        wanted: WANTED.into_iter().find(wanted)?,
    };
    Some((number, entry))
}

const fn wanted_number(wanted: Option<RunState>) -> u8 {
    match wanted {
        None => 0,
        Some(RunState::Running) => 1,
        Some(RunState::Paused) => 2,
    }
}

const WANTED: [Option<RunState>; 3] = [None, Some(RunState::Running), Some(RunState::Paused)];

pub(super) const RECORDS: [Record; 8] = [
    Record::Migrating,
    Record::Given,
    Record::Moved,
    Record::Kept,
    Record::Receiving,
    Record::Taken,
    Record::Refused,
    Record::Returned,
];

/// Records are numbered from 1, so that a slot of zeros is none.
fn record_number(record: Record) -> u8 {
    match record {
        Record::Migrating => 1,
        Record::Given => 2,
        Record::Moved => 3,
        Record::Kept => 4,
        Record::Receiving => 5,
        Record::Taken => 6,
        Record::Refused => 7,
        Record::Returned => 8,
    }
}

fn parse_record(number: u8) -> Option<Record> {
    RECORDS
        .into_iter()
        .find(|record| record_number(*record) == number)
}

/// What the slots say together; nothing when that cannot be told.
///
/// One torn slot beside a whole one is the write in which an engine died: the other holds what was
/// true until then. Alone it may have said anything.
pub(super) fn newest(slots: Vec<Slot>) -> Option<(u64, Option<Entry>)> {
    let is_torn = slots.iter().any(|slot| matches!(slot, Slot::Torn));
    let mut newest = None;
    for slot in slots {
        match slot {
            Slot::Foreign => return None,
            Slot::Whole { number, entry }
                if newest.as_ref().is_none_or(|(last, _)| number > *last) =>
            {
                newest = Some((number, Some(entry)));
            }
            Slot::Whole { .. } | Slot::Blank | Slot::Torn => {}
        }
    }
    newest.or_else(|| (!is_torn).then_some((0, None)))
}

pub(super) fn shorten(peer: &str) -> &str {
    let mut end = peer.len().min(MAX_PEER);
    while !peer.is_char_boundary(end) {
        end -= 1;
    }
    &peer[..end]
}
