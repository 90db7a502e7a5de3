//! Deltas: a page told by how it differs from what was sent of it before.
//!
//! A delta is the CRC32 of the page as it was sent (the base), the CRC32 of the page as it is (the
//! result), and the exclusive or of the two as patches: how many words of eight bytes to leave as
//! they are, how many differ, and the exclusive or of those. Both numbers are a byte each, or the
//! byte 255 and a u16. After the last patch everything is as it was.
//!
//! The receiver's base is what stands in guest RAM. It applies a delta to a copy and compares both
//! checksums, so a page is either made what the sender had or not touched.

use crate::error::Error;
use crate::frame::array;
use crate::limits::PAGE_BYTES;

/// Bytes in the unit that deltas count in.
const WORD_BYTES: usize = size_of::<u64>();

/// Words in a page.
const PAGE_WORDS: usize = PAGE_BYTES / WORD_BYTES;

/// Bytes of the two checksums.
pub(super) const FIXED_BYTES: usize = 8;

/// The byte that says that the number is too large for one.
const LARGE: u8 = u8::MAX;

/// Words that are the same for so few in a row are told with those that differ: a patch of its own
/// costs at least two bytes and the receiver's time.
const SHORT_GAP: usize = 1;

/// What came of a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a page that does not match has to be sent again"]
pub enum Applied {
    /// The page is what the sender has.
    Done,
    /// The page was not what the delta is from, or did not become what it must: not to be used.
    Mismatch,
}

/// Applies the data of a delta record to `page`, a copy of the page as it stands in guest RAM. Unless
/// it is [`Applied::Done`] the copy holds anything.
pub fn apply(delta: &[u8], page: &mut [u8; PAGE_BYTES]) -> Result<Applied, Error> {
    let bad = |field| Error::BadDelta { field };
    if delta.len() < FIXED_BYTES {
        return Err(bad("its length"));
    }
    let base = u32::from_le_bytes(array(delta, 0));
    let result = u32::from_le_bytes(array(delta, 4));
    if crc32fast::hash(page) != base {
        return Ok(Applied::Mismatch);
    }
    let mut patches = &delta[FIXED_BYTES..];
    let mut at = 0;
    while !patches.is_empty() {
        let same = take_number(&mut patches).ok_or(bad("a number"))?;
        let other = take_number(&mut patches).ok_or(bad("a number"))?;
        let start = at + same;
        at = start + other;
        if other == 0 || at > PAGE_WORDS {
            return Err(bad("the length of a patch"));
        }
        let patch = patches.split_at_checked(other * WORD_BYTES);
        let (patch, rest) = patch.ok_or(bad("its length"))?;
        patches = rest;
        let into = &mut page[start * WORD_BYTES..at * WORD_BYTES];
        for (into, patch) in into.iter_mut().zip(patch) {
            *into ^= patch;
        }
    }
    if crc32fast::hash(page) == result {
        Ok(Applied::Done)
    } else {
        Ok(Applied::Mismatch)
    }
}

fn take_number(from: &mut &[u8]) -> Option<usize> {
    let (first, rest) = from.split_first()?;
    *from = rest;
    if *first < LARGE {
        return Some((*first).into());
    }
    let (number, rest) = from.split_first_chunk()?;
    *from = rest;
    Some(u16::from_le_bytes(*number).into())
}

/// Writes the delta from `base` to `page` into `into` and returns its length, unless there is no room
/// for it there.
pub(super) fn encode(base: &[u8], page: &[u8], into: &mut [u8]) -> Option<usize> {
    // The checksums come last: most deltas that are none are given up before.
    let mut to = Writer {
        into,
        at: FIXED_BYTES,
    };
    let mut at = 0;
    while let Some(start) = next(base, page, at, |a, b| a != b) {
        let mut end = start + 1;
        loop {
            end = next(base, page, end, |a, b| a == b).unwrap_or(PAGE_WORDS);
            match next(base, page, end, |a, b| a != b) {
                Some(further) if further - end <= SHORT_GAP => end = further + 1,
                _ => break,
            }
        }
        to.number(start - at)?;
        to.number(end - start)?;
        to.patch(base, page, start * WORD_BYTES..end * WORD_BYTES)?;
        at = end;
    }
    let length = to.at;
    let crcs = into.get_mut(..FIXED_BYTES)?;
    crcs[..4].copy_from_slice(&crc32fast::hash(base).to_le_bytes());
    crcs[4..].copy_from_slice(&crc32fast::hash(page).to_le_bytes());
    Some(length)
}

/// The first word from `at` on that the two pages have as `wanted`.
fn next(base: &[u8], page: &[u8], at: usize, wanted: fn(&[u8], &[u8]) -> bool) -> Option<usize> {
    let base = base[at * WORD_BYTES..].chunks_exact(WORD_BYTES);
    let page = page[at * WORD_BYTES..].chunks_exact(WORD_BYTES);
    let found = base.zip(page).position(|(base, page)| wanted(base, page));
    found.map(|found| at + found)
}

struct Writer<'a> {
    into: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn number(&mut self, number: usize) -> Option<()> {
        match u8::try_from(number) {
            Ok(small) if small < LARGE => self.bytes(&[small]),
            _ => {
                let [low, high] = u16::try_from(number).ok()?.to_le_bytes();
                self.bytes(&[LARGE, low, high])
            }
        }
    }

    fn bytes(&mut self, bytes: &[u8]) -> Option<()> {
        let into = self.into.get_mut(self.at..self.at + bytes.len())?;
        into.copy_from_slice(bytes);
        self.at += bytes.len();
        Some(())
    }

    fn patch(&mut self, base: &[u8], page: &[u8], bytes: std::ops::Range<usize>) -> Option<()> {
        let into = self.into.get_mut(self.at..self.at + bytes.len())?;
        let both = base[bytes.clone()].iter().zip(&page[bytes.clone()]);
        for (into, (base, page)) in into.iter_mut().zip(both) {
            *into = base ^ page;
        }
        self.at += bytes.len();
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::limits::MAX_DELTA_BYTES;

    fn page(fill: u8) -> [u8; PAGE_BYTES] {
        [fill; PAGE_BYTES]
    }

    fn delta(base: &[u8], page: &[u8]) -> Option<Vec<u8>> {
        let mut into = vec![0; MAX_DELTA_BYTES];
        let length = encode(base, page, &mut into)?;
        into.truncate(length);
        Some(into)
    }

    #[test]
    fn a_delta_is_these_bytes() {
        let base = page(0x11);
        let mut changed = base;
        changed[8] = 0x10;
        changed[300 * WORD_BYTES + 7] = 0x91;
        let delta = delta(&base, &changed).unwrap();
        let expected = [
            &crc32fast::hash(&base).to_le_bytes()[..],
            &crc32fast::hash(&changed).to_le_bytes(),
            &[1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
            &[255, 0x2a, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0x80],
        ]
        .concat();
        assert_eq!(delta, expected);
    }

    #[test]
    fn the_same_page_again_costs_its_checksums() {
        assert_eq!(delta(&page(7), &page(7)).unwrap().len(), FIXED_BYTES);
    }

    #[test]
    fn a_page_that_is_all_other_has_no_delta() {
        assert_eq!(delta(&page(7), &page(8)), None);
    }

    #[test]
    fn another_base_or_result_is_no_match() {
        let mut changed = page(1);
        changed[0] = 9;
        let mut delta = delta(&page(1), &changed).unwrap();
        let mut other = page(2);
        assert_eq!(apply(&delta, &mut other).unwrap(), Applied::Mismatch);
        assert_eq!(other, page(2));
        delta[10] ^= 1;
        let mut base = page(1);
        assert_eq!(apply(&delta, &mut base).unwrap(), Applied::Mismatch);
    }

    #[test]
    fn what_is_no_delta_is_refused() {
        let crc = crc32fast::hash(&page(0)).to_le_bytes();
        let with = |patches: &[u8]| {
            let delta = [&crc[..], &crc, patches].concat();
            apply(&delta, &mut page(0))
        };
        assert!(matches!(with(&[]), Ok(Applied::Done)));
        for bad in [
            &[1][..],
            &[0, 0],
            &[255, 0],
            &[0, 255, 1],
            &[0, 1, 1, 2, 3],
            &[255, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1],
        ] {
            assert!(matches!(with(bad), Err(Error::BadDelta { .. })), "{bad:?}");
        }
        assert!(matches!(
            apply(&crc, &mut page(0)),
            Err(Error::BadDelta { .. })
        ));
    }

    proptest! {
        #[test]
        fn a_delta_makes_the_page(
            base in vec(any::<u8>(), PAGE_BYTES),
            changes in vec((0..PAGE_BYTES, any::<u8>(), 1..40_usize), 0..60),
        ) {
            let mut changed = base.clone();
            for (at, value, length) in changes {
                let end = (at + length).min(PAGE_BYTES);
                changed[at..end].fill(value);
            }
            if let Some(delta) = delta(&base, &changed) {
                let mut page: [u8; PAGE_BYTES] = base.try_into().unwrap();
                prop_assert_eq!(apply(&delta, &mut page).unwrap(), Applied::Done);
                prop_assert_eq!(&page[..], &changed);
            }
        }

        #[test]
        fn no_bytes_panic(patches in vec(prop_oneof![0..9_u8, any::<u8>()], 0..200)) {
            let crc = crc32fast::hash(&page(0)).to_le_bytes();
            let delta = [&crc[..], &crc, &patches].concat();
            drop(apply(&delta, &mut page(0)));
        }
    }
}
