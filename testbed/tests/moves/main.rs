//! Real guests move with the `ferry` command, and their own checks say whether anything was lost.
//!
//! What must hold of every move is asserted in one place, [`pair`], so that a test tells only what is
//! special about it.

mod pair;
mod postcopy;

mod ahead;
mod caches;
mod compression;
mod deltas;
mod devices;
mod giving_up;
mod happenings;
mod lanes;
mod layouts;
mod modes;
mod near;
mod refusals;
mod steering;
mod throttle;
mod versions;
