//! Pages that the guest rewrites all the time wait for the last round.
//!
//! Whatever is sent of them before is sent in vain. A page is hot when each of the last three
//! collections found it dirty; once a collection does not, it is sent. What waits counts as
//! dirty for every decision, and never more waits than the last round can carry within the downtime
//! limit: so nothing is put off that would have to be paid for with the guest standing.

use crate::core::layout::Layout;
use crate::core::pageset::{Cursor, PageSet};

/// What the latest collections found, and what waits.
#[derive(Debug)]
pub(crate) struct Heat {
    /// Found by the latest collection.
    once: PageSet,
    /// Found by both of the latest two.
    twice: PageSet,
    waiting: PageSet,
}

impl Heat {
    pub(crate) fn new(layout: &Layout) -> Self {
        let empty = PageSet::empty(layout);
        Self {
            once: empty.clone(),
            twice: empty.clone(),
            waiting: empty,
        }
    }

    /// Notes what a collection found, and adds to it what waited: all that is dirty.
    pub(crate) fn collected(&mut self, found: &mut PageSet) -> Hot {
        let hot = Hot(found.intersection(&self.twice));
        self.twice = found.intersection(&self.once);
        self.once.clear();
        self.once.union(found);
        found.union(&self.waiting);
        self.waiting.clear();
        hot
    }

    /// Takes the hot pages out of `dirty`, up to `most` of them: they wait.
    pub(crate) fn hold(&mut self, hot: &Hot, dirty: &mut PageSet, most: u64) {
        let mut left = most;
        let mut cursor = Cursor::default();
        while left > 0
            && let Some((region, range)) = hot.0.next_run(&mut cursor, left)
        {
            dirty
                .remove(region, range)
                .expect("both sets are over one layout");
            self.waiting
                .insert(region, range)
                .expect("both sets are over one layout");
            left -= range.count;
        }
    }

    /// How many pages wait.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.len()
    }
}

/// The hot pages of a collection.
pub(crate) struct Hot(PageSet);

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::core::layout::{PageRange, Region, RegionIndex};

    const PAGES: u64 = 40;

    fn layout() -> Layout {
        let region = Region {
            name: "ram".into(),
            bytes: PAGES << 12,
            backing_page_bytes: 4096,
        };
        Layout::new(vec![region]).unwrap()
    }

    fn set(pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::empty(&layout());
        for &page in pages {
            set.insert(RegionIndex(0), PageRange::new(page, 1)).unwrap();
        }
        set
    }

    fn pages(set: &PageSet) -> BTreeSet<u64> {
        set.ranges()
            .flat_map(|(_, range)| range.first.0..range.end().0)
            .collect()
    }

    proptest! {
        /// Against a count kept by page: what is sent and what waits is all that is dirty, nothing
        /// waits that was not found three times in a row, and no more than may.
        #[test]
        fn every_dirty_page_is_sent_or_waits(
            rounds in vec((vec(0..PAGES, 0..30), 0..20_u64), 1..12),
        ) {
            let mut heat = Heat::new(&layout());
            let mut in_a_row = BTreeMap::<u64, u32>::new();
            let mut unsent = BTreeSet::new();
            for (found, most) in rounds {
                let found: BTreeSet<u64> = found.into_iter().collect();
                in_a_row.retain(|page, _| found.contains(page));
                for &page in &found {
                    *in_a_row.entry(page).or_default() += 1;
                }
                unsent.extend(&found);
                let mut dirty = set(&found);
                let hot = heat.collected(&mut dirty);
                prop_assert_eq!(&pages(&dirty), &unsent);
                heat.hold(&hot, &mut dirty, most);
                let sent = pages(&dirty);
                unsent.retain(|page| !sent.contains(page));
                let are_hot = |page: &u64| in_a_row.get(page).is_some_and(|times| *times >= 3);
                let hot_count = in_a_row.values().filter(|times| **times >= 3).count() as u64;
                prop_assert!(unsent.iter().all(are_hot), "{unsent:?} wait, by {in_a_row:?}");
                prop_assert_eq!(unsent.len() as u64, hot_count.min(most));
                prop_assert_eq!(heat.waiting(), unsent.len() as u64);
            }
        }
    }
}
