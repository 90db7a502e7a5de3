//! Lanes: frames of one connection, read and written in order.
//!
//! The control lane is asynchronous and small; page lanes are blocking, each with a thread of its
//! own, since they spend their time in copies and system calls. Every lane checks place, order and
//! checksum of each frame, and is of no further use after its first error.

mod control;
mod fetch;
mod page;

pub use control::{ControlLane, ControlReader, ControlWriter};
pub use fetch::{FETCH_ROUND, Request, RequestReader, RequestWriter};
pub use page::{Incoming, PageBody, PageLaneReader, PageLaneWriter};
