//! The simulated world: both machines of the core, two guests, a network and a clock, in one thread
//! and under one seed.
//!
//! The machines are the engine's own; everything around them is made of numbers. A seed decides the
//! job, the speed of everything and what goes wrong: links are cut, actions fail, guests reset, people
//! cancel, peers talk nonsense. After every step the one-owner law is checked, at the hand-over every
//! page, and at the end whether both sides tell the same story. The same seed makes the same world,
//! so whatever was found can be replayed with a trace.

mod checks;
mod deltas;
mod end;
mod event;
mod fences;
mod flaw;
mod guest;
mod judge;
mod lanes;
mod link;
mod mischief;
mod net;
mod plan;
mod rng;
mod scan;
mod source_end;
mod target_end;
mod trace;
mod worker;
mod world;

use std::time::Duration;

pub use self::checks::{Ending, Violation};
pub use self::flaw::Flaw;
pub use self::plan::Side;

use self::world::{Tracing, World};

/// How the world of a seed ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// At the source.
    pub source: Ending,
    /// At the target.
    pub target: Ending,
    /// Why the guest did not move, in the source's words; `None` when it did.
    pub reason: Option<&'static str>,
    /// Simulated time.
    pub lasted: Duration,
    /// Events.
    pub steps: u64,
    /// Page lanes that the source lost.
    pub lanes_lost: u32,
    /// The most that the guest was slowed by, in percent of its time.
    pub throttled_percent: u8,
    /// Pages told as deltas.
    pub deltas: u64,
    /// Pages told by name alone, which the target took from the source's RAM.
    pub shared: u64,
    /// Those of them that did not fit what the target had.
    pub mismatches: u64,
}

/// Lets the world of `seed` happen.
pub fn run(seed: u64, flaw: Option<Flaw>) -> Result<Summary, Violation> {
    let mut world = World::new(seed, flaw, Tracing::Off);
    world.run()?;
    Ok(world.summary())
}

/// Lets the world of `seed` happen again, and tells what happened in it, a line for each step.
pub fn trace(seed: u64, flaw: Option<Flaw>) -> (Result<Summary, Violation>, Vec<String>) {
    let mut world = World::new(seed, flaw, Tracing::On);
    let result = world.run().map(|()| world.summary());
    (result, world.into_trace())
}
