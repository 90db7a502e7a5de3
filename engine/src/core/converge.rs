//! When to stop the guest.
//!
//! A round sends what the last one left dirty, and the guest dirties more while it lasts. Precopy
//! converges when each round leaves less than the one before. The rule is asked after every
//! collection, when what is dirty is known exactly.

use std::time::Duration;

use crate::core::layout::PAGE_SIZE;
use crate::core::meter::RoundReport;
use crate::core::throttle::MOST_PERCENT;

/// What a rule has to go by.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct View<'a> {
    /// The rounds that are over, oldest first.
    pub rounds: &'a [RoundReport],
    /// Pages that would have to be sent if the guest were stopped now.
    pub dirty_pages: u64,
    /// What the link carries, in bytes a second; never 0.
    pub rate_bytes_per_s: u64,
    /// What the guest writes, in bytes a second, as slow as it is.
    pub dirty_bytes_per_s: u64,
    /// By how much the guest is slowed, in percent of its time. It has all of it again before it is
    /// stopped.
    pub throttled_percent: u8,
    /// Whether it may be slowed further: [`Verdict::Throttle`] means something.
    pub may_throttle: bool,
    /// The same with every write counted, as far as that can be told: see [`written_bytes_per_s`].
    pub written_bytes_per_s: u64,
    /// True when it is asked within a round: nothing but [`Verdict::Postcopy`] means anything then.
    pub within_round: bool,
    /// Whether the guest may be handed over before its pages: [`Verdict::Postcopy`] means something.
    pub may_hand_over: bool,
    /// What the VMMs take of a switchover: pause, device state both ways, resume.
    pub vmm: Duration,
    /// What looking for dirty pages takes, with hardly any.
    pub scan: Spread,
    /// What a round takes besides sending its pages.
    pub latency: Spread,
    /// The downtime limit.
    pub limit: Duration,
}

impl View<'_> {
    /// What a switchover with nothing dirty costs at best: the VMMs' share, and two scans and rounds,
    /// before the device state is saved and after it.
    pub fn floor(&self) -> Duration {
        let each = self.scan.best.saturating_add(self.latency.best);
        self.vmm.saturating_add(each.saturating_mul(2))
    }

    /// The blackout if the guest were stopped now: the prediction at best, and what scans and rounds
    /// have been slower of late.
    pub fn predicted(&self) -> Duration {
        let each = self.scan.excess().saturating_add(self.latency.excess());
        self.predicted_at_best()
            .saturating_add(each.saturating_mul(2))
    }

    /// The blackout if the guest were stopped now and the machine left us alone: the floor, and what is
    /// dirty, and will be before the guest stands, at the link's rate.
    pub fn predicted_at_best(&self) -> Duration {
        let time_percent = 100 - u128::from(self.throttled_percent.min(MOST_PERCENT));
        let unslowed = u128::from(self.dirty_bytes_per_s) * 100 / time_percent;
        let fresh_bytes = unslowed * STOP_DELAY.as_millis() / 1000;
        let fresh_pages = u64::try_from(fresh_bytes / PAGE_SIZE as u128).unwrap_or(u64::MAX);
        let pages = self.dirty_pages.saturating_add(fresh_pages);
        self.floor().saturating_add(self.transfer(pages))
    }

    /// Whether the guest writes as much as the link carries.
    fn outruns(&self) -> bool {
        self.written_bytes_per_s >= self.rate_bytes_per_s
    }

    /// Time to send `pages` pages at the link's rate.
    pub fn transfer(&self, pages: u64) -> Duration {
        let bytes = u128::from(pages) * PAGE_SIZE as u128;
        let nanos = bytes * 1_000_000_000 / u128::from(self.rate_bytes_per_s.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// How many pages may wait for the last round: what fits into a half of what the limit leaves for
    /// pages. The other half is for those that are dirty by chance.
    pub fn may_wait(&self) -> u64 {
        let room = self.effective_limit().saturating_sub(self.floor()) / 2;
        let bytes = u128::from(self.rate_bytes_per_s) * room.as_nanos() / 1_000_000_000;
        u64::try_from(bytes / PAGE_SIZE as u128).unwrap_or(u64::MAX)
    }

    /// The limit that counts: never below what an empty switchover costs.
    pub fn effective_limit(&self) -> Duration {
        self.limit.max(self.floor().saturating_add(LEAST_TRANSFER))
    }
}

/// What a guest writes, in bytes a second, that has `dirty` of `all` pages dirty after `span`: the longer
/// that is, the more writes go to pages that are dirty already.
///
/// Taken for uniform over all pages, a write finds a page clean with the chance that is left, so of N
/// pages D are dirty after w writes when w = -N ln(1 - D/N).
pub fn written_bytes_per_s(dirty: u64, all: u64, span: Duration) -> u64 {
    let all = all.max(1);
    let clean = all.saturating_sub(dirty).max(1);
    let writes = number(all) * (number(all) / number(clean)).ln();
    let rate = writes.max(number(dirty)) * number(PAGE_SIZE as u64) / span.as_secs_f64().max(1e-6);
    // Positive, and what is too large comes out as the largest.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "see above"
    )]
    let rate = rate as u64;
    rate
}

/// A count as a number to calculate with.
#[expect(
    clippy::cast_precision_loss,
    reason = "counts and rates: all far below 2^53"
)]
fn number(count: u64) -> f64 {
    count as f64
}

/// Durations of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// The shortest of all.
    pub best: Duration,
    /// The longest of late: what comes next may take as long.
    pub slowest: Duration,
}

impl Spread {
    fn excess(self) -> Duration {
        self.slowest.saturating_sub(self.best)
    }
}

/// How long a guest goes on after it was ordered to stop: QEMU sets its own migration up first, in 2 to
/// 4 ms.
const STOP_DELAY: Duration = Duration::from_millis(4);

/// The least time for pages that a limit leaves above the floor: some pages are always dirty.
const LEAST_TRANSFER: Duration = Duration::from_millis(1);

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// Another round.
    Continue,
    /// Stop the guest and finish.
    Stop,
    /// Another round, with the guest slowed, or slowed further. The same as [`Verdict::Continue`] where
    /// [`View::may_throttle`] says no.
    Throttle,
    /// Hand the guest over now, before its pages. The same as [`Verdict::GiveUp`] where
    /// [`View::may_hand_over`] says no.
    Postcopy,
    /// Give up: the guest is kept.
    GiveUp,
}

/// A convergence rule.
pub trait Converge: Send {
    /// Decides. Called after every collection, with the guest running, and now and then within a round.
    fn decide(&mut self, view: &View<'_>) -> Verdict;
}

/// The default rule: stops when the predicted blackout fits the downtime limit, but not while a
/// further round costs little and would still cut it. When rounds no longer shrink it slows the guest
/// where it may, step by step, and gives up where it may not, or that has not helped. Where only a busy
/// machine stands against it, it lets a few rounds go by for that to pass.
#[derive(Clone, Copy, Debug)]
pub struct DowntimeLimit {
    /// How long rounds may go on without shrinking.
    patience: Duration,
    /// The least dirty set so far.
    best: Option<u64>,
    /// Rounds in a row that did not improve on it.
    stalled: u32,
    /// How long these have taken.
    stalled_for: Duration,
    /// Rounds in a row that would have fitted if the machine had been quiet.
    unquiet: u32,
}

impl Default for DowntimeLimit {
    fn default() -> Self {
        Self::with_patience(PATIENCE_SPAN)
    }
}

impl DowntimeLimit {
    /// A rule that lets rounds go on for so long, at least, without shrinking.
    pub fn with_patience(patience: Duration) -> Self {
        Self {
            patience,
            best: None,
            stalled: 0,
            stalled_for: Duration::ZERO,
            unquiet: 0,
        }
    }

    /// Rounds have to shrink from here, and are given all patience to.
    fn measure_anew(&mut self, dirty_pages: u64) {
        self.best = Some(dirty_pages);
        self.stalled = 0;
        self.stalled_for = Duration::ZERO;
    }

    /// Whether rounds will not come to fit: the guest writes as much as the link carries, or they have not
    /// shrunk for a while.
    fn cannot_meet(&self, view: &View<'_>) -> bool {
        view.outruns() || self.stalled >= STEP_ROUNDS
    }

    fn is_due_a_step(&self) -> bool {
        self.stalled >= STEP_ROUNDS && self.stalled_for >= STEP_SPAN.min(self.patience)
    }
}

/// A round "shrinks" when it leaves less than this part of the best so far, in percent.
const SHRINK_PERCENT: u64 = 90;

/// Rounds in a row that do not shrink before the rule gives up: enough for a burst to pass.
const PATIENCE: u32 = 12;

/// And for how long: rounds of some milliseconds follow each other faster than a busy host becomes
/// quiet again.
const PATIENCE_SPAN: Duration = Duration::from_secs(3);

/// Rounds in a row that do not shrink before the guest is slowed, or slowed further: one may be a burst.
const STEP_ROUNDS: u32 = 2;

/// And for how long: what a step brings shows in what is written after it.
const STEP_SPAN: Duration = Duration::from_millis(500);

/// Rounds that are let go by for a busy machine to become quiet: some tens of milliseconds.
const UNQUIET_ROUNDS: u32 = 8;

/// When what is left takes less than this part of the floor to send, a further round gains nothing
/// that the guest would notice.
const NEGLIGIBLE: u32 = 16;

impl Converge for DowntimeLimit {
    fn decide(&mut self, view: &View<'_>) -> Verdict {
        if view.within_round {
            return if view.may_hand_over && view.outruns() {
                Verdict::Postcopy
            } else {
                Verdict::Continue
            };
        }
        let shrinks = self
            .best
            .is_none_or(|best| view.dirty_pages * 100 < best * SHRINK_PERCENT);
        if shrinks {
            self.measure_anew(view.dirty_pages);
        } else {
            self.stalled += 1;
            self.stalled_for += view.rounds.last().map_or(Duration::ZERO, |last| last.took);
        }
        let gives_up = self.stalled > PATIENCE && self.stalled_for >= self.patience;
        let fits_at_best = view.predicted_at_best() <= view.effective_limit();
        let is_quiet = view.predicted() <= view.effective_limit();
        let waits = fits_at_best && !is_quiet && self.unquiet < UNQUIET_ROUNDS;
        self.unquiet = if waits { self.unquiet + 1 } else { 0 };
        let fits = fits_at_best && !waits;
        let negligible = view.transfer(view.dirty_pages) <= view.floor() / NEGLIGIBLE;
        if fits && (negligible || !shrinks) {
            Verdict::Stop
        } else if !fits_at_best && view.may_hand_over && self.cannot_meet(view) {
            Verdict::Postcopy
        } else if !fits_at_best && view.may_throttle && self.is_due_a_step() {
            // What came before it says nothing of a slower guest.
            self.measure_anew(view.dirty_pages);
            Verdict::Throttle
        } else if !fits_at_best && gives_up {
            Verdict::GiveUp
        } else {
            Verdict::Continue
        }
    }
}

#[cfg(test)]
mod tests {
    use ferry_stream::message::Round;

    use super::*;

    const MIB_PER_S: u64 = 1 << 20;

    fn view(dirty_pages: u64) -> View<'static> {
        View {
            rounds: &[],
            dirty_pages,
            rate_bytes_per_s: 100 * MIB_PER_S,
            dirty_bytes_per_s: 0,
            throttled_percent: 0,
            may_throttle: false,
            may_hand_over: false,
            written_bytes_per_s: 0,
            within_round: false,
            vmm: Duration::from_millis(6),
            scan: always(1),
            latency: always(1),
            limit: Duration::from_millis(50),
        }
    }

    fn always(ms: u64) -> Spread {
        let span = Duration::from_millis(ms);
        Spread {
            best: span,
            slowest: span,
        }
    }

    #[test]
    fn every_write_counts_and_not_every_dirty_page() {
        let span = Duration::from_secs(4);
        let writes = |dirty| written_bytes_per_s(dirty, 100_000, span) / 4096;
        assert_eq!(writes(0), 0);
        assert!((250..=251).contains(&writes(1000)), "{}", writes(1000));
        // Of 100,000 pages 70,000: 120,400 writes.
        assert!(
            (30_000..30_200).contains(&writes(70_000)),
            "{}",
            writes(70_000)
        );
        assert!(writes(100_000) > 200_000 && writes(200_000) > 200_000);
    }

    #[test]
    fn hands_over_as_soon_as_copying_cannot_keep_up() {
        let busy = View {
            dirty_bytes_per_s: 70 * MIB_PER_S,
            written_bytes_per_s: 100 * MIB_PER_S,
            may_hand_over: true,
            ..view(70_000)
        };
        let decides = |view: &View<'_>| DowntimeLimit::default().decide(view);
        assert_eq!(decides(&busy), Verdict::Postcopy);
        let kept = View {
            may_hand_over: false,
            ..busy.clone()
        };
        assert_eq!(decides(&kept), Verdict::Continue);
        let calm = View {
            written_bytes_per_s: 99 * MIB_PER_S,
            ..busy.clone()
        };
        assert_eq!(decides(&calm), Verdict::Continue);
        // A hot set that does not shrink.
        let mut rule = DowntimeLimit::default();
        let verdicts = std::iter::from_fn(|| Some(rule.decide(&calm)));
        let went_on = verdicts.take_while(|verdict| *verdict == Verdict::Continue);
        assert_eq!(went_on.count(), STEP_ROUNDS as usize);
    }

    #[test]
    fn within_a_round_it_hands_over_or_goes_on() {
        let within = View {
            within_round: true,
            may_hand_over: true,
            written_bytes_per_s: 100 * MIB_PER_S,
            ..view(0)
        };
        let mut rule = DowntimeLimit::default();
        assert_eq!(rule.decide(&within), Verdict::Postcopy);
        let calm = View {
            written_bytes_per_s: 0,
            ..within
        };
        assert_eq!(rule.decide(&calm), Verdict::Continue, "though it would fit");
    }

    #[test]
    fn lets_a_busy_moment_pass_but_not_for_ever() {
        let busy = View {
            scan: Spread {
                best: Duration::from_millis(1),
                slowest: Duration::from_millis(30),
            },
            ..view(5)
        };
        assert!(busy.predicted() > busy.limit && busy.predicted_at_best() < busy.limit);
        let mut rule = DowntimeLimit::default();
        let rounds = std::iter::from_fn(|| Some(rule.decide(&busy)));
        let waited = rounds.take_while(|verdict| *verdict == Verdict::Continue);
        assert_eq!(waited.count(), UNQUIET_ROUNDS as usize);
        let mut rule = DowntimeLimit::default();
        assert_eq!(rule.decide(&busy), Verdict::Continue);
        assert_eq!(rule.decide(&view(5)), Verdict::Stop, "it is quiet now");
    }

    #[test]
    fn predicts_floor_and_transfer() {
        // 2560 pages are 10 MiB: 100 ms at 100 MiB/s.
        assert_eq!(view(2560).predicted(), Duration::from_millis(110));
    }

    #[test]
    fn counts_what_is_written_before_the_guest_stands() {
        // 50 MiB/s for 4 ms are 51 pages, which take 2 ms.
        let busy = View {
            dirty_bytes_per_s: 50 * MIB_PER_S,
            ..view(0)
        };
        let extra = busy.predicted().saturating_sub(busy.floor());
        assert!((1900..=2000).contains(&extra.as_micros()), "{extra:?}");
        // With all of its time again it writes 200 MiB/s.
        let slowed = View {
            throttled_percent: 75,
            ..busy
        };
        let extra = slowed.predicted().saturating_sub(slowed.floor());
        assert!((7900..=8000).contains(&extra.as_micros()), "{extra:?}");
    }

    #[test]
    fn goes_on_while_a_round_still_helps_then_stops() {
        let mut rule = DowntimeLimit::default();
        assert_eq!(rule.decide(&view(10_000)), Verdict::Continue);
        assert_eq!(
            rule.decide(&view(500)),
            Verdict::Continue,
            "fits, but shrinks fast"
        );
        assert_eq!(
            rule.decide(&view(490)),
            Verdict::Stop,
            "fits, and shrinks no more"
        );
    }

    #[test]
    fn stops_at_once_when_hardly_anything_is_dirty() {
        assert_eq!(DowntimeLimit::default().decide(&view(5)), Verdict::Stop);
    }

    #[test]
    fn gives_up_when_rounds_do_not_shrink() {
        let mut rule = DowntimeLimit::with_patience(Duration::ZERO);
        let verdicts: Vec<_> = (0..=PATIENCE + 1)
            .map(|_| rule.decide(&view(10_000)))
            .collect();
        assert_eq!(verdicts.last(), Some(&Verdict::GiveUp));
        assert!(
            verdicts[..verdicts.len() - 1]
                .iter()
                .all(|verdict| *verdict == Verdict::Continue)
        );
    }

    #[test]
    fn short_rounds_are_given_time_to_shrink() {
        let stalled = View {
            rounds: &[round(5)],
            ..view(10_000)
        };
        let mut rule = DowntimeLimit::with_patience(Duration::from_millis(200));
        let verdicts = std::iter::from_fn(|| Some(rule.decide(&stalled)));
        let went_on = verdicts.take_while(|verdict| *verdict == Verdict::Continue);
        // The first one shrinks.
        assert_eq!(went_on.count(), 40);
    }

    fn round(took_ms: u64) -> RoundReport {
        RoundReport {
            round: Round(1),
            dirty_pages: 10_000,
            pages: 10_000,
            zero_pages: 0,
            bytes: 0,
            took: Duration::from_millis(took_ms),
            dirty_bytes_per_s: 0,
        }
    }

    /// Verdicts until one is not to continue, and that one.
    fn until_a_verdict(rule: &mut DowntimeLimit, view: &View<'_>) -> (usize, Verdict) {
        let mut verdicts = std::iter::repeat_with(|| rule.decide(view)).enumerate();
        let found = verdicts.find(|(_, verdict)| *verdict != Verdict::Continue);
        found.expect("rounds that do not shrink lead to something")
    }

    #[test]
    fn rounds_that_do_not_shrink_slow_the_guest_as_long_as_it_may_be_slowed() {
        let rounds = [round(300)];
        let mut slows = View {
            rounds: &rounds,
            may_throttle: true,
            ..view(10_000)
        };
        let mut rule = DowntimeLimit::default();
        // The first one shrinks, whatever it leaves.
        assert_eq!(until_a_verdict(&mut rule, &slows), (2, Verdict::Throttle));
        assert_eq!(until_a_verdict(&mut rule, &slows), (1, Verdict::Throttle));
        slows.dirty_pages = 8000;
        assert_eq!(until_a_verdict(&mut rule, &slows), (2, Verdict::Throttle));
        slows.may_throttle = false;
        // Patience is counted from the last step.
        let rounds = usize::try_from(PATIENCE).unwrap();
        assert_eq!(
            until_a_verdict(&mut rule, &slows),
            (rounds, Verdict::GiveUp)
        );
    }

    #[test]
    fn a_step_is_given_time_to_show() {
        let rounds = [round(50)];
        let slows = View {
            rounds: &rounds,
            may_throttle: true,
            ..view(10_000)
        };
        let mut rule = DowntimeLimit::default();
        assert_eq!(until_a_verdict(&mut rule, &slows), (10, Verdict::Throttle));
        let mut rule = DowntimeLimit::with_patience(Duration::from_millis(150));
        assert_eq!(until_a_verdict(&mut rule, &slows), (3, Verdict::Throttle));
    }

    #[test]
    fn what_fits_is_never_slowed() {
        let rounds = [round(300)];
        let fits = View {
            rounds: &rounds,
            may_throttle: true,
            ..view(500)
        };
        let mut rule = DowntimeLimit::default();
        assert_eq!(until_a_verdict(&mut rule, &fits), (1, Verdict::Stop));
    }

    #[test]
    fn a_limit_below_the_floor_counts_as_the_floor() {
        let low = View {
            limit: Duration::from_millis(1),
            ..view(1)
        };
        assert_eq!(low.effective_limit(), Duration::from_millis(11));
        assert_eq!(DowntimeLimit::default().decide(&low), Verdict::Stop);
    }
}
