//! The pure core: no I/O, no clock, no unsafe code.

pub mod layout;
pub mod pageset;
