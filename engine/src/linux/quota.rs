//! Less time for some threads of another process, by quotas of the kernel's `cpu` controller.
//!
//! Each thread is moved into a group of its own, `ferry-PID-TID`, below the one in which it is, and that
//! group is given a quota: so much of each short period, after which the thread stands still until the
//! next one. Whatever limits hold for the groups above go on to hold.
//!
//! The controller is in one of two hierarchies, and which it is differs from host to host:
//!
//! | | quota | threads |
//! |---|---|---|
//! | version 1 | `cpu.cfs_period_us`, `cpu.cfs_quota_us` | `tasks` |
//! | version 2 | `cpu.max` | `cgroup.threads`, in a group whose `cgroup.type` is `threaded` |
//!
//! To move a thread takes the kernel some 10 ms, to change a quota nothing. So a thread that shall have
//! its time back has its quota lifted, and is moved back when nobody is in a hurry any more.
//!
//! Groups outlive the engine. One that was killed leaves threads slow, and where they are tells so: the
//! next engine [looks](CpuQuota::clear_leftovers) for them. It leaves one thing: a group of version 2 that
//! did not hand the controller on before goes on to.

mod groups;

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Pid;

use self::groups::{Home, Mounts, Place};
use super::{Error, Process};

/// The shortest period. A thread that lacks a fifth of its time stands still for 2 ms at a time.
const SHORTEST_PERIOD_US: u64 = 10_000;

/// The longest period, for a thread that has hardly any time: the kernel knows no quota below
/// [`LEAST_QUOTA_US`].
const LONGEST_PERIOD_US: u64 = 100_000;

/// The least quota that the kernel takes.
const LEAST_QUOTA_US: u64 = 1000;

/// All the time of one CPU, in the millionth parts in which shares are counted.
const WHOLE_CPU: u64 = 1_000_000;

/// A thread that ends may still be in its group for a moment.
const REMOVAL_ATTEMPTS: u32 = 50;

const REMOVAL_PAUSE: Duration = Duration::from_millis(1);

/// Threads of a process with less time than they would have. Dropped, it gives all of it back.
#[derive(Debug)]
pub struct CpuQuota {
    process: Arc<Process>,
    slowed: Vec<Slowed>,
    /// Homes whose groups below could have no quotas before.
    opened: BTreeSet<PathBuf>,
}

/// A thread in a group of its own.
#[derive(Clone, Debug)]
struct Slowed {
    thread: Pid,
    home: Home,
    group: PathBuf,
}

/// So much of every period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quota {
    run_us: u64,
    period_us: u64,
}

impl Quota {
    /// Of a thread that has `share` millionth parts of a CPU, all but `percent`.
    fn leaving(share: u64, percent: u8) -> Self {
        let left = share * u64::from(100 - percent.min(100)) / 100;
        let period_us = (LEAST_QUOTA_US * WHOLE_CPU)
            .checked_div(left)
            .unwrap_or(LONGEST_PERIOD_US)
            .clamp(SHORTEST_PERIOD_US, LONGEST_PERIOD_US);
        Self {
            run_us: (period_us * left / WHOLE_CPU).max(LEAST_QUOTA_US),
            period_us,
        }
    }
}

impl CpuQuota {
    /// Threads of `process`, none of which is slow yet. Changes nothing.
    pub fn new(process: Arc<Process>) -> Self {
        Self {
            process,
            slowed: Vec::new(),
            opened: BTreeSet::new(),
        }
    }

    /// Whether the time of these threads can be limited, by all that can be told beforehand. Changes
    /// nothing.
    ///
    /// # Errors
    /// [`Error::NoQuota`] with what is missing.
    pub fn check(process: &Process, threads: &[Pid]) -> Result<(), Error> {
        let mounts = Mounts::read(process)?;
        for thread in threads {
            if let Some(place) = mounts.place(process, *thread)? {
                place.home.check(process.pid())?;
            }
        }
        Ok(())
    }

    /// Leaves `threads` all but `percent` of the time that each has, alike. Threads that are not named any
    /// more stay as they were.
    ///
    /// # Errors
    /// [`Error::NoQuota`], or [`Error::Call`]. Some of the threads may be slow then.
    pub fn limit(&mut self, threads: &[Pid], percent: u8) -> Result<(), Error> {
        let mounts = Mounts::read(&self.process)?;
        for thread in threads {
            if self.slowed.iter().all(|slowed| slowed.thread != *thread) {
                self.take_in(&mounts, *thread)?;
            }
        }
        let cpus: Vec<Cpus> = self
            .slowed
            .iter()
            .map(|slowed| self.cpus(slowed.thread))
            .collect();
        for (slowed, own) in self.slowed.iter().zip(&cpus) {
            let alike = cpus.iter().filter(|cpus| *cpus == own).count();
            let share = self.share(slowed).min(own.share(alike));
            set(slowed, Quota::leaving(share, percent))?;
        }
        Ok(())
    }

    /// Gives the threads all of their time back, at once. They stay where they are.
    pub fn lift(&self) -> Result<(), Error> {
        first_failure(self.slowed.iter().map(lift))
    }

    /// Gives the threads all of their time back and moves them to where they were. May be done again
    /// after an error.
    pub fn clear(&mut self) -> Result<(), Error> {
        // Whoever is moved away is not limited any more, whatever became of this.
        drop(self.lift());
        let mut left = Vec::new();
        let mut outcome = Ok(());
        for slowed in std::mem::take(&mut self.slowed) {
            if let Err(error) = self.release(&slowed) {
                outcome = outcome.and(Err(error));
                left.push(slowed);
            }
        }
        self.slowed = left;
        if self.slowed.is_empty() {
            for home in std::mem::take(&mut self.opened) {
                outcome = outcome.and(groups::close(&home));
            }
        }
        outcome
    }

    /// Clears what an engine has left behind that was killed. False when there was nothing.
    ///
    /// # Errors
    /// When there is something that cannot be cleared: the process goes on being slow.
    pub fn clear_leftovers(process: &Arc<Process>) -> Result<bool, Error> {
        let mounts = match Mounts::read(process) {
            // Nobody can have made groups here.
            Err(Error::NoQuota { .. }) => return Ok(false),
            mounts => mounts?,
        };
        let mut quota = Self::new(Arc::clone(process));
        let mut homes = BTreeSet::new();
        for thread in process.threads()? {
            let Ok(Some(place)) = mounts.place(process, thread) else {
                continue;
            };
            homes.insert(place.home.dir.clone());
            quota.slowed.extend(place.own.map(|group| Slowed {
                thread,
                home: place.home,
                group,
            }));
        }
        let found = !quota.slowed.is_empty();
        quota.clear()?;
        // Of threads that have ended since.
        let prefix = format!("ferry-{}-", process.pid());
        for group in homes.iter().flat_map(|home| below(home, &prefix)) {
            remove(&group)?;
        }
        Ok(found)
    }

    /// Moves a thread into a group of its own, with all of its time.
    fn take_in(&mut self, mounts: &Mounts, thread: Pid) -> Result<(), Error> {
        // A vCPU that was unplugged meanwhile needs no time.
        let Some(Place { home, own }) = mounts.place(&self.process, thread)? else {
            return Ok(());
        };
        let pid = self.process.pid();
        let group = own.unwrap_or_else(|| home.dir.join(format!("ferry-{pid}-{thread}")));
        if home.make(&group, pid)? {
            self.opened.insert(home.dir.clone());
        }
        let slowed = Slowed {
            thread,
            home,
            group,
        };
        if let Err(error) = slowed.home.move_in(&slowed.group, thread) {
            // Nobody is in it, and nobody could be moved out of it either.
            _ = fs::remove_dir(&slowed.group);
            return Err(error);
        }
        self.slowed.push(slowed);
        Ok(())
    }

    /// What the groups above leave a thread, with all others of ours in them at work, in millionth parts
    /// of a CPU.
    fn share(&self, slowed: &Slowed) -> u64 {
        let sharing = self.slowed.iter();
        let sharing = sharing.filter(|other| other.home == slowed.home).count();
        slowed.home.limit().unwrap_or(u64::MAX) / (sharing as u64).max(1)
    }

    fn cpus(&self, thread: Pid) -> Cpus {
        let status = self.process.read_proc(&format!("task/{thread}/status"));
        Cpus::parse(&String::from_utf8_lossy(&status.unwrap_or_default()))
    }

    fn release(&self, slowed: &Slowed) -> Result<(), Error> {
        if self.process.is_alive() {
            slowed.home.move_in(&slowed.home.dir, slowed.thread)?;
        }
        remove(&slowed.group)
    }
}

impl Drop for CpuQuota {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            tracing::warn!(%error, "threads of {} may be left slow", self.process.pid());
        }
    }
}

fn set(slowed: &Slowed, quota: Quota) -> Result<(), Error> {
    let Quota { run_us, period_us } = quota;
    match slowed.home.version {
        groups::Version::One => {
            // Both are looked at whenever one is written: without a quota every period is allowed.
            lift(slowed)?;
            groups::write(&slowed.group, "cpu.cfs_period_us", &period_us.to_string())?;
            groups::write(&slowed.group, "cpu.cfs_quota_us", &run_us.to_string())
        }
        groups::Version::Two => {
            let both = format!("{run_us} {period_us}");
            groups::write(&slowed.group, "cpu.max", &both)
        }
    }
}

fn lift(slowed: &Slowed) -> Result<(), Error> {
    let outcome = match slowed.home.version {
        groups::Version::One => groups::write(&slowed.group, "cpu.cfs_quota_us", "-1"),
        groups::Version::Two => groups::write(&slowed.group, "cpu.max", "max"),
    };
    match outcome {
        // Somebody has removed it: nobody is in there.
        Err(_) if !slowed.group.exists() => Ok(()),
        outcome => outcome,
    }
}

/// Removes a group in which nobody is, or will be in a moment.
fn remove(group: &Path) -> Result<(), Error> {
    for attempt in 1.. {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy && attempt < REMOVAL_ATTEMPTS => {
                std::thread::sleep(REMOVAL_PAUSE);
            }
            outcome => {
                return outcome.map_err(|error| Error::call("removal of a control group", error));
            }
        }
    }
    Ok(())
}

/// Groups right below `home` whose names begin so.
fn below(home: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(home).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

fn first_failure(all: impl Iterator<Item = Result<(), Error>>) -> Result<(), Error> {
    // Every one is tried.
    all.fold(Ok(()), Result::and)
}

/// CPUs on which a thread may run, as `/proc/PID/task/TID/status` has them; none when it does not tell.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cpus(String);

impl Cpus {
    fn parse(status: &str) -> Self {
        let mut lines = status.lines();
        let mask = lines.find_map(|line| line.strip_prefix("Cpus_allowed:"));
        Self(mask.unwrap_or_default().trim().to_owned())
    }

    /// What each of `threads` has that may run on these and no others, in millionth parts of a CPU.
    fn share(&self, threads: usize) -> u64 {
        let digits = self.0.chars().filter_map(|digit| digit.to_digit(16));
        let count: u64 = digits.map(|digit| u64::from(digit.count_ones())).sum();
        match count {
            0 => WHOLE_CPU,
            count => (count * WHOLE_CPU / (threads as u64).max(1)).min(WHOLE_CPU),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_short_as_long_as_the_kernel_takes_the_quota() {
        let quota = |run_us, period_us| Quota { run_us, period_us };
        let leaving = |percent| Quota::leaving(WHOLE_CPU, percent);
        assert_eq!(leaving(20), quota(8000, 10_000));
        assert_eq!(leaving(90), quota(1000, 10_000));
        assert_eq!(leaving(95), quota(1000, 20_000));
        assert_eq!(leaving(99), quota(1000, 100_000));
        assert_eq!(leaving(100), quota(1000, 100_000));
        // A fifth of a CPU to begin with.
        assert_eq!(Quota::leaving(WHOLE_CPU / 5, 50), quota(1000, 10_000));
        for percent in 0..=99 {
            let Quota { run_us, period_us } = leaving(percent);
            let left = run_us * 100 / period_us;
            assert!(left.abs_diff(u64::from(100 - percent)) <= 1, "{percent}");
        }
    }

    #[test]
    fn threads_share_the_cpus_that_they_may_run_on() {
        let status = "Name:\tqemu\nCpus_allowed:\tff,0000000f\nCpus_allowed_list:\t0-3,32-39\n";
        let cpus = Cpus::parse(status);
        assert_eq!(
            [1, 12, 24].map(|threads| cpus.share(threads)),
            [WHOLE_CPU, WHOLE_CPU, WHOLE_CPU / 2]
        );
        assert_eq!(Cpus::parse("Name:\tqemu\n").share(7), WHOLE_CPU);
    }
}
