//! Every limit of the wire, by name.
//!
//! A peer's length or count is compared with one of these before anything is allocated for it, and
//! a sender never goes beyond them.

/// Lowest wire version that this crate speaks.
pub const LOWEST_VERSION: u16 = 2;

/// Highest wire version that this crate speaks.
pub const HIGHEST_VERSION: u16 = 2;

/// Most RAM regions in an offer.
pub const MAX_REGIONS: usize = 512;

/// Longest name in bytes: of a RAM region, an architecture, a machine type, a VMM.
pub const MAX_NAME: usize = 255;

/// Longest explanation in bytes, in an abort or a return.
pub const MAX_TEXT: usize = 1024;

/// Most page lanes of one migration.
pub const MAX_LANES: u16 = 64;

/// Most bytes of device state in one message.
pub const MAX_STATE_CHUNK: usize = 256 << 10;

/// Most bytes of device state in one migration: what a target may have to hold back until all RAM
/// is in place.
pub const MAX_STATE_BYTES: u64 = 1 << 30;

/// Bytes in a page, the unit that page frames count in.
pub const PAGE_BYTES: usize = 4096;

/// Most records in a page frame.
pub const MAX_RECORDS: usize = 1024;

/// Most pages whose bytes are in one page frame, of all its records together.
pub const MAX_RAW_PAGES: u32 = 256;

/// Most bytes of page data in a page frame.
pub const MAX_PAGE_DATA: usize = MAX_RAW_PAGES as usize * PAGE_BYTES;

/// Most runs of pages in one message that tells where the source has data.
pub const MAX_AHEAD_RUNS: usize = 1024;

/// Bytes of each of them.
pub(crate) const AHEAD_RUN_BYTES: usize = 16;

/// Most bytes of a map that tells of pages singly which are missing.
pub const MAX_MAP_BYTES: usize = 32 << 10;

/// Most pages in one, a bit for each.
pub const MAX_MAPPED_PAGES: u64 = MAX_MAP_BYTES as u64 * 8;

/// Most bytes of a delta: with a longer one its page had better travel as it is.
pub const MAX_DELTA_BYTES: usize = PAGE_BYTES / 2;

/// Most pages that a source may tell others from: it keeps what it sent of so many at one time, and
/// after a round in which one did not match tells no more deltas. So many mismatches are the most that
/// a target has to tell.
pub const MAX_BASES: u32 = 4096;

/// Most pages in one zero record: it costs the wire nothing, but the receiver time.
pub const MAX_ZERO_PAGES: u32 = 1 << 16;

/// Most pages in one shared record: it costs the wire nothing, but the receiver a copy, after which the
/// next byte of the lane is read.
pub const MAX_SHARED_PAGES: u32 = 1 << 12;

/// First page number past the largest region: every byte offset below it fits 64 bits.
pub const PAGE_NUMBER_END: u64 = 1 << 52;

/// Least room in bytes that a reader of the control lane offers the socket at a time.
pub(crate) const READ_CHUNK: usize = 16 << 10;
