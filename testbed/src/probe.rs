//! What the guest saw of a migration, from its own progress counter and nobody's claims.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::{Field, StatusPage, TestbedError};

/// Between two samples: 4 kHz.
const SAMPLE_INTERVAL: Duration = Duration::from_micros(250);

/// The least of the real-time priorities is above all that is not real-time.
const PRIORITY: &str = "1";

/// The width over which rates are averaged for the curve and the brown-out.
const BUCKET: Duration = Duration::from_millis(10);

/// Watches the counter at both sides until it is asked what it saw.
#[derive(Debug)]
pub struct Probe {
    stop: Stop,
    sampler: JoinHandle<Result<Vec<Sample>, TestbedError>>,
    started: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    at: Duration,
    source: u64,
    target: u64,
}

/// What a probe saw.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When the probe began; all times count from here.
    pub started: Instant,
    /// Of a guest that has moved, the time from its last progress at the source to its first at the
    /// target; of one that stayed, the same as [`Seen::longest_stall`].
    pub blackout: Duration,
    /// When the blackout began.
    pub blackout_at: Duration,
    /// When the target first made progress of its own, if it did.
    pub moved_at: Option<Duration>,
    /// The longest time without progress anywhere: a busy machine, or the first faults of a guest at
    /// the target, may hold it up for longer than the blackout did.
    pub longest_stall: Duration,
    /// Time with less than half of the normal progress, the blackout included.
    pub brownout: Duration,
    /// The median progress of the buckets before the blackout, in steps a second.
    pub normal_per_s: u64,
    /// Progress in steps a second, one value for every 10 ms.
    pub curve: Vec<u64>,
    /// The guest's counter at every sample, the two sides' as one.
    pub progress: Vec<(Duration, u64)>,
    /// The longest pause of the probe itself: no blackout below this can be told from none.
    pub resolution: Duration,
}

impl Probe {
    /// Begins to watch `source`, and `target` where the same guest may go on.
    pub fn start(source: StatusPage, target: Option<StatusPage>) -> Self {
        let stop = Stop(Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop.0);
        let started = Instant::now();
        let sampler = thread::spawn(move || sample(started, &stopped, &source, target.as_ref()));
        Self {
            stop,
            sampler,
            started,
        }
    }

    /// Ends the watch.
    pub fn finish(self) -> Result<Seen, TestbedError> {
        drop(self.stop);
        let samples = self
            .sampler
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(evaluate(self.started, &samples))
    }
}

/// Ends the sampler when dropped, also with a test that fails.
#[derive(Debug)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn sample(
    started: Instant,
    stop: &AtomicBool,
    source: &StatusPage,
    target: Option<&StatusPage>,
) -> Result<Vec<Sample>, TestbedError> {
    go_before_others();
    let mut samples = Vec::new();
    let mut next = started;
    while !stop.load(Ordering::Relaxed) {
        samples.push(Sample {
            at: started.elapsed(),
            source: source.value(Field::Progress)?,
            target: target.map_or(Ok(0), |page| page.value(Field::Progress))?,
        });
        next = (next + SAMPLE_INTERVAL).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(samples)
}

/// Asks for this thread to be run before all ordinary ones: on a busy machine the probe would measure
/// its own waiting. Where that is not allowed, [`Seen::resolution`] tells.
fn go_before_others() {
    let thread = nix::unistd::gettid().to_string();
    _ = Command::new("chrt")
        .args(["--fifo", "--pid", PRIORITY, &thread])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

fn evaluate(started: Instant, samples: &[Sample]) -> Seen {
    let (progress, moved_at) = one_guest(samples);
    let (stall_at, stall) = longest_stall(&progress);
    let (blackout_at, blackout) = match moved_at {
        Some(moved) => {
            let last = last_change(samples);
            (last, moved.saturating_sub(last))
        }
        None => (stall_at, stall),
    };
    let curve = curve(&progress);
    // Whole buckets before the blackout; without any, all of them.
    let before = buckets(blackout_at).min(curve.len());
    let normal_per_s = median(&curve[..before])
        .or_else(|| median(&curve))
        .unwrap_or(0);
    let slow = curve
        .iter()
        .filter(|&&rate| rate < normal_per_s / 2)
        .count();
    let resolution = samples
        .windows(2)
        .map(|pair| pair[1].at.saturating_sub(pair[0].at))
        .max()
        .unwrap_or_default();
    Seen {
        started,
        blackout,
        blackout_at,
        moved_at,
        longest_stall: stall,
        brownout: BUCKET * u32::try_from(slow).unwrap_or(u32::MAX),
        normal_per_s,
        curve,
        progress,
        resolution,
    }
}

impl Seen {
    /// What two probes saw together, one at each side, each of its own counter: times count from
    /// `started` by one clock.
    pub fn of_both(
        started: Instant,
        source: &[(Duration, u64)],
        target: &[(Duration, u64)],
    ) -> Self {
        let source = source.iter().map(|&(at, steps)| (at, Some(steps), None));
        let target = target.iter().map(|&(at, steps)| (at, None, Some(steps)));
        let mut looks: Vec<_> = source.chain(target).collect();
        looks.sort_by_key(|&(at, ..)| at);
        let mut last = Sample {
            at: Duration::ZERO,
            source: 0,
            target: 0,
        };
        let samples: Vec<Sample> = looks
            .into_iter()
            .map(|(at, source, target)| {
                last = Sample {
                    at,
                    source: source.unwrap_or(last.source),
                    target: target.unwrap_or(last.target),
                };
                last
            })
            .collect();
        evaluate(started, &samples)
    }

    /// What the guest has counted up to a moment, between two samples in proportion.
    pub fn steps_at(&self, at: Duration) -> f64 {
        let after = self.progress.partition_point(|&(when, _)| when < at);
        let value = |(_, steps): (Duration, u64)| steps_as_f64(steps);
        match (after.checked_sub(1), self.progress.get(after)) {
            (Some(before), Some(&next)) => {
                let last = self.progress[before];
                let width = next.0.saturating_sub(last.0).as_secs_f64();
                let part = at.saturating_sub(last.0).as_secs_f64() / width;
                value(last) + part * (value(next) - value(last))
            }
            (Some(before), None) => value(self.progress[before]),
            (None, first) => first.copied().map_or(0.0, value),
        }
    }

    /// When the longest time without progress between two moments began, and how long it was.
    pub fn longest_stall_between(&self, from: Duration, to: Duration) -> (Duration, Duration) {
        let first = self.progress.partition_point(|&(at, _)| at < from);
        let last = self.progress.partition_point(|&(at, _)| at <= to);
        longest_stall(&self.progress[first.min(last)..last])
    }

    /// Steps a second from the start of the watch to `until`.
    pub fn rate_before(&self, until: Duration) -> f64 {
        let started = self.progress.first().map_or(Duration::ZERO, |&(at, _)| at);
        let steps = self.steps_at(until) - self.steps_at(started);
        steps / until.saturating_sub(started).as_secs_f64()
    }

    /// Seconds of normal running that the guest lost from `from` to `to`; what it did before `from`
    /// is normal. Negative when it did more than normally.
    pub fn lost_s(&self, from: Duration, to: Duration) -> f64 {
        let done_s = (self.steps_at(to) - self.steps_at(from)) / self.rate_before(from);
        to.saturating_sub(from).as_secs_f64() - done_s
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "no guest counts to 2^53 while a test runs"
)]
fn steps_as_f64(steps: u64) -> f64 {
    steps as f64
}

/// The two counters as one, and the moment of the move.
///
/// The target's copy of the counter changes whenever the page is copied. It counts as the guest's
/// own progress once it is past the last value that the source ever had.
fn one_guest(samples: &[Sample]) -> (Vec<(Duration, u64)>, Option<Duration>) {
    let last_at_source = samples.last().map_or(0, |sample| sample.source);
    let is_there = |sample: &&Sample| sample.target > last_at_source;
    let moved_at = samples.iter().find(is_there).map(|sample| sample.at);
    let progress = samples
        .iter()
        .map(|sample| match moved_at {
            Some(moved) if sample.at >= moved => (sample.at, sample.target),
            _ => (sample.at, sample.source),
        })
        .collect();
    (progress, moved_at)
}

/// When the source's counter was first seen at its last value.
fn last_change(samples: &[Sample]) -> Duration {
    let last = samples.last().map(|sample| sample.source);
    samples
        .iter()
        .find(|sample| Some(sample.source) == last)
        .map_or(Duration::ZERO, |sample| sample.at)
}

/// When the longest time without a change began, and how long it was.
fn longest_stall(progress: &[(Duration, u64)]) -> (Duration, Duration) {
    let Some(&(first, mut value)) = progress.first() else {
        return Default::default();
    };
    let (mut since, mut longest) = (first, (first, Duration::ZERO));
    for &(at, now) in progress {
        let still = at.saturating_sub(since);
        if still > longest.1 {
            longest = (since, still);
        }
        if now != value {
            (since, value) = (at, now);
        }
    }
    longest
}

fn curve(progress: &[(Duration, u64)]) -> Vec<u64> {
    let mut curve = Vec::new();
    let Some(&(mut begin, mut value)) = progress.first() else {
        return curve;
    };
    for &(at, now) in progress {
        let width = at.saturating_sub(begin);
        if width >= BUCKET {
            let steps = u128::from(now.saturating_sub(value)) * 1_000_000_000;
            let rate = u64::try_from(steps / width.as_nanos()).unwrap_or(u64::MAX);
            // A probe that was held up fills all the buckets that it missed.
            curve.extend(std::iter::repeat_n(rate, buckets(width)));
            (begin, value) = (at, now);
        }
    }
    curve
}

fn buckets(time: Duration) -> usize {
    usize::try_from(time.as_nanos() / BUCKET.as_nanos()).unwrap_or(usize::MAX)
}

fn median(rates: &[u64]) -> Option<u64> {
    let mut sorted = rates.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that steps once a millisecond, is copied in between, stands still from 500 to 530 ms
    /// and goes on at the target.
    fn moved() -> Vec<Sample> {
        (0..1000)
            .map(|ms: u64| Sample {
                at: Duration::from_millis(ms),
                source: ms.min(500),
                target: match ms {
                    0..200 => 0,
                    200..510 => 200,
                    510..530 => 500,
                    _ => 500 + (ms - 529),
                },
            })
            .collect()
    }

    #[test]
    fn copying_the_counter_is_no_progress() {
        let seen = evaluate(Instant::now(), &moved());
        assert_eq!(seen.blackout_at, Duration::from_millis(500));
        assert_eq!(seen.blackout, Duration::from_millis(30));
        assert_eq!(seen.moved_at, Some(Duration::from_millis(530)));
        assert_eq!(seen.longest_stall, Duration::from_millis(30));
        assert_eq!(seen.resolution, Duration::from_millis(1));
        assert_eq!(seen.normal_per_s, 1000);
        let brownout_ms = seen.brownout.as_millis();
        assert!((20..=50).contains(&brownout_ms), "{brownout_ms}");
    }

    #[test]
    fn what_was_lost_is_what_is_missing() {
        let seen = evaluate(Instant::now(), &moved());
        let ms = Duration::from_millis;
        let near = |lost: f64, expected: f64| (lost - expected).abs() < 1e-9;
        assert!(near(seen.lost_s(ms(100), ms(400)), 0.0));
        // From 500 to 530 ms it stood still, but for the one step that shows that it goes on.
        let lost_s = seen.lost_s(ms(400), ms(700));
        assert!(near(lost_s, 0.029), "{lost_s}");
        assert!(near(seen.steps_at(Duration::from_micros(100_500)), 100.5));
        let (_, stall) = seen.longest_stall_between(ms(100), ms(400));
        assert_eq!(stall, ms(1));
        assert_eq!(
            seen.longest_stall_between(ms(400), ms(700)),
            (ms(500), ms(30))
        );
    }

    #[test]
    fn two_probes_see_what_one_does() {
        let samples = moved();
        let source: Vec<_> = samples.iter().map(|it| (it.at, it.source)).collect();
        let target: Vec<_> = samples.iter().map(|it| (it.at, it.target)).collect();
        let one = evaluate(Instant::now(), &samples);
        let both = Seen::of_both(Instant::now(), &source, &target);
        assert_eq!(
            (both.blackout_at, both.blackout, both.moved_at),
            (one.blackout_at, one.blackout, one.moved_at)
        );
    }

    #[test]
    fn a_later_stall_is_not_the_blackout() {
        let mut samples = moved();
        for sample in &mut samples {
            if (600..700).contains(&sample.at.as_millis()) {
                sample.target = 570;
            }
        }
        let seen = evaluate(Instant::now(), &samples);
        assert_eq!(seen.blackout, Duration::from_millis(30));
        assert_eq!(seen.longest_stall, Duration::from_millis(101));
    }

    #[test]
    fn a_guest_that_stays_has_not_moved() {
        let mut samples = moved();
        for sample in &mut samples {
            sample.target = sample.target.min(sample.source);
            sample.source = 2 * u64::try_from(sample.at.as_millis()).unwrap();
        }
        let seen = evaluate(Instant::now(), &samples);
        assert_eq!(seen.moved_at, None);
        assert_eq!(seen.blackout, Duration::from_millis(1));
    }

    #[test]
    fn a_guest_that_never_comes_back_is_black_to_the_end() {
        let mut samples = moved();
        for sample in &mut samples {
            sample.target = sample.target.min(500);
        }
        let seen = evaluate(Instant::now(), &samples);
        assert_eq!(seen.moved_at, None);
        assert_eq!(seen.blackout, Duration::from_millis(499));
    }
}
