//! The pure core: no I/O, no clock, no unsafe code.

pub mod blackout;
pub mod converge;
pub mod encoding;
pub mod growth;
pub(crate) mod heat;
pub mod layout;
pub mod message;
pub mod meter;
pub mod outcome;
pub mod pageset;
pub mod postcopy;
pub mod source;
pub mod target;
pub mod throttle;
