//! A bit for each page of a region, changed by many threads at once.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::core::layout::PAGE_SIZE;

const WORD_BITS: u64 = u64::BITS as u64;

/// The bits; none set in the beginning.
#[derive(Debug)]
pub(super) struct PageBits(Box<[AtomicU64]>);

/// Pages that are one thread's, until this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    bits: &'a PageBits,
    bytes: Range<u64>,
}

impl PageBits {
    /// For a region of `byte_len` bytes.
    pub(super) fn new(byte_len: u64) -> Self {
        let words = byte_len.div_ceil(PAGE_SIZE as u64).div_ceil(WORD_BITS);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// Takes every page of `bytes` for the caller; none when one of them is somebody else's.
    pub(super) fn claim(&self, bytes: Range<u64>) -> Option<Claim<'_>> {
        let mut held = bytes.start..bytes.start;
        for (word, mask, end) in words_of(&bytes) {
            let Some(bits) = self.0.get(word) else {
                self.release(&held);
                return None;
            };
            let old = bits.fetch_or(mask, Ordering::Acquire);
            if old & mask != 0 {
                bits.fetch_and(!mask | old, Ordering::Release);
                self.release(&held);
                return None;
            }
            held.end = end;
        }
        Some(Claim { bits: self, bytes })
    }

    fn release(&self, bytes: &Range<u64>) {
        for (word, mask, _) in words_of(bytes) {
            self.0[word].fetch_and(!mask, Ordering::Release);
        }
    }

    /// Sets the bit of every page of `bytes`.
    pub(super) fn set(&self, bytes: &Range<u64>) {
        for (word, mask, _) in words_of(bytes) {
            if let Some(word) = self.0.get(word) {
                word.fetch_or(mask, Ordering::Release);
            }
        }
    }

    /// True when the bit of any page of `bytes` is set.
    pub(super) fn has_any(&self, bytes: &Range<u64>) -> bool {
        words_of(bytes).any(|(word, mask, _)| {
            let word = self.0.get(word);
            word.is_some_and(|word| word.load(Ordering::Acquire) & mask != 0)
        })
    }

    /// True when the bit of every page of `bytes` is set.
    pub(super) fn contains(&self, bytes: &Range<u64>) -> bool {
        words_of(bytes).all(|(word, mask, _)| {
            let word = self.0.get(word);
            word.is_some_and(|word| word.load(Ordering::Acquire) & mask == mask)
        })
    }
}

impl Claim<'_> {
    /// True when they are claimed of these bits and no others.
    pub(super) fn is_of(&self, bits: &PageBits) -> bool {
        std::ptr::eq(self.bits, bits)
    }

    /// Where they are.
    pub(super) fn bytes(&self) -> &Range<u64> {
        &self.bytes
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.bits.release(&self.bytes);
    }
}

/// The words in which the pages of `bytes` have their bits, which bits those are, and where the bytes of
/// the last one end.
fn words_of(bytes: &Range<u64>) -> impl Iterator<Item = (usize, u64, u64)> + use<> {
    let page_bytes = PAGE_SIZE as u64;
    let end = bytes.end.div_ceil(page_bytes);
    let mut page = bytes.start / page_bytes;
    std::iter::from_fn(move || {
        if page >= end {
            return None;
        }
        let (word, bit) = (page / WORD_BITS, page % WORD_BITS);
        let here = (WORD_BITS - bit).min(end - page);
        page += here;
        let mask = u64::MAX >> (WORD_BITS - here) << bit;
        Some((usize::try_from(word).ok()?, mask, page * page_bytes))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;
    const PAGES: u64 = 300;

    fn pages() -> impl Strategy<Value = Range<u64>> {
        (0..PAGES, 0..PAGES).prop_map(|(a, b)| a.min(b) * PAGE..a.max(b) * PAGE)
    }

    proptest! {
        /// Against a plain list of pages: what is held is nobody else's, and what is given back is.
        #[test]
        fn a_page_is_one_claim_s(ranges in prop::collection::vec((pages(), any::<bool>()), 1..40)) {
            let bits = PageBits::new(PAGES * PAGE);
            let mut claims: Vec<Claim<'_>> = Vec::new();
            for (bytes, gives_back) in ranges {
                let overlaps = |claim: &Claim<'_>| {
                    let both = claim.bytes().start.max(bytes.start)..claim.bytes().end.min(bytes.end);
                    !both.is_empty()
                };
                let is_free = !claims.iter().any(overlaps);
                let claim = bits.claim(bytes.clone());
                prop_assert_eq!(claim.is_some(), is_free);
                claims.extend(claim);
                if gives_back {
                    claims.pop();
                }
                for page in 0..PAGES {
                    let held = claims.iter().any(|claim| claim.bytes().contains(&(page * PAGE)));
                    prop_assert_eq!(bits.contains(&(page * PAGE..(page + 1) * PAGE)), held);
                }
            }
        }

        #[test]
        fn contains_what_was_set(ranges in prop::collection::vec(pages(), 1..10), asked in pages()) {
            let bits = PageBits::new(PAGES * PAGE);
            for bytes in &ranges {
                bits.set(bytes);
            }
            let all = (asked.start..asked.end)
                .step_by(PAGE_SIZE)
                .all(|at| ranges.iter().any(|bytes| bytes.contains(&at)));
            prop_assert_eq!(bits.contains(&asked), all);
        }
    }

    #[test]
    fn what_no_region_has_is_never_claimed() {
        let bits = PageBits::new(PAGE);
        assert!(bits.claim(0..65 * PAGE).is_none());
        assert!(bits.claim(0..PAGE).is_some(), "nothing stays claimed");
        assert!(!bits.contains(&(0..65 * PAGE)));
    }
}
