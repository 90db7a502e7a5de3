//! The migration wire: frames, codecs, lanes.
//!
//! Pages are bytes with an address here; nothing in this crate knows a VMM or decides anything.
//! What the two engines say is in [`message`], how pages travel in [`pages`], the two kinds of lanes
//! in [`lane`], and what they run over in [`link`].
//!
//! Nothing that a peer sends can panic, allocate beyond the named [`limits`], or come out as
//! another message than was sent: it is an [`Error`], and the lane is of no further use.
#![doc = include_str!("wire.md")]
#![doc = concat!("```text\n", include_str!("golden.txt"), "```")]
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
