//! Ferry against QEMU's own migration, side by side in one run.
//!
//! One guest goes from QEMU to QEMU, each time by another way in turn, so that whatever the machine
//! does meanwhile it does to all of them. Figures come from the guest's own counter: the total runs
//! from the client's start to the first progress at the target, the blackout is the longest time
//! without progress between the two. What either side claims about itself is not used.
#![forbid(unsafe_code)]

pub mod course;
pub mod peer;
pub mod report;
