//! How much slower a guest has to be for rounds to shrink.
//!
//! A guest is slowed by a part of its time, in percent. It is slowed step by step, never past
//! [`MOST_PERCENT`], and given all of its time back before it is stopped.

/// The most that a guest is slowed by, in percent: it goes on, and answers whoever waits for it.
pub const MOST_PERCENT: u8 = 99;

/// What a round may leave of the one before, as a divisor, once the guest is as slow as the model has
/// it: half as much each time converges within a few rounds.
const LEAVES: u64 = 2;

/// How a guest is slowed that writes faster than the link carries. The defaults are QEMU's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttling {
    /// The first step, in percent of the guest's time: 1 to [`MOST_PERCENT`].
    pub initial_percent: u8,
    /// The least that each later step adds, in percent of the guest's time: 1 to [`MOST_PERCENT`].
    pub increment_percent: u8,
}

impl Default for Throttling {
    fn default() -> Self {
        Self {
            initial_percent: 20,
            increment_percent: 10,
        }
    }
}

/// How slow a guest is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Throttle {
    config: Throttling,
    percent: u8,
}

impl Throttle {
    /// A guest that has all of its time.
    pub(crate) fn new(config: Throttling) -> Self {
        Self { config, percent: 0 }
    }

    /// Whether there is a further step.
    pub(crate) fn has_more(self) -> bool {
        self.percent < MOST_PERCENT
    }

    /// The next step, in percent of the guest's time: what the configuration says, or more where a link
    /// that carries `sent` bytes a second needs more of a guest that writes `written`, as slow as it is.
    pub(crate) fn step(&mut self, sent: u64, written: u64) -> u8 {
        let configured = if self.percent == 0 {
            self.config.initial_percent
        } else {
            self.percent.saturating_add(self.config.increment_percent)
        };
        // Whatever is configured, a step is one.
        let least = configured.max(self.percent.saturating_add(1));
        self.percent = least.max(self.needed(sent, written)).min(MOST_PERCENT);
        self.percent
    }

    /// The guest has all of its time again.
    pub(crate) fn lift(&mut self) {
        self.percent = 0;
    }

    /// By how much a guest must be slowed that writes in proportion to its time, so that each round
    /// leaves [half](LEAVES) of the one before.
    fn needed(self, sent: u64, written: u64) -> u8 {
        let has = u128::from(100 - self.percent.min(100));
        let may_have = (has * u128::from(sent / LEAVES)).checked_div(u128::from(written));
        let may_have = may_have.map_or(100, |percent| percent.min(100));
        100 - u8::try_from(may_have).unwrap_or(100)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn fresh() -> Throttle {
        Throttle::new(Throttling::default())
    }

    #[test]
    fn a_guest_that_writes_little_too_much_is_slowed_as_configured() {
        let mut throttle = fresh();
        let steps: Vec<u8> = (0..3).map(|_| throttle.step(100 * MIB, 50 * MIB)).collect();
        assert_eq!(steps, [20, 30, 40]);
    }

    #[test]
    fn one_that_writes_far_too_much_is_slowed_at_once() {
        // 400 MiB/s are to become 50.
        assert_eq!(fresh().step(100 * MIB, 400 * MIB), 88);
        assert_eq!(fresh().step(1, u64::MAX), MOST_PERCENT);
    }

    #[test]
    fn slowness_that_a_guest_has_counts() {
        let mut throttle = fresh();
        throttle.step(100 * MIB, 100 * MIB);
        assert_eq!(throttle.percent, 50);
        // With half of its time it still writes 100 MiB/s.
        assert_eq!(throttle.step(100 * MIB, 100 * MIB), 75);
        throttle.lift();
        assert_eq!(throttle.step(100 * MIB, 0), 20);
    }

    #[test]
    fn a_step_is_a_step_whatever_is_configured() {
        let mut throttle = Throttle::new(Throttling {
            initial_percent: 0,
            increment_percent: 0,
        });
        assert_eq!([throttle.step(1, 0), throttle.step(1, 0)], [1, 2]);
    }

    proptest! {
        #[test]
        fn steps_only_slow_and_come_to_an_end(
            initial_percent: u8,
            increment_percent: u8,
            rates in prop::collection::vec((1..u64::MAX, any::<u64>()), 100),
        ) {
            let config = Throttling { initial_percent, increment_percent };
            let mut throttle = Throttle::new(config);
            let mut before = 0;
            let mut steps = 0;
            for (sent, written) in rates {
                if !throttle.has_more() {
                    break;
                }
                let now = throttle.step(sent, written);
                prop_assert!(now > before && now <= MOST_PERCENT, "{before} then {now}");
                before = now;
                steps += 1;
            }
            prop_assert!(!throttle.has_more());
            prop_assert!(steps <= u32::from(MOST_PERCENT));
            let configured = u32::from(MOST_PERCENT) / u32::from(increment_percent.max(1)) + 2;
            prop_assert!(steps <= configured, "{steps} steps of {increment_percent} %");
        }

        /// A guest that writes in proportion to its time fits the link after two steps.
        #[test]
        fn the_model_holds_for_a_guest_that_follows_it(
            sent in 1000..1u64 << 40,
            times in 1..50u64,
        ) {
            let unslowed = sent.saturating_mul(times);
            let mut throttle = fresh();
            let mut written = unslowed;
            for _ in 0..2 {
                let left = 100 - u64::from(throttle.step(sent, written));
                written = unslowed / 100 * left;
            }
            prop_assert!(written <= sent / 2 + sent / 100, "{written} of {sent}");
        }
    }
}
