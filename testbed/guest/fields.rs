//! The status page: what the guest tells the host, and where.
//!
//! The host finds it by its magic number at the start of a page of guest RAM and reads it with
//! `pread`, from outside of QEMU. Guest and library compile this same file.

/// The first 16 bytes of the page, as two little-endian words.
pub(crate) const MAGIC: [u64; 2] = [0x5952_5245_4686_b1a5, 0x9c3e_51d0_7a24_6f83];

/// Changes with the meaning of any field.
pub(crate) const VERSION: u64 = 1;

/// A 64-bit little-endian counter or value; the discriminant is its offset in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Field {
    /// The version of this layout.
    Version = 16,
    /// Random, new at every boot.
    BootId = 24,
    /// Wall clock at boot in nanoseconds: tells a living page from one left by an earlier boot.
    BootedAtNs = 32,
    /// 1 when all pages have been filled once and the work has begun.
    Filled = 40,
    /// Rises as often as the guest can make it, always within tens of microseconds.
    Progress = 48,
    /// Pages rewritten.
    Writes = 56,
    /// Pages verified, before a rewrite or by the sweep.
    Verified = 64,
    /// Pages found bad.
    Bad = 72,
    /// Complete sweeps over all pages.
    Sweeps = 80,
    /// Disk blocks written, flushed and read back.
    DiskOps = 88,
    /// Disk blocks read back with anything but what was last written there.
    DiskBad = 96,
    /// Disk operations that failed.
    DiskErrors = 104,
    /// Index of the last bad page.
    LastBadPage = 112,
    /// Pages made stale on command.
    Planted = 120,
    /// How many pages are filled and verified.
    Pages = 128,
}
