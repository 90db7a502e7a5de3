//! The migration wire: frames, codecs, lanes. Pages are bytes with an address; nothing here knows a
//! VMM or decides anything.
#![forbid(unsafe_code)]

mod codec;
pub mod error;
pub mod frame;
pub mod lane;
pub mod limits;
pub mod link;
pub mod message;
pub mod pages;

pub use error::Error;
