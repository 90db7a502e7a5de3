//! The work on memory: rewrite pages at a rate, verify all others in between.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::config::Pattern;
use crate::content::{Stream, Writer};
use crate::fields::Field;
use crate::status::Status;
use crate::{PAGE_WORDS, say, sys};

/// The generation that the first fill writes; the one before it is what a planted page goes back to.
const FIRST_GENERATION: u64 = 1;

/// How many bad pages are told on the console; all are counted.
const TOLD_BAD_PAGES: u64 = 16;

/// What a guest that was held up may make good for: more would be a storm of writes that no running
/// guest makes.
const MOST_CATCH_UP: Duration = Duration::from_millis(20);

/// How long a guest that does not sweep sleeps when no write is due.
const NAP: Duration = Duration::from_micros(50);

/// The part of a worker's pages that is hot, and the part of the writes that goes there.
const HOT_PAGES_PER_MILLE: u64 = 50;
const HOT_WRITES_PER_MILLE: u64 = 900;

/// Settings that may change while the workers run; shared with the console.
pub(crate) struct Dials {
    /// Pages to rewrite each second, all workers together.
    pub(crate) rate: AtomicU64,
    /// Whether pages that are not rewritten are verified.
    pub(crate) sweep: AtomicBool,
    /// Pages to make stale: taken by whichever worker comes first.
    pub(crate) plants: AtomicUsize,
}

/// Owner of a slice of the pages.
pub(crate) struct Worker {
    pages: &'static mut [u64],
    /// The index of the first page of the slice.
    first: u64,
    /// What generation each page must hold: apart from the pages, so that an old page with an intact
    /// content does not pass.
    generations: Box<[u64]>,
    writer: Writer,
    pattern: Pattern,
    random: Stream,
    /// How many workers share the rate.
    peers: u64,
    cursor: usize,
    next_sequential: usize,
    status: Status,
}

impl Worker {
    /// Allocates and fills the pages `first..first + count`.
    pub(crate) fn new(
        (first, count): (u64, usize),
        writer: Writer,
        pattern: Pattern,
        peers: u64,
        status: Status,
    ) -> io::Result<Self> {
        let mut worker = Self {
            pages: sys::allocate(count)?,
            first,
            generations: vec![FIRST_GENERATION; count].into(),
            random: Stream::new(first, 0, 0),
            writer,
            pattern,
            peers,
            cursor: 0,
            next_sequential: 0,
            status,
        };
        for at in 0..count {
            worker.write(at, FIRST_GENERATION);
            status.add(Field::Progress, 1);
        }
        Ok(worker)
    }

    /// Works for ever.
    pub(crate) fn run(mut self, dials: &Arc<Dials>) -> ! {
        let mut pace = Pace::new();
        loop {
            let rate = dials.rate.load(Ordering::Relaxed) / self.peers;
            if pace.is_due(rate) {
                self.rewrite();
            } else if dials.sweep.load(Ordering::Relaxed) {
                self.sweep();
            } else {
                std::thread::sleep(NAP);
            }
            self.status.add(Field::Progress, 1);
            if dials.plants.load(Ordering::Relaxed) > 0 {
                self.plant(dials);
            }
        }
    }

    fn rewrite(&mut self) {
        let at = self.choose();
        self.verify(at);
        self.generations[at] += 1;
        self.write(at, self.generations[at]);
        self.status.add(Field::Writes, 1);
    }

    fn choose(&mut self) -> usize {
        let count = self.generations.len() as u64;
        let random = self.random.next() >> 16;
        let at = match self.pattern {
            Pattern::Uniform => random % count,
            Pattern::Hot => {
                let hot = (count * HOT_PAGES_PER_MILLE / 1000).max(1);
                let is_hot = (self.random.next() >> 16) % 1000 < HOT_WRITES_PER_MILLE;
                if is_hot { random % hot } else { random % count }
            }
            Pattern::Sequential => {
                self.next_sequential = (self.next_sequential + 1) % self.generations.len();
                self.next_sequential as u64
            }
        };
        // Below `count`, which came from a usize.
        at as usize
    }

    fn sweep(&mut self) {
        self.verify(self.cursor);
        self.cursor += 1;
        if self.cursor == self.generations.len() {
            self.cursor = 0;
            self.status.add(Field::Sweeps, 1);
        }
    }

    fn verify(&mut self, at: usize) {
        let index = self.first + at as u64;
        let expected = self.generations[at];
        let page = &self.pages[at * PAGE_WORDS..][..PAGE_WORDS];
        self.status.add(Field::Verified, 1);
        if self.writer.holds(page, index, expected) {
            return;
        }
        let fault = self.writer.diagnose(page, index);
        self.status.set(Field::LastBadPage, index);
        if self.status.count(Field::Bad) < TOLD_BAD_PAGES {
            say!("BAD page {index}: expected generation {expected}, found {fault:?}");
        }
        // Made good, so that one lost page counts once and not again in every sweep.
        self.write(at, expected);
    }

    fn write(&mut self, at: usize, generation: u64) {
        let page = &mut self.pages[at * PAGE_WORDS..][..PAGE_WORDS];
        self.writer.fill(page, self.first + at as u64, generation);
    }

    /// Puts one page back to what it held before its last write, as a migration that forgets a dirty
    /// page would.
    fn plant(&mut self, dials: &Dials) {
        let taken = dials
            .plants
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            });
        if taken.is_err() {
            return;
        }
        let at = self.choose();
        self.verify(at);
        self.write(at, self.generations[at] - 1);
        self.status.add(Field::Planted, 1);
        say!("planted a stale page {}", self.first + at as u64);
    }
}

/// When the next write is due.
struct Pace {
    rate: u64,
    next: Instant,
}

impl Pace {
    fn new() -> Self {
        Self {
            rate: 0,
            next: Instant::now(),
        }
    }

    /// Whether a write is due now; counts it as done if so.
    fn is_due(&mut self, rate: u64) -> bool {
        if rate == 0 {
            return false;
        }
        let now = Instant::now();
        if rate != self.rate {
            (self.rate, self.next) = (rate, now);
        }
        if now < self.next {
            return false;
        }
        let oldest = now.checked_sub(MOST_CATCH_UP).unwrap_or(now);
        self.next = self.next.max(oldest) + Duration::from_nanos(1_000_000_000 / rate);
        true
    }
}
