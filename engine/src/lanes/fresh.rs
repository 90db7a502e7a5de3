//! Leaving out pages that the guest has written again before their turn came: they will be collected
//! again, and sent then. On a slow link that is a good part of what a writing guest has dirty.
//!
//! A look costs microseconds for a chunk whose copy costs a hundred. Where nothing is found a lane
//! looks at fewer and fewer chunks, so that an idle guest costs next to nothing.

use std::mem;
use std::sync::{Arc, OnceLock};

use super::send::Run;
use crate::core::layout::PageRange;
use crate::vmm::{Fresh, VmmError};

/// Most chunks that pass without a look after one that found nothing.
const LONGEST_REST: u32 = 15;

/// One lane's looks.
pub(super) struct Looks {
    fresh: Arc<OnceLock<Arc<dyn Fresh>>>,
    kept: Vec<Run>,
    /// Chunks to pass after a look that finds nothing.
    rest: u32,
    /// Chunks still to pass.
    resting: u32,
}

impl Looks {
    pub(super) fn new(fresh: Arc<OnceLock<Arc<dyn Fresh>>>) -> Self {
        Self {
            fresh,
            kept: Vec::new(),
            rest: 0,
            resting: 0,
        }
    }

    /// Takes out of `runs` what the guest has written since it was collected, and tells how many pages.
    pub(super) fn leave_out(&mut self, runs: &mut Vec<Run>) -> Result<u64, VmmError> {
        if self.resting > 0 {
            self.resting -= 1;
            return Ok(0);
        }
        let Some(fresh) = self.fresh.get() else {
            return Ok(0);
        };
        self.kept.clear();
        let mut left_out = 0;
        for &run in &*runs {
            left_out += split(&**fresh, run, &mut self.kept)?;
        }
        if left_out > 0 {
            mem::swap(runs, &mut self.kept);
            self.rest = 0;
        } else {
            self.rest = (self.rest * 2 + 1).min(LONGEST_REST);
        }
        self.resting = self.rest;
        Ok(left_out)
    }
}

/// Adds what may be sent of `run` to `kept`; returns how many pages may not.
fn split(
    fresh: &dyn Fresh,
    Run { region, range }: Run,
    kept: &mut Vec<Run>,
) -> Result<u64, VmmError> {
    let (mut at, end) = (range.first.0, range.end().0);
    let mut keep = |from: u64, to: u64| {
        if from < to {
            let range = PageRange::new(from, to - from);
            kept.push(Run { region, range });
        }
    };
    let mut left_out = 0;
    fresh.written(region, range, &mut |written| {
        // An adapter may tell of more than it was asked for: a huge page, for instance.
        let from = written.first.0.clamp(at, end);
        let to = written.end().0.clamp(at, end);
        keep(at, from);
        left_out += to - from;
        at = to;
    })?;
    keep(at, end);
    Ok(left_out)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::core::layout::RegionIndex;

    /// Tells of these runs, and counts the looks.
    struct Told(Vec<PageRange>, Mutex<u32>);

    impl Fresh for Told {
        fn written(
            &self,
            _: RegionIndex,
            _: PageRange,
            found: &mut dyn FnMut(PageRange),
        ) -> Result<(), VmmError> {
            *self.1.lock().unwrap() += 1;
            self.0.iter().copied().for_each(found);
            Ok(())
        }
    }

    fn looks(told: Vec<PageRange>) -> (Looks, Arc<Told>) {
        let told = Arc::new(Told(told, Mutex::new(0)));
        let fresh: Arc<dyn Fresh> = Arc::clone(&told) as _;
        (Looks::new(Arc::new(OnceLock::from(fresh))), told)
    }

    fn run(first: u64, count: u64) -> Run {
        Run {
            region: RegionIndex(0),
            range: PageRange::new(first, count),
        }
    }

    fn pages(runs: &[Run]) -> Vec<u64> {
        runs.iter()
            .flat_map(|run| run.range.first.0..run.range.end().0)
            .collect()
    }

    proptest! {
        #[test]
        fn what_is_told_is_left_out_and_nothing_else(
            gaps in vec((0_u64..20, 1_u64..10), 0..8),
            first in 0_u64..60,
            count in 1_u64..60,
        ) {
            let mut at = 0;
            let told: Vec<PageRange> = gaps
                .into_iter()
                .map(|(gap, length)| {
                    let range = PageRange::new(at + gap, length);
                    at = range.end().0;
                    range
                })
                .collect();
            let is_told = |page: &u64| told.iter().any(|range| (range.first.0..range.end().0).contains(page));
            let expected: Vec<u64> = (first..first + count).filter(|page| !is_told(page)).collect();
            let (mut looks, _) = looks(told.clone());
            let mut runs = vec![run(first, count)];
            let left_out = looks.leave_out(&mut runs).unwrap();
            prop_assert_eq!(pages(&runs), expected.clone());
            prop_assert_eq!(left_out + expected.len() as u64, count);
        }
    }

    #[test]
    fn finding_nothing_it_looks_less_and_less() {
        let (mut looks, told) = looks(Vec::new());
        for _ in 0..160 {
            looks.leave_out(&mut vec![run(0, 8)]).unwrap();
        }
        let times = *told.1.lock().unwrap();
        assert!((10..=15).contains(&times), "{times} looks");
    }

    #[test]
    fn before_tracking_everything_is_sent() {
        let mut runs = vec![run(3, 5)];
        assert_eq!(Looks::new(Arc::default()).leave_out(&mut runs).unwrap(), 0);
        assert_eq!(pages(&runs), [3, 4, 5, 6, 7]);
    }
}
