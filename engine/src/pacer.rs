//! `--bandwidth`: no more than so many bytes a second, over all lanes together. What is sent while the
//! guest is handed over does not pay: it would pay with the guest standing.
//!
//! A bucket that never holds more than a short burst. A sender waits until what went before has been
//! paid for, and then pays for the most that it may send; when it knows what it does send, it settles
//! for that. So pages are read when they may leave, and not before. Whose turn it is the bytes say that
//! each has sent, so that lanes share the rate evenly, whatever the sizes of their frames. A change of
//! the rate wakes everybody.

mod turns;

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use self::turns::Account;
use self::turns::{Turn, Turns};

/// What may be saved up while nobody sends.
const BURST: Duration = Duration::from_millis(10);

/// How long somebody sleeps who is woken in any case.
const LONG: Duration = Duration::from_secs(3600);

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
    turns: Turns,
    lifted: bool,
}

/// What a sender has paid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paid {
    bytes: u64,
    rate: Bandwidth,
    /// How long it waited for its turn.
    pub(crate) waited: Duration,
}

impl Paid {
    /// There was nothing to pay.
    const NOTHING: Self = Self {
        bytes: 0,
        rate: Bandwidth::Unlimited,
        waited: Duration::ZERO,
    };
}

impl Pacer {
    pub(crate) fn new(rate: Bandwidth) -> Self {
        let state = Bucket {
            rate,
            paid_until: Instant::now(),
            turns: Turns::default(),
            lifted: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Changes the rate. A debt at the old one, which may be for hours, is forgotten.
    pub(crate) fn set(&self, rate: Bandwidth) {
        let mut bucket = self.lock();
        bucket.rate = rate;
        bucket.paid_until = bucket.paid_until.min(Instant::now());
        self.changed.notify_all();
    }

    /// The rate.
    pub(crate) fn rate(&self) -> Bandwidth {
        self.lock().rate
    }

    /// What holds now, in bytes a second; none when nothing does.
    pub(crate) fn limit(&self) -> Option<u64> {
        let bucket = self.lock();
        match bucket.rate {
            Bandwidth::BytesPerSecond(rate) if !bucket.lifted => Some(rate.get()),
            _ => None,
        }
    }

    /// Lets everybody go at once, until the rate is to be kept again.
    pub(crate) fn lift(&self) {
        self.lock().lifted = true;
        self.changed.notify_all();
    }

    /// The rate holds again, from now on.
    pub(crate) fn keep(&self) {
        let mut bucket = self.lock();
        bucket.lifted = false;
        bucket.paid_until = bucket.paid_until.min(Instant::now());
    }

    /// Lets whoever has been cut notice it.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Waits until `bytes` bytes of this account may be sent, or the sender is `cut`, and pays for them.
    pub(crate) fn pay(&self, account: &mut Account, bytes: u64, cut: &AtomicBool) -> Paid {
        let mut bucket = self.lock();
        // What is sent without a limit is nobody's advantage under the next one.
        if bucket.is_open() {
            return Paid::NOTHING;
        }
        let began = Instant::now();
        let turn = bucket.turns.ask(account, bytes);
        let mut waited = Duration::ZERO;
        while let Some(wait) = bucket.wait(turn)
            && !cut.load(Ordering::Acquire)
        {
            let woken = self.changed.wait_timeout(bucket, wait);
            (bucket, _) = woken.unwrap_or_else(PoisonError::into_inner);
            waited = began.elapsed();
        }
        // One that was cut sends nothing any more.
        let bytes = if cut.load(Ordering::Acquire) {
            0
        } else {
            bytes
        };
        bucket.pay(bytes);
        bucket.turns.leave(turn);
        self.changed.notify_all();
        let rate = bucket.rate;
        Paid {
            bytes,
            rate,
            waited,
        }
    }

    /// Makes good the difference between what was paid for and the `sent` bytes that were sent.
    pub(crate) fn settle(&self, account: &mut Account, paid: Paid, sent: u64) {
        let mut bucket = self.lock();
        // A debt at another rate is forgotten, and so is a credit.
        if paid.bytes == 0 || bucket.rate != paid.rate {
            return;
        }
        account.correct(paid.bytes, sent);
        let until = bucket.paid_until + bucket.rate.time_for(sent);
        let back = bucket.rate.time_for(paid.bytes);
        bucket.paid_until = until.checked_sub(back).unwrap_or(until);
        self.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Bucket> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bucket {
    fn is_open(&self) -> bool {
        self.lifted || self.rate == Bandwidth::Unlimited
    }

    /// How long a sender still waits at least.
    fn wait(&self, turn: Turn) -> Option<Duration> {
        if self.is_open() {
            return None;
        }
        if !self.turns.is_next(turn) {
            // It is woken.
            return Some(LONG);
        }
        self.paid_until
            .checked_duration_since(Instant::now())
            .filter(|wait| !wait.is_zero())
    }

    fn pay(&mut self, bytes: u64) {
        let now = Instant::now();
        let saved = now.checked_sub(BURST).unwrap_or(now);
        self.paid_until = self.paid_until.max(saved) + self.rate.time_for(bytes);
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
                    let mut account = Account::default();
                    (0..8).for_each(|_| {
                        pacer.pay(&mut account, 64 << 10, &UNCUT);
                    });
                });
            }
        });
        // 2 MiB at 10 MiB/s are 200 ms, less the burst and the last chunk, which nobody waits for.
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(180), "{took:?}");
    }

    /// Senders of very different appetite, in real time: each sends what the others send.
    #[test]
    fn the_rate_is_shared_evenly() {
        let sizes: [u64; 6] = [4 << 10, 9 << 10, 32 << 10, 64 << 10, 100_000, 128 << 10];
        let largest = sizes[sizes.len() - 1];
        let pacer = Pacer::new(rate(32 << 20));
        let over = AtomicBool::new(false);
        let all = std::sync::atomic::AtomicU64::new(0);
        let sent: Vec<u64> = std::thread::scope(|scope| {
            let senders = sizes.map(|size| {
                let (pacer, over, all) = (&pacer, &over, &all);
                scope.spawn(move || {
                    let (mut account, mut sent) = (Account::default(), 0);
                    while !over.load(Ordering::Acquire) {
                        pacer.pay(&mut account, size, &UNCUT);
                        sent += size;
                        if all.fetch_add(size, Ordering::AcqRel) > 12 << 20 {
                            over.store(true, Ordering::Release);
                        }
                    }
                    sent
                })
            });
            senders.map(|sender| sender.join().unwrap()).to_vec()
        });
        // A sixth of 12 MiB each. A thread that is not scheduled in time misses a turn or two.
        let share = (12 << 20) / sizes.len() as u64;
        for (sent, size) in sent.iter().zip(sizes) {
            let missed = share.abs_diff(*sent);
            assert!(missed <= share / 4 + largest, "{sent} in pieces of {size}");
        }
    }

    #[test]
    fn a_higher_rate_wakes_who_sleeps_at_a_low_one() {
        let pacer = Arc::new(Pacer::new(rate(1)));
        pacer.pay(&mut Account::default(), 1 << 20, &UNCUT);
        let (slept, done) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn({
            let pacer = Arc::clone(&pacer);
            move || {
                pacer.pay(&mut Account::default(), 1, &UNCUT);
                slept.send(()).unwrap();
            }
        });
        pacer.set(rate(1 << 30));
        done.recv_timeout(Duration::from_secs(10)).unwrap();
        sleeper.join().unwrap();
    }

    #[test]
    fn unlimited_never_waits_and_lifting_wakes() {
        Pacer::new(Bandwidth::Unlimited).pay(&mut Account::default(), u64::MAX, &UNCUT);
        let pacer = Arc::new(Pacer::new(rate(1)));
        pacer.pay(&mut Account::default(), 1 << 20, &UNCUT);
        let sleeper = std::thread::spawn({
            let pacer = Arc::clone(&pacer);
            move || pacer.pay(&mut Account::default(), 1, &UNCUT)
        });
        pacer.lift();
        sleeper.join().unwrap();
        assert_eq!(pacer.limit(), None);
        pacer.keep();
        assert_eq!(pacer.limit(), Some(1));
        // What was owed is not, but the rate holds.
        pacer.pay(&mut Account::default(), 1 << 20, &UNCUT);
        assert!(!pacer.lock().is_open());
        assert!(pacer.lock().paid_until > Instant::now() + Duration::from_secs(3600));
    }

    /// Chunks are paid for in full before anybody knows how many of their bytes travel.
    #[test]
    fn only_what_is_sent_is_paid_for() {
        let pacer = Pacer::new(rate(1 << 20));
        let mut account = Account::default();
        let began = Instant::now();
        for _ in 0..100 {
            let paid = pacer.pay(&mut account, 1 << 20, &UNCUT);
            pacer.settle(&mut account, paid, 1 << 10);
        }
        // 100 KiB at 1 MiB/s, less the burst and the last piece, which nobody waits for. In full it
        // would be 99 s.
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(80), "{took:?}");
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert_eq!(account.sent(), 100 << 10);
    }

    #[test]
    fn a_sender_that_is_cut_sleeps_no_longer() {
        let pacer = Arc::new(Pacer::new(rate(1)));
        pacer.pay(&mut Account::default(), 1 << 20, &UNCUT);
        let cut = Arc::new(AtomicBool::new(false));
        let sleeper = std::thread::spawn({
            let (pacer, cut) = (Arc::clone(&pacer), Arc::clone(&cut));
            move || pacer.pay(&mut Account::default(), 1, &cut)
        });
        cut.store(true, Ordering::Release);
        pacer.wake();
        sleeper.join().unwrap();
    }
}
