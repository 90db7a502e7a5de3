//! Chance, from a seed. Everything random in the world is drawn here, so a seed is the whole story.

use std::ops::RangeInclusive;
use std::time::Duration;

/// A generator of the splitmix family: small, fast, and good enough to shuffle events.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    /// The generator of one seed.
    pub(super) fn new(seed: u64) -> Self {
        // Neighbouring seeds shall have nothing in common.
        let mut rng = Self(seed ^ 0x9e6c_63d0_876a_68de);
        rng.next();
        rng
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number of `range`.
    pub(super) fn within(&mut self, range: RangeInclusive<u64>) -> u64 {
        range.start() + self.below(range.end() - range.start() + 1)
    }

    /// An index of a list of `length` entries, which is not empty.
    pub(super) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).expect("it is below a usize")
    }

    /// One of `choices`.
    pub(super) fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())].clone()
    }

    /// True `percent` times of a hundred.
    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// True once in `times`.
    pub(super) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// A time between two, given in microseconds, with every order of magnitude as likely.
    pub(super) fn micros(&mut self, range: RangeInclusive<u64>) -> Duration {
        let (low, high) = ((*range.start()).max(1), *range.end());
        let octaves = u64::from((high / low).max(1).ilog2());
        let base = low << self.within(0..=octaves);
        let nanos = base * 1000 + self.below(base * 1000);
        Duration::from_nanos(nanos.min(high * 1000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_tells_the_same_story_twice_and_another_seed_another() {
        let story = |seed| {
            let mut rng = Rng::new(seed);
            (0..20).map(|_| rng.next()).collect::<Vec<_>>()
        };
        assert_eq!(story(1), story(1));
        assert_ne!(story(1), story(2));
    }

    #[test]
    fn times_stay_within_their_bounds() {
        let mut rng = Rng::new(7);
        for _ in 0..1000 {
            let time = rng.micros(5..=1000);
            assert!((Duration::from_micros(5)..=Duration::from_millis(1)).contains(&time));
        }
    }
}
