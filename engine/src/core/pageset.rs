//! Sets of guest pages: what is dirty, what is on its way, what has arrived.
//!
//! One bit a page, and above it one summary bit for every 64 pages, so that walking and emptying a
//! set costs what is in it and not what the guest has installed: 1 TiB of RAM is 32 MiB of bits and
//! half a MiB of summary, and a set of ten pages touches ten words.

mod piece;

use std::fmt;

pub use self::piece::Piece;
use crate::core::layout::{Layout, PageNumber, PageRange, RegionIndex};

const WORD_BITS: u64 = u64::BITS as u64;

/// A page that no region has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{range} of {region} lie outside guest RAM")]
pub struct OutsideRam {
    /// The region named.
    pub region: RegionIndex,
    /// The pages named.
    pub range: PageRange,
}

/// A set of pages of one layout.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    regions: Box<[Bits]>,
    len: u64,
}

impl fmt::Debug for PageSet {
    /// How many, not which: a guest has millions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} pages)", self.len)
    }
}

impl PageSet {
    /// The empty set over `layout`.
    pub fn empty(layout: &Layout) -> Self {
        let regions = layout
            .iter()
            .map(|(_, region)| Bits::new(region.pages()))
            .collect();
        Self { regions, len: 0 }
    }

    /// The set of all pages of `layout`.
    pub fn full(layout: &Layout) -> Self {
        let mut set = Self::empty(layout);
        for (index, region) in layout.iter() {
            set.insert(index, region.all())
                .expect("a layout contains its own regions");
        }
        set
    }

    /// How many pages are in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when no page is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True when the page is in it. A page outside guest RAM never is.
    pub fn contains(&self, region: RegionIndex, page: PageNumber) -> bool {
        self.bits(region).is_some_and(|bits| bits.contains(page.0))
    }

    /// Adds pages and tells how many of them are new.
    pub fn insert(&mut self, region: RegionIndex, range: PageRange) -> Result<u64, OutsideRam> {
        let added = self
            .checked(region, range)?
            .change(range, |word, mask| word | mask);
        let added = u64::try_from(added).expect("an insertion removes nothing");
        self.len += added;
        Ok(added)
    }

    /// Takes pages out and tells how many of them were there.
    pub fn remove(&mut self, region: RegionIndex, range: PageRange) -> Result<u64, OutsideRam> {
        let change = self
            .checked(region, range)?
            .change(range, |word, mask| word & !mask);
        self.len -= change.unsigned_abs();
        Ok(change.unsigned_abs())
    }

    /// Takes all pages out that are in `range`, as a set of their own.
    pub fn take(&mut self, region: RegionIndex, range: PageRange) -> Result<Piece, OutsideRam> {
        self.checked(region, range)?;
        let mut piece = Piece::empty(region, range);
        while let Some(run) = self.next_within(region, range) {
            self.remove(region, run)?;
            piece.insert(run);
        }
        Ok(piece)
    }

    /// The first run of pages that are in the set and in `range`.
    fn next_within(&self, region: RegionIndex, range: PageRange) -> Option<PageRange> {
        let run = self.bits(region)?.next_run(range.first.0, range.count)?;
        let count = range.end().0.checked_sub(run.first.0)?.min(run.count);
        (count > 0).then(|| PageRange::new(run.first.0, count))
    }

    /// The part of `range` from its first page on that is not in the set; empty when all of it is.
    pub fn from_first_stranger(&self, region: RegionIndex, range: PageRange) -> PageRange {
        let end = range.end().0;
        let first = self.bits(region).map_or(range.first.0, |bits| {
            bits.next_stranger(range.first.0, end.min(bits.pages))
        });
        PageRange::new(first, end - first)
    }

    /// The runs of `range` that are not in it, in order. Pages that no region has are left out.
    pub fn missing(
        &self,
        region: RegionIndex,
        range: PageRange,
    ) -> impl Iterator<Item = PageRange> + '_ {
        let bits = self.bits(region);
        let end = range.end().0.min(bits.map_or(0, |bits| bits.pages));
        let mut at = range.first.0;
        std::iter::from_fn(move || {
            while at < end {
                let next = bits?.next_run(at, u64::MAX);
                let (there, past) = next.map_or((end, end), |run| (run.first.0, run.end().0));
                let gap = PageRange::new(at, there.min(end) - at);
                at = past;
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
            None
        })
    }

    /// Adds every page of `other`, a set over the same layout.
    pub fn union(&mut self, other: &Self) {
        for (region, range) in other.ranges() {
            self.insert(region, range)
                .expect("both sets are over one layout");
        }
    }

    /// The pages that are in `other` too, a set over the same layout.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let pairs = self.regions.iter().zip(&other.regions);
        let regions: Box<[Bits]> = pairs.map(|(ours, theirs)| ours.common(theirs)).collect();
        let len = regions.iter().map(Bits::count).sum();
        Self { regions, len }
    }

    /// Empties it, at a cost of what was in it.
    pub fn clear(&mut self) {
        if self.len > 0 {
            self.regions.iter_mut().for_each(Bits::clear);
            self.len = 0;
        }
    }

    /// The maximal runs of pages in it, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (RegionIndex, PageRange)> + '_ {
        let mut cursor = Cursor::default();
        std::iter::from_fn(move || self.next_run(&mut cursor, u64::MAX))
    }

    /// The next run at or after `cursor`, of at most `most` pages, and moves the cursor past it.
    pub fn next_run(&self, cursor: &mut Cursor, most: u64) -> Option<(RegionIndex, PageRange)> {
        while let Some(bits) = self.regions.get(usize::from(cursor.region)) {
            if let Some(range) = bits.next_run(cursor.page, most) {
                cursor.page = range.end().0;
                return Some((RegionIndex(cursor.region), range));
            }
            *cursor = Cursor {
                region: cursor.region + 1,
                page: 0,
            };
        }
        None
    }

    fn bits(&self, region: RegionIndex) -> Option<&Bits> {
        self.regions.get(usize::from(region.0))
    }

    fn checked(&mut self, region: RegionIndex, range: PageRange) -> Result<&mut Bits, OutsideRam> {
        let outside = OutsideRam { region, range };
        let end = range.first.0.checked_add(range.count).ok_or(outside)?;
        let bits = self.regions.get_mut(usize::from(region.0)).ok_or(outside)?;
        if end <= bits.pages {
            Ok(bits)
        } else {
            Err(outside)
        }
    }
}

/// A place in a [`PageSet`] from which to go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    pub(crate) region: u16,
    pub(crate) page: u64,
}

impl Cursor {
    /// The page from which to go on.
    pub(crate) fn page(self) -> PageNumber {
        PageNumber(self.page)
    }

    /// Moves past `range`, in the same region.
    pub(crate) fn pass(&mut self, range: PageRange) {
        self.page = range.end().0;
    }
}

/// The pages of one region. Bit `i` of `summary` is set exactly when `words[i]` is not zero.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bits {
    pages: u64,
    words: Box<[u64]>,
    summary: Box<[u64]>,
}

impl Bits {
    fn new(pages: u64) -> Self {
        let words = pages.div_ceil(WORD_BITS);
        let length = |bits: u64| usize::try_from(bits).expect("MAX_REGION_BYTES bounds the set");
        Self {
            pages,
            words: vec![0; length(words)].into(),
            summary: vec![0; length(words.div_ceil(WORD_BITS))].into(),
        }
    }

    fn contains(&self, page: u64) -> bool {
        let (index, bit) = split(page);
        self.words
            .get(index)
            .is_some_and(|word| word >> bit & 1 == 1)
    }

    /// Applies `operation` to every word that `range` touches; returns the change of the count.
    fn change(&mut self, range: PageRange, operation: impl Fn(u64, u64) -> u64) -> i64 {
        let mut change = 0;
        let mut page = range.first.0;
        while page < range.end().0 {
            let (index, bit) = split(page);
            let here = (WORD_BITS - u64::from(bit)).min(range.end().0 - page);
            let old = self.words[index];
            let new = operation(old, ones(here) << bit);
            change += i64::from(new.count_ones()) - i64::from(old.count_ones());
            self.words[index] = new;
            self.summarise(index);
            page += here;
        }
        change
    }

    fn summarise(&mut self, index: usize) {
        let (at, bit) = split(index as u64);
        let set = u64::from(self.words[index] != 0);
        self.summary[at] = self.summary[at] & !(1 << bit) | set << bit;
    }

    fn common(&self, other: &Self) -> Self {
        let mut common = Self::new(self.pages);
        let mut from = 0;
        while let Some(index) = self.next_word(from) {
            common.words[index] = self.words[index] & other.words[index];
            common.summarise(index);
            from = index + 1;
        }
        common
    }

    fn count(&self) -> u64 {
        let mut count = 0;
        let mut from = 0;
        while let Some(index) = self.next_word(from) {
            count += u64::from(self.words[index].count_ones());
            from = index + 1;
        }
        count
    }

    fn clear(&mut self) {
        for (at, summary) in self.summary.iter_mut().enumerate() {
            while *summary != 0 {
                let word = at * u64::BITS as usize + summary.trailing_zeros() as usize;
                self.words[word] = 0;
                *summary &= *summary - 1;
            }
        }
    }

    fn next_run(&self, from: u64, most: u64) -> Option<PageRange> {
        let first = self.next_member(from)?;
        let limit = self.pages.min(first.saturating_add(most));
        let end = self.next_stranger(first, limit);
        Some(PageRange::new(first, end - first))
    }

    /// The first page at or after `from` that is in the set.
    fn next_member(&self, from: u64) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let (index, bit) = split(from);
        let here = self.words[index] & (u64::MAX << bit);
        let index = if here != 0 {
            index
        } else {
            self.next_word(index + 1)?
        };
        let word = if here != 0 { here } else { self.words[index] };
        Some(index as u64 * WORD_BITS + u64::from(word.trailing_zeros()))
    }

    /// The first word at or after `from` that is not zero, found through the summary.
    fn next_word(&self, from: usize) -> Option<usize> {
        let (mut at, bit) = split(from as u64);
        let mut here = self.summary.get(at)? & (u64::MAX << bit);
        while here == 0 {
            at += 1;
            here = *self.summary.get(at)?;
        }
        Some(at * u64::BITS as usize + here.trailing_zeros() as usize)
    }

    /// The first page at or after `from` that is not in the set, at most `limit`.
    fn next_stranger(&self, from: u64, limit: u64) -> u64 {
        let mut page = from;
        while page < limit {
            let (index, bit) = split(page);
            let run = u64::from((!(self.words[index] >> bit)).trailing_zeros());
            page += run.min(WORD_BITS - u64::from(bit));
            if run < WORD_BITS - u64::from(bit) {
                break;
            }
        }
        page.min(limit)
    }
}

/// Word and bit of a page.
fn split(page: u64) -> (usize, u32) {
    let word = usize::try_from(page / WORD_BITS).expect("MAX_REGION_BYTES bounds page numbers");
    (word, (page % WORD_BITS) as u32)
}

/// A word whose lowest `count` bits are set.
fn ones(count: u64) -> u64 {
    if count >= WORD_BITS {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::core::layout::{PAGE_SIZE, Region};

    const SIZES: [u64; 3] = [1, 64 * 64 * 2 + 7, 130];

    fn layout() -> Layout {
        let region = |(index, pages): (usize, &u64)| Region {
            name: format!("ram{index}"),
            bytes: pages * PAGE_SIZE as u64,
            backing_page_bytes: 4096,
        };
        Layout::new(SIZES.iter().enumerate().map(region).collect()).unwrap()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u16, PageRange),
        Remove(u16, PageRange),
        Clear,
    }

    fn any_range() -> impl Strategy<Value = (u16, PageRange)> {
        let regions = u16::try_from(SIZES.len()).unwrap();
        (0..regions).prop_flat_map(|region| {
            let pages = SIZES[usize::from(region)];
            (0..pages).prop_flat_map(move |first| {
                (1..=pages - first).prop_map(move |count| (region, PageRange::new(first, count)))
            })
        })
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => any_range().prop_map(|(region, range)| Step::Insert(region, range)),
            3 => any_range().prop_map(|(region, range)| Step::Remove(region, range)),
            1 => Just(Step::Clear),
        ]
    }

    /// The slow and obvious set: one entry a page.
    #[derive(Default)]
    struct Oracle(BTreeSet<(u16, u64)>);

    impl Oracle {
        fn apply(&mut self, step: &Step) {
            let pages = |region: u16, range: &PageRange| {
                (range.first.0..range.end().0).map(move |page| (region, page))
            };
            match step {
                Step::Insert(region, range) => self.0.extend(pages(*region, range)),
                Step::Remove(region, range) => {
                    self.0.retain(|&(at, page)| {
                        at != *region || !(range.first.0..range.end().0).contains(&page)
                    });
                }
                Step::Clear => self.0.clear(),
            }
        }
    }

    proptest! {
        #[test]
        fn an_intersection_holds_what_both_hold(
            steps in [vec(any_step(), 0..12), vec(any_step(), 0..12)],
        ) {
            let mut oracles = [Oracle::default(), Oracle::default()];
            let mut sets = [PageSet::empty(&layout()), PageSet::empty(&layout())];
            for ((steps, oracle), set) in steps.iter().zip(&mut oracles).zip(&mut sets) {
                for step in steps {
                    oracle.apply(step);
                    match step {
                        Step::Insert(region, range) => {
                            set.insert(RegionIndex(*region), *range).unwrap();
                        }
                        Step::Remove(region, range) => {
                            set.remove(RegionIndex(*region), *range).unwrap();
                        }
                        Step::Clear => set.clear(),
                    }
                }
            }
            let both = sets[0].intersection(&sets[1]);
            let members: BTreeSet<_> = both
                .ranges()
                .flat_map(|(region, range)| {
                    (range.first.0..range.end().0).map(move |page| (region.0, page))
                })
                .collect();
            let expected: BTreeSet<_> = oracles[0].0.intersection(&oracles[1].0).copied().collect();
            prop_assert_eq!(both.len(), expected.len() as u64);
            prop_assert_eq!(members, expected);
        }

        #[test]
        fn behaves_like_a_set_of_pages(steps in vec(any_step(), 0..40), most in 1_u64..200) {
            let (mut set, mut oracle) = (PageSet::empty(&layout()), Oracle::default());
            for step in &steps {
                match step {
                    Step::Insert(region, range) => { set.insert(RegionIndex(*region), *range).unwrap(); },
                    Step::Remove(region, range) => { set.remove(RegionIndex(*region), *range).unwrap(); },
                    Step::Clear => set.clear(),
                }
                oracle.apply(step);
                prop_assert_eq!(set.len(), oracle.0.len() as u64);
            }
            let walked: Vec<_> = set
                .ranges()
                .flat_map(|(region, range)| {
                    (range.first.0..range.end().0).map(move |page| (region.0, page))
                })
                .collect();
            prop_assert_eq!(&walked, &oracle.0.iter().copied().collect::<Vec<_>>());

            let mut cursor = Cursor::default();
            let mut stepped = Vec::new();
            while let Some((region, range)) = set.next_run(&mut cursor, most) {
                prop_assert!(range.count >= 1 && range.count <= most);
                stepped.extend((range.first.0..range.end().0).map(|page| (region.0, page)));
            }
            prop_assert_eq!(stepped, walked);
        }

        #[test]
        fn runs_are_maximal(steps in vec(any_step(), 0..20)) {
            let mut set = PageSet::empty(&layout());
            for step in steps {
                if let Step::Insert(region, range) = step {
                    set.insert(RegionIndex(region), range).unwrap();
                }
            }
            for (region, range) in set.ranges() {
                prop_assert!(!set.contains(region, range.end()));
                let before = range.first.0.checked_sub(1).map(PageNumber);
                prop_assert!(before.is_none_or(|page| !set.contains(region, page)));
            }
        }
    }

    #[test]
    fn refuses_pages_outside_ram() {
        let mut set = PageSet::empty(&layout());
        for (region, range) in [
            (RegionIndex(3), PageRange::new(0, 1)),
            (RegionIndex(0), PageRange::new(0, 2)),
            (RegionIndex(2), PageRange::new(u64::MAX, 2)),
        ] {
            assert_eq!(set.insert(region, range), Err(OutsideRam { region, range }));
            assert_eq!(set.remove(region, range), Err(OutsideRam { region, range }));
        }
        assert!(set.is_empty());
    }

    #[test]
    fn what_is_missing_is_what_is_not_there() {
        let mut set = PageSet::empty(&layout());
        let region = RegionIndex(1);
        let pages = SIZES[1];
        for first in [0, 70, 71, 100] {
            set.insert(region, PageRange::new(first, 2)).unwrap();
        }
        for (first, count) in [(0, pages), (1, 70), (71, 2), (72, u64::MAX), (pages, 5)] {
            let range = PageRange::new(first, count);
            let missing: Vec<_> = set.missing(region, range).collect();
            let apart = missing.windows(2).all(|pair| pair[0].end() < pair[1].first);
            assert!(apart, "{missing:?}");
            let told: Vec<u64> = missing
                .iter()
                .flat_map(|run| run.first.0..run.end().0)
                .collect();
            let expected: Vec<u64> = (first..first.saturating_add(count).min(pages))
                .filter(|page| !set.contains(region, PageNumber(*page)))
                .collect();
            assert_eq!(told, expected, "{range}");
        }
        assert_eq!(set.missing(RegionIndex(9), PageRange::new(0, 1)).count(), 0);
    }

    #[test]
    fn full_holds_every_page() {
        let set = PageSet::full(&layout());
        assert_eq!(set.len(), layout().pages());
        assert_eq!(set.ranges().count(), SIZES.len());
    }

    #[test]
    fn union_counts_each_page_once() {
        let mut set = PageSet::empty(&layout());
        let mut other = set.clone();
        set.insert(RegionIndex(1), PageRange::new(0, 100)).unwrap();
        other
            .insert(RegionIndex(1), PageRange::new(50, 100))
            .unwrap();
        set.union(&other);
        assert_eq!(set.len(), 150);
    }
}
