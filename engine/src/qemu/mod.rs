//! The QEMU adapter.
