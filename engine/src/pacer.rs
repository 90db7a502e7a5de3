//! `--bandwidth`: no more than so many bytes a second, over all lanes together. What is sent while the
//! guest is handed over does not pay: it would pay with the guest standing.
//!
//! A bucket that never holds more than a short burst. A sender pays before it sends and sleeps off
//! its debt, so lanes share the rate by what they send, and a change of the rate, or the end, wakes
//! every sleeper.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What may be saved up while nobody sends.
const BURST: Duration = Duration::from_millis(10);

/// 1 MiB in bytes.
const MIB: NonZeroU64 = NonZeroU64::new(1 << 20).expect("a MiB is not zero");

/// A shared limit of bytes a second.
#[derive(Debug)]
pub(crate) struct Pacer {
    state: Mutex<Bucket>,
    changed: Condvar,
}

/// How fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bandwidth {
    /// As fast as it goes.
    Unlimited,
    /// At most so many bytes a second.
    BytesPerSecond(NonZeroU64),
}

#[derive(Debug)]
struct Bucket {
    rate: Bandwidth,
    /// When everything paid for so far has been sent at the rate.
    paid_until: Instant,
    /// How often the rate was changed.
    changes: u64,
    closed: bool,
}

impl Pacer {
    pub(crate) fn new(rate: Bandwidth) -> Self {
        let state = Bucket {
            rate,
            paid_until: Instant::now(),
            changes: 0,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Changes the rate. Whoever sleeps off a debt at the old one, which may be for hours, goes now.
    pub(crate) fn set(&self, rate: Bandwidth) {
        let mut bucket = self.lock();
        bucket.rate = rate;
        bucket.changes += 1;
        bucket.paid_until = bucket.paid_until.min(Instant::now());
        self.changed.notify_all();
    }

    /// The rate.
    pub(crate) fn rate(&self) -> Bandwidth {
        self.lock().rate
    }

    /// The rate, in bytes a second; none when there is no limit.
    pub(crate) fn limit(&self) -> Option<u64> {
        match self.rate() {
            Bandwidth::Unlimited => None,
            Bandwidth::BytesPerSecond(rate) => Some(rate.get()),
        }
    }

    /// Lets everybody go at once, now and later.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Lets whoever has been cut notice it.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Pays for `bytes` bytes and waits until they may be sent, or the sender is `cut`. Returns how
    /// long that was.
    pub(crate) fn pay(&self, bytes: u64, cut: &AtomicBool) -> Duration {
        let mut bucket = self.lock();
        let now = Instant::now();
        let due = bucket.paid_until.max(now.checked_sub(BURST).unwrap_or(now));
        bucket.paid_until = due + bucket.rate.time_for(bytes);
        let changes = bucket.changes;
        let mut began = None;
        while let Some(wait) = bucket.wait(due, changes)
            && !cut.load(Ordering::Acquire)
        {
            began.get_or_insert(now);
            let (guard, _) = self
                .changed
                .wait_timeout(bucket, wait)
                .unwrap_or_else(PoisonError::into_inner);
            bucket = guard;
        }
        began.map_or(Duration::ZERO, |began| began.elapsed())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Bucket> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bucket {
    /// How long a sender still waits whose turn is at `due` by the rate after `changes` changes.
    fn wait(&self, due: Instant, changes: u64) -> Option<Duration> {
        if self.closed || self.rate == Bandwidth::Unlimited || self.changes != changes {
            return None;
        }
        due.checked_duration_since(Instant::now())
            .filter(|wait| !wait.is_zero())
    }
}

impl Bandwidth {
    /// At most `mib` MiB a second.
    pub fn mib_per_second(mib: NonZeroU64) -> Self {
        Self::BytesPerSecond(mib.saturating_mul(MIB))
    }

    fn time_for(self, bytes: u64) -> Duration {
        match self {
            Self::Unlimited => Duration::ZERO,
            Self::BytesPerSecond(rate) => {
                let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    static UNCUT: AtomicBool = AtomicBool::new(false);

    fn rate(bytes: u64) -> Bandwidth {
        Bandwidth::BytesPerSecond(NonZeroU64::new(bytes).unwrap())
    }

    #[test]
    fn keeps_the_rate_over_all_senders() {
        let pacer = Arc::new(Pacer::new(rate(10 << 20)));
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    (0..8).for_each(|_| {
                        pacer.pay(64 << 10, &UNCUT);
                    });
                });
            }
        });
        // 2 MiB at 10 MiB/s are 200 ms, less the burst and the last chunk, which nobody waits for.
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(180), "{took:?}");
    }

    #[test]
    fn a_higher_rate_wakes_who_sleeps_at_a_low_one() {
        let pacer = Arc::new(Pacer::new(rate(1)));
        pacer.pay(1 << 20, &UNCUT);
        let (slept, done) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn({
            let pacer = Arc::clone(&pacer);
            move || {
                pacer.pay(1, &UNCUT);
                slept.send(()).unwrap();
            }
        });
        pacer.set(rate(1 << 30));
        done.recv_timeout(Duration::from_secs(10)).unwrap();
        sleeper.join().unwrap();
    }

    #[test]
    fn unlimited_never_waits_and_closing_wakes() {
        Pacer::new(Bandwidth::Unlimited).pay(u64::MAX, &UNCUT);
        let pacer = Arc::new(Pacer::new(rate(1)));
        pacer.pay(1 << 20, &UNCUT);
        let sleeper = std::thread::spawn({
            let pacer = Arc::clone(&pacer);
            move || pacer.pay(1, &UNCUT)
        });
        pacer.close();
        sleeper.join().unwrap();
    }

    #[test]
    fn a_sender_that_is_cut_sleeps_no_longer() {
        let pacer = Arc::new(Pacer::new(rate(1)));
        pacer.pay(1 << 20, &UNCUT);
        let cut = Arc::new(AtomicBool::new(false));
        let sleeper = std::thread::spawn({
            let (pacer, cut) = (Arc::clone(&pacer), Arc::clone(&cut));
            move || pacer.pay(1, &cut)
        });
        cut.store(true, Ordering::Release);
        pacer.wake();
        sleeper.join().unwrap();
    }
}
