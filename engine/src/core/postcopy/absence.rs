//! Sets of missing pages, as they are told to the other side.

use ferry_stream::limits::MAX_MAPPED_PAGES;
use ferry_stream::message::Absence;

use crate::core::layout::{PageRange, RegionIndex};
use crate::core::pageset::{OutsideRam, PageSet};

/// A gap of so many pages between two runs costs the map as many bytes as another message would.
const LONGEST_GAP: u64 = 400;

/// What tells the pages of `set`, in order, in as few bytes as is easily had.
pub fn absences(set: &PageSet) -> Vec<Absence> {
    let mut told = Vec::new();
    let mut open: Option<Window> = None;
    for (region, range) in set.ranges() {
        match &mut open {
            Some(window) if window.takes(region, range) => window.runs.push(range),
            _ => {
                told.extend(open.as_ref().map(Window::told));
                open = Some(Window {
                    region,
                    runs: vec![range],
                });
            }
        }
    }
    told.extend(open.as_ref().map(Window::told));
    told
}

/// Runs that are told together.
struct Window {
    region: RegionIndex,
    /// At least one, in order.
    runs: Vec<PageRange>,
}

impl Window {
    fn span(&self) -> (u64, u64) {
        let first = self.runs.first().map_or(0, |run| run.first.0);
        let end = self.runs.last().map_or(0, |run| run.end().0);
        (first, end)
    }

    fn takes(&self, region: RegionIndex, range: PageRange) -> bool {
        let (first, end) = self.span();
        region == self.region
            && range.first.0 - end <= LONGEST_GAP
            && range.end().0 - first <= MAX_MAPPED_PAGES
    }

    fn told(&self) -> Absence {
        let (first, end) = self.span();
        let count = end - first;
        let map = if self.runs.len() == 1 {
            Vec::new()
        } else {
            let bytes = usize::try_from(count.div_ceil(8)).expect("a window has a bounded map");
            let mut map = vec![0_u8; bytes];
            for run in &self.runs {
                for page in run.first.0 - first..run.end().0 - first {
                    let byte = usize::try_from(page / 8).expect("within the map");
                    map[byte] |= 1 << (page % 8);
                }
            }
            map
        };
        Absence {
            region: self.region.0,
            first,
            count,
            map: map.into(),
        }
    }
}

/// Adds what `absence` tells to `set`.
pub fn insert(set: &mut PageSet, absence: &Absence) -> Result<(), OutsideRam> {
    let region = RegionIndex(absence.region);
    for run in absence.runs() {
        set.insert(region, PageRange::new(run.first, run.count))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::core::layout::{Layout, PAGE_SIZE, Region};

    fn layout() -> Layout {
        let region = |name: &str, pages: u64| Region {
            name: name.into(),
            bytes: pages * PAGE_SIZE as u64,
            backing_page_bytes: 4096,
        };
        Layout::new(vec![region("a", 2 * MAX_MAPPED_PAGES), region("b", 3000)]).unwrap()
    }

    fn there_and_back(set: &PageSet) -> Vec<Absence> {
        let told = absences(set);
        let mut back = PageSet::empty(&layout());
        for absence in &told {
            insert(&mut back, absence).unwrap();
        }
        assert_eq!(back, *set);
        told
    }

    #[test]
    fn a_whole_guest_is_told_in_a_few_bytes() {
        let told = there_and_back(&PageSet::full(&layout()));
        assert_eq!(told.len(), 2);
        assert!(told.iter().all(|absence| absence.map.is_empty()));
    }

    #[test]
    fn scattered_pages_are_told_by_maps_of_bounded_length() {
        let mut set = PageSet::empty(&layout());
        for page in (0..2 * MAX_MAPPED_PAGES).step_by(3) {
            set.insert(RegionIndex(0), PageRange::new(page, 1)).unwrap();
        }
        let told = there_and_back(&set);
        assert_eq!(told.len(), 2);
        let bytes: usize = told.iter().map(|absence| absence.map.len()).sum();
        assert!(bytes as u64 <= 2 * MAX_MAPPED_PAGES / 8 + 3);
    }

    #[test]
    fn pages_of_no_region_are_refused() {
        let absence = Absence {
            region: 1,
            first: 2999,
            count: 2,
            map: bytes::Bytes::new(),
        };
        insert(&mut PageSet::empty(&layout()), &absence).unwrap_err();
    }

    proptest! {
        #[test]
        fn what_is_told_is_what_is_missing(
            runs in prop::collection::vec((0..2_u16, 0..2900_u64, 1..100_u64), 0..60),
        ) {
            let mut set = PageSet::empty(&layout());
            for (region, first, count) in runs {
                set.insert(RegionIndex(region), PageRange::new(first, count)).unwrap();
            }
            there_and_back(&set);
        }
    }
}
