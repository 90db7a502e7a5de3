//! The migration wire: frames, codecs, lanes. Pages are bytes with an address; nothing here knows a
//! VMM or decides anything.
#![forbid(unsafe_code)]

pub mod limits;
pub mod message;
