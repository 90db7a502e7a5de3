//! How long faults take, without keeping each of them.

use std::time::Duration;

/// Buckets to every doubling: a figure is right to a sixteenth.
const STEPS: u32 = 16;

/// Enough for all lengths that a `u64` of nanoseconds has.
const BUCKETS: usize = 64 * STEPS as usize;

/// Durations, counted by length.
#[derive(Clone, Debug)]
pub struct Latencies {
    counts: Box<[u64]>,
    count: u64,
    longest: Duration,
    sum: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS].into(),
            count: 0,
            longest: Duration::ZERO,
            sum: Duration::ZERO,
        }
    }
}

/// How the faults of a guest were served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultFigures {
    /// How many there were: waits of the guest, or of its VMM on its behalf, for a page.
    pub count: u64,
    /// Half of them took no longer, to a sixteenth.
    pub p50: Duration,
    /// Nine in ten took no longer.
    pub p90: Duration,
    /// 99 in a hundred took no longer.
    pub p99: Duration,
    /// The longest.
    pub longest: Duration,
    /// All together: the time that threads of the VMM stood still for pages.
    pub total: Duration,
}

impl Latencies {
    /// Counts one.
    pub fn add(&mut self, took: Duration) {
        self.counts[bucket(took)] += 1;
        self.count += 1;
        self.longest = self.longest.max(took);
        self.sum += took;
    }

    /// What they come to.
    pub fn figures(&self) -> FaultFigures {
        FaultFigures {
            count: self.count,
            p50: self.quantile(50),
            p90: self.quantile(90),
            p99: self.quantile(99),
            longest: self.longest,
            total: self.sum,
        }
    }

    /// What `percent` of them do not exceed, by the end of its bucket.
    fn quantile(&self, percent: u64) -> Duration {
        let wanted = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return Duration::from_nanos(bucket_end(at)).min(self.longest);
            }
        }
        Duration::ZERO
    }
}

/// Lengths below [`STEPS`] have a bucket each; above, every doubling has [`STEPS`].
fn bucket(took: Duration) -> usize {
    let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    let Some(doublings) = nanos.max(1).ilog2().checked_sub(STEPS.ilog2()) else {
        return usize::try_from(nanos).unwrap_or(0);
    };
    let within = (nanos >> doublings) - u64::from(STEPS);
    let at = u64::from((doublings + 1) * STEPS) + within;
    usize::try_from(at).unwrap_or(BUCKETS - 1).min(BUCKETS - 1)
}

/// The longest that belongs to a bucket, in nanoseconds.
fn bucket_end(at: usize) -> u64 {
    let (at, steps) = (at as u64, u64::from(STEPS));
    let Some(doublings) = (at / steps).checked_sub(1) else {
        return at;
    };
    let first = steps + at % steps;
    let end = u128::from(first + 1) << doublings;
    u64::try_from(end - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_has_no_figures() {
        assert_eq!(Latencies::default().figures(), FaultFigures::default());
    }

    proptest! {
        #[test]
        fn figures_are_right_to_a_sixteenth(mut nanos in prop::collection::vec(any::<u64>().prop_map(|n| n >> (n % 60)), 1..300)) {
            let mut latencies = Latencies::default();
            for nanos in &nanos {
                latencies.add(Duration::from_nanos(*nanos));
            }
            nanos.sort_unstable();
            let figures = latencies.figures();
            prop_assert_eq!(figures.count, nanos.len() as u64);
            prop_assert_eq!(figures.longest, Duration::from_nanos(*nanos.last().unwrap()));
            for (percent, found) in [(50, figures.p50), (90, figures.p90), (99, figures.p99)] {
                let exact = nanos[(nanos.len() * percent).div_ceil(100) - 1];
                let found = u64::try_from(found.as_nanos()).unwrap();
                prop_assert!(found >= exact && found - exact <= exact / 16, "p{percent}: {found} for {exact}");
            }
        }
    }
}
