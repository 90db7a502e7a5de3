//! Every limit of the wire, by name.
//!
//! A peer's length or count is compared with one of these before anything is allocated for it, and a
//! sender never goes beyond them.

/// Lowest wire version that this crate speaks.
pub const LOWEST_VERSION: u16 = 1;

/// Highest wire version that this crate speaks.
pub const HIGHEST_VERSION: u16 = 1;

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
