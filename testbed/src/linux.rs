//! What the Linux guest is asked to do; the guest itself is in `testbed/guest`.

use std::path::PathBuf;

use crate::TestbedError;
use crate::dir::{existing, testbed_dir};

/// Speed and silence: the guest's own console is for what the tests look for.
const KERNEL: &str = "console=ttyS0 quiet mitigations=off nowatchdog tsc=reliable no_timer_check \
                      transparent_hugepage=never rcupdate.rcu_cpu_stall_suppress=1";

/// In which order the guest rewrites pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All pages alike.
    Uniform,
    /// 90 % of the writes go to 5 % of the pages.
    Hot,
    /// One after the other.
    Sequential,
}

/// What the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Does not compress.
    Random,
    /// Compresses about as text does.
    Text,
    /// Does not compress, and changes by a few words of a page from one write to the next.
    Counters,
}

/// Whether the guest verifies pages all the time, besides those that it rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sweep {
    /// Yes: it never sleeps.
    On,
    /// No: it sleeps for tens of microseconds when no write is due.
    Off,
}

/// The Linux guest's orders.
#[derive(Clone, Debug)]
pub struct Linux {
    mib: u64,
    rate: u64,
    pattern: Pattern,
    content: Content,
    sweep: Sweep,
    workers: u32,
    verifies_disk: bool,
}

impl Linux {
    /// Fills `mib` MiB with random bytes and sweeps over them, writing nothing. The machine needs
    /// about 100 MiB more than that.
    pub fn filling_mib(mib: u64) -> Self {
        Self {
            mib,
            rate: 0,
            pattern: Pattern::Uniform,
            content: Content::Random,
            sweep: Sweep::On,
            workers: 1,
            verifies_disk: false,
        }
    }

    /// Rewrites this many pages a second.
    #[must_use]
    pub fn writing_pages_per_s(mut self, rate: u64) -> Self {
        self.rate = rate;
        self
    }

    /// Rewrites in this order.
    #[must_use]
    pub fn pattern(mut self, pattern: Pattern) -> Self {
        self.pattern = pattern;
        self
    }

    /// Writes this.
    #[must_use]
    pub fn content(mut self, content: Content) -> Self {
        self.content = content;
        self
    }

    /// Verifies the rest, or does not.
    #[must_use]
    pub fn sweep(mut self, sweep: Sweep) -> Self {
        self.sweep = sweep;
        self
    }

    /// Works with this many threads, each on its own share of the pages.
    #[must_use]
    pub fn workers(mut self, count: u32) -> Self {
        self.workers = count;
        self
    }

    /// Writes, flushes and reads back blocks of the first disk.
    #[must_use]
    pub fn verifying_disk(mut self) -> Self {
        self.verifies_disk = true;
        self
    }

    pub(crate) fn kernel() -> Result<PathBuf, TestbedError> {
        existing(testbed_dir()?.join("guest/vmlinuz"))
    }

    pub(crate) fn command_line(&self) -> String {
        let pattern = match self.pattern {
            Pattern::Uniform => "uniform",
            Pattern::Hot => "hot",
            Pattern::Sequential => "seq",
        };
        let content = match self.content {
            Content::Random => "random",
            Content::Text => "text",
            Content::Counters => "counters",
        };
        format!(
            "{KERNEL} ferry.mib={} ferry.rate={} ferry.pattern={pattern} ferry.content={content} \
             ferry.sweep={} ferry.workers={} ferry.disk={}",
            self.mib,
            self.rate,
            u8::from(self.sweep == Sweep::On),
            self.workers,
            u8::from(self.verifies_disk),
        )
    }
}
