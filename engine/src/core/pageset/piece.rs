//! A set of pages of one part of a region: what a scan hands on when it is through with that part.
//!
//! It costs what the part has, so all pieces of a guest together cost what one set costs.

use std::fmt;

use super::Bits;
use crate::core::layout::{PageNumber, PageRange, RegionIndex};

/// Pages of one part of a region.
pub struct Piece {
    region: RegionIndex,
    /// The page that the first bit stands for.
    first: PageNumber,
    bits: Bits,
    len: u64,
}

impl fmt::Debug for Piece {
    /// How many, not which.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Piece({} pages of {})", self.len, self.region)
    }
}

impl Piece {
    pub(super) fn empty(region: RegionIndex, range: PageRange) -> Self {
        Self {
            region,
            first: range.first,
            bits: Bits::new(range.count),
            len: 0,
        }
    }

    /// Adds pages that are within it and not in it.
    pub(super) fn insert(&mut self, range: PageRange) {
        let within = PageRange::new(range.first.0 - self.first.0, range.count);
        self.bits.change(within, |word, mask| word | mask);
        self.len += range.count;
    }

    /// How many pages are in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when no page is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The next run at or after `page`, of at most `most` pages.
    pub fn next_run(&self, page: PageNumber, most: u64) -> Option<(RegionIndex, PageRange)> {
        let from = page.0.saturating_sub(self.first.0);
        let run = self.bits.next_run(from, most)?;
        let range = PageRange::new(run.first.0 + self.first.0, run.count);
        Some((self.region, range))
    }
}
