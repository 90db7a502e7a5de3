//! A live-migration engine: it reads a guest's RAM, follows what the guest writes, hands it over to
//! another host, and knows at every moment whose it is.
//!
//! # The pieces
//!
//! | room | what |
//! |---|---|
//! | [`core`] | the two machines that decide everything: no I/O, no clock |
//! | [`vmm`] | what a VMM must offer to be migrated |
//! | [`job`] | a migration: how it is set up, watched, steered, and how it ends |
//! | [`journal`] | what must survive a crash: whose the guest is |
//! | [`link`] | the connections that it runs over; an embedder may bring its own |
//! | `host` | what other processes of the host can see and steer (feature `host`) |
//! | [`linux`] | dirty tracking and guest RAM of another process; the only unsafe code |
//! | `qemu` | a stock QEMU, driven from outside (feature `qemu`) |
//!
//! # A migration
//!
//! ```text
//!        source                                              target
//!          │ Hello (guest, RAM layout) ─────────────────────►  │
//!          │ ◄───────────────────────────────── Welcome        │
//!    track │ ◄───────────────────────────────── Prepared       │ RAM blank, VMM waits
//!          │ ═══ pages, round 1 (guest runs) ═══════════════►  │
//!          │ ◄───────────────────────────────── RoundDone      │
//!          │ ═══ pages written meanwhile, round 2, … ═══════►  │
//!    pause │ ═══ the last pages ════════════════════════════►  │
//!     save │ ─── device state ──────────────────────────────►  │ load, once RAM is complete
//!          │ ◄───────────────────────────────── Ready          │
//!    given │ Go ────────────────────────────────────────────►  │ taken
//!          │ ◄───────────────────────────────── Running        │ the guest runs
//! ```
//!
//! # Whose the guest is
//!
//! The source's until its journal says "given"; the target's from the moment its journal says
//! "taken"; in between nobody's, and it stands still. Trouble before Go keeps it. After Go only the
//! target's word counts: [`core::message::Outcome`] says which it was.
#![deny(unsafe_code)]

mod control;
pub mod core;
mod device_state;
mod dial;
mod greeting;
#[cfg(feature = "host")]
pub mod host;
pub mod job;
pub mod journal;
mod lanes;
#[allow(unsafe_code)]
pub mod linux;
mod near;
mod pacer;
mod postcopy;
#[cfg(feature = "qemu")]
pub mod qemu;
mod receive;
mod send;
pub mod vmm;
mod worker;

pub use control::Silence;
pub use core::encoding::Compression;
pub use core::throttle::Throttling;
pub use ferry_stream::{link, message};
pub use job::{Finished, Job, Migration, TargetJob};
pub use near::WithinHost;
pub use pacer::Bandwidth;

/// Keeps the README's example compiling.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
