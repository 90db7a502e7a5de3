//! A live-migration engine: it reads a guest's RAM, follows what the guest writes, hands it over to
//! another host, and knows at every moment whose it is.
#![deny(unsafe_code)]

mod control;
pub mod core;
mod device_state;
pub mod job;
pub mod journal;
mod lanes;
#[allow(unsafe_code)]
pub mod linux;
mod pacer;
#[cfg(feature = "qemu")]
pub mod qemu;
mod receive;
mod send;
pub mod vmm;
mod worker;

pub use control::Silence;
pub use ferry_stream::{link, message};
pub use job::{Finished, Job, Migration, TargetJob};
pub use pacer::Bandwidth;
