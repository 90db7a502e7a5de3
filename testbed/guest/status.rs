//! The status page, from the guest's side.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::fields::{Field, MAGIC, VERSION};
use crate::sys;

/// The status page. Every field is a counter that only this guest writes.
#[derive(Clone, Copy)]
pub(crate) struct Status(&'static [AtomicU64]);

impl Status {
    /// Allocates the page and makes it findable.
    pub(crate) fn publish(boot_id: u64, booted_at_ns: u64, pages: u64) -> io::Result<Self> {
        let status = Self(sys::as_atomics(sys::allocate(1)?));
        status.set(Field::Version, VERSION);
        status.set(Field::BootId, boot_id);
        status.set(Field::BootedAtNs, booted_at_ns);
        status.set(Field::Pages, pages);
        for (word, magic) in status.0.iter().zip(MAGIC) {
            word.store(magic, Ordering::Release);
        }
        Ok(status)
    }

    /// Adds `count` to a counter.
    pub(crate) fn add(self, field: Field, count: u64) {
        self.word(field).fetch_add(count, Ordering::Relaxed);
    }

    /// Sets a value.
    pub(crate) fn set(self, field: Field, value: u64) {
        self.word(field).store(value, Ordering::Relaxed);
    }

    /// Adds one to a counter and returns what it was.
    pub(crate) fn count(self, field: Field) -> u64 {
        self.word(field).fetch_add(1, Ordering::Relaxed)
    }

    fn word(self, field: Field) -> &'static AtomicU64 {
        &self.0[field as usize / size_of::<u64>()]
    }
}
