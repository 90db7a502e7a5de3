//! Guests, QEMU pairs and the simulated world for the tests of Ferry.
//!
//! | what | where |
//! |---|---|
//! | a QEMU with its RAM, sockets and console, gone when dropped | [`Machine`], [`Qemu`] |
//! | a Linux guest that checks its own memory and disk | [`Linux`], [`Status`] |
//! | a bare-metal guest that dirties exactly the pages it is told to | [`tiny`] |
//! | two hosts and a wire of known speed, which can be cut | [`Link`] |
//! | both machines of the core in a world of numbers, under a seed | [`sim`] |
//! | a link that is cut, held or damaged at a frame | [`proxy`] |
//! | a VMM that embeds the engine, and a link that goes wrong | [`toy`] |
//! | what the guest saw of a migration: blackout and brown-out | [`Probe`] |
//!
//! The QEMUs and the guest's kernel are unpacked by `testbed/setup`, once, into
//! [`testbed_dir`]. Tests that start QEMUs take a [`Turn`] first: two such tests at once on a small
//! machine would measure each other.
#![deny(unsafe_code)]

mod dir;
mod disk;
mod error;
mod ferry;
#[path = "../guest/fields.rs"]
mod fields;
mod initramfs;
mod link;
mod linux;
mod machine;
mod monitor;
mod probe;
pub mod proxy;
mod qemu;
mod ram;
pub mod sim;
pub mod tiny;
pub mod toy;
mod wait;

pub use dir::{QemuVersion, testbed_dir};
pub use disk::{Disk, DiskFormat};
pub use error::TestbedError;
pub use ferry::{Ended, Ferry, ferry_binary};
pub use fields::Field;
pub use link::{End, Link, interface_bytes};
pub use linux::{Content, Linux, Pattern, Sweep};
pub use machine::{Accel, Backing, Device, Machine, Populate};
pub use monitor::Monitor;
pub use probe::{Probe, Seen};
pub use qemu::Qemu;
pub use ram::{Ram, Status, StatusPage};
pub use wait::{Turn, wait_until};

/// Bytes in a page of guest memory.
pub const PAGE_SIZE: usize = 4096;
