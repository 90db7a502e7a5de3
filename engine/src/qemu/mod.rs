//! The QEMU adapter: a stock QEMU, driven from outside over QMP.
//!
//! Guest RAM is never QEMU's business: it is found ([`Qemu::attach`]), read and tracked from here.
//! Everything else, the device state, is carried by QEMU's own `migrate` with `x-ignore-shared`,
//! between QEMU and local sockets of ours, so that no QEMU ever depends on the other and the engine
//! alone decides what is loaded when.
//!
//! ```text
//!  source                                          target (-incoming defer)
//!  open      capabilities, a socket                prepare   stop (clears autostart), capabilities,
//!  pause     migrate; STOP, pre-switchover                   migrate-incoming
//!              │ early bytes ─────────────────────►  load    bytes into QEMU's socket …
//!            [collect, send]
//!  save      migrate-continue; completed
//!              │ the rest ────────────────────────►          … completed, paused
//!            [collect, send]                       resume    cont
//!  abandon   migrate_cancel, or nothing after completed: cont works
//!  restore   capabilities and parameters as they were
//! ```
//!
//! The traits are synchronous and belong to one VM thread; QMP is asynchronous. So every method
//! blocks on the runtime within which [`Qemu::attach`] was called, and must not be called from one of
//! that runtime's own threads.

mod attach;
mod checks;
mod flatview;
mod flush;
mod guest;
mod incoming;
mod inventory;
mod limits;
mod monitor;
mod outgoing;
mod ram;
mod settings;
mod socket;
mod state;
mod throttle;

pub use attach::{Options, Qemu};
pub use checks::{Problem, ProblemCode};
pub use guest::QemuGuest;
pub use settings::Side;
pub use state::QemuState;
