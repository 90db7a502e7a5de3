//! Post-copy: the guest runs at the target, and its pages come after it.
//!
//! ```text
//!  source: Owed                                      target: Lacking
//!  owed ──take──► on its way ──Placed──► in place    missing ──claim──► being placed ──► there
//!    ▲                │                                 ▲                   │
//!    └── lane died ───┘                                 └── failed ─────────┘
//! ```
//!
//! Two rules make it safe, whatever is lost on the way. The source goes on owing a page until the
//! target says that it is in place; and the target places a page once: it is claimed before it is
//! placed, so that a late duplicate never overwrites what the guest has written since.

pub mod absence;
pub mod lacking;
pub mod latency;
pub mod owed;
#[cfg(test)]
mod tests;

pub use self::lacking::{Answer, FetchFigures, Lacking, Stalls};
pub use self::latency::{FaultFigures, Latencies};
pub use self::owed::{Owed, PageRun};

/// How far the way to post-copy is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// It is not to be had, or not wanted.
    #[default]
    Closed,
    /// Both sides are able to.
    Open,
    /// The guest is handed over as soon as can be.
    Due,
    /// It is being handed over, or has been, without all of its pages.
    Taken,
    /// Every page is at the target.
    Whole,
}
