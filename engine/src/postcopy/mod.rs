//! The lanes of post-copy: [`server`] at the source, [`fetcher`] at the target.
//!
//! Each lane is a connection of its own with a thread at either end, and none of them needs the control
//! lane, or a word of the VMM: once the guest runs at the target only these matter. A lane that dies is
//! dialled again for as long as pages are missing; what it had not brought is owed again.
//!
//! | lane | source to target | target to source |
//! |---|---|---|
//! | 1, for faults | pages that are waited for, and what lies behind them | faults, counts |
//! | 2, for the sweep | everything else, a few frames ahead of what is in place | counts |

pub(crate) mod fetcher;
pub(crate) mod resume;
pub(crate) mod server;

use ferry_stream::message::LaneIndex;

/// The lane on which faults are told and answered.
pub(crate) const FAULT_LANE: LaneIndex = LaneIndex(1);

/// How many fetch lanes a migration has.
pub(crate) const FETCH_LANES: u16 = 2;
