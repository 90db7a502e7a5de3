//! A live-migration engine.
#![deny(unsafe_code)]

pub mod core;
#[allow(unsafe_code)]
pub mod linux;
#[cfg(feature = "qemu")]
pub mod qemu;
pub mod vmm;
