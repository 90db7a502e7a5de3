//! Linux as the engine needs it: the only unsafe code of the project.
//!
//! A guest's VMM is another process, and it is not asked for help. So everything here works on a
//! process from outside:
//!
//! | module | gives |
//! |---|---|
//! | [`pidfd`] | a process that cannot be mistaken for a later one with the same number |
//! | [`inject`] | one system call, run by that process |
//! | [`uffd`] | a userfaultfd, whichever address space it belongs to |
//! | [`pagemap`] | which of the process's pages were written |
//! | [`maps`] | its mappings, parsed |
//! | [`ram_file`], [`mapping`] | the file behind its guest RAM, opened through its own descriptors |
//! | [`tracker`], [`shared_ram`] | the two put together as [`Tracker`](crate::vmm::Tracker) and [`Ram`](crate::vmm::Ram) |
//! | [`faults`] | the pages that a guest runs without, as [`Faults`](crate::vmm::Faults) |
//! | [`passing`] | descriptors that go from process to process |
//! | [`priority`] | threads that give way to all others |
//! | [`quota`] | less time for some of the process's threads |
//! | [`socket`] | how much of what was written to a socket is still queued |
//! | [`preflight`] | whether any of it will work, and what to do if not |

pub mod error;
pub mod faults;
mod holes;
pub mod inject;
pub mod mapping;
pub mod maps;
mod page_bits;
pub mod pagemap;
pub mod passing;
pub mod pidfd;
pub mod preflight;
pub mod priority;
pub mod quota;
pub mod ram_file;
mod remote_uffd;
pub mod shared_ram;
pub mod socket;
pub mod tracker;
pub mod uffd;
pub(crate) mod window_view;

pub use error::Error;
pub use faults::{FaultRange, RamFaults, RamPlace};
pub use pidfd::{Process, ProcessId, RemoteFd};
pub use quota::CpuQuota;
pub use ram_file::{Access, RamFile};
pub use shared_ram::{RamPart, SharedRam};
pub use tracker::{RamTracker, TrackedRange};
