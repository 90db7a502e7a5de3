//! Threads of a real process, slowed by the kernel and given their time back.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ferry_engine::linux::{CpuQuota, Error, Process};
use nix::unistd::Pid;

/// Longer than anything here may take.
const BOUND: Duration = Duration::from_secs(20);

/// A process that would use a whole CPU.
struct Busy {
    child: Child,
    process: Arc<Process>,
    home: PathBuf,
}

impl Busy {
    fn start() -> Self {
        let child = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn();
        let child = child.unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let process = Arc::new(Process::open(pid).unwrap());
        let home = groups_of(pid);
        Self {
            child,
            process,
            home: home.into(),
        }
    }

    fn pid(&self) -> Pid {
        self.process.pid()
    }

    fn groups(&self) -> String {
        groups_of(self.pid())
    }

    /// Groups that were made for it.
    fn left(&self) -> BTreeSet<PathBuf> {
        let name = format!("ferry-{0}-{0}", self.pid());
        let mut left = BTreeSet::new();
        let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            let below = entries.map(|entry| entry.path());
            folders.extend(below.filter(|path| path.is_dir()));
            left.extend(folder.ends_with(&name).then_some(folder));
        }
        left
    }

    /// How often it had to stand still.
    fn stalls(&self) -> Option<u64> {
        let stat = fs::read_to_string(self.left().first()?.join("cpu.stat")).ok()?;
        let stalls = stat
            .lines()
            .find_map(|line| line.strip_prefix("nr_throttled "));
        stalls?.parse().ok()
    }

    fn wait_for_stalls(&self) {
        let from = self.stalls().unwrap();
        let deadline = Instant::now() + BOUND;
        while self.stalls().unwrap() < from + 5 {
            assert!(Instant::now() < deadline, "it is never held");
            thread::yield_now();
        }
    }

    fn assert_as_before(&self) {
        assert_eq!(PathBuf::from(self.groups()), self.home);
        assert_eq!(self.left(), BTreeSet::new());
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn groups_of(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/cgroup")).unwrap()
}

/// False, aloud, where threads cannot be slowed; under CI that fails.
fn can_limit(busy: &Busy) -> bool {
    match CpuQuota::check(&busy.process, &[busy.pid()]) {
        Ok(()) => true,
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "{error}");
            eprintln!("NOT TESTED: {error}");
            false
        }
    }
}

#[test]
fn a_thread_is_slowed_and_given_its_time_back() {
    let busy = Busy::start();
    if !can_limit(&busy) {
        return;
    }
    busy.assert_as_before();
    let mut quota = CpuQuota::new(Arc::clone(&busy.process));
    for percent in [20, 90, 99, 50] {
        quota.limit(&[busy.pid()], percent).unwrap();
        busy.wait_for_stalls();
    }
    assert!(busy.groups().contains(&format!("ferry-{}", busy.pid())));
    // Where it is it stays, and runs as if it were not there.
    quota.lift().unwrap();
    assert_eq!(busy.left().len(), 1);
    quota.limit(&[busy.pid()], 99).unwrap();
    quota.clear().unwrap();
    busy.assert_as_before();
    quota.clear().unwrap();
    quota.limit(&[busy.pid()], 10).unwrap();
    drop(quota);
    busy.assert_as_before();
}

#[test]
fn what_a_killed_engine_left_is_found_and_cleared() {
    let busy = Busy::start();
    if !can_limit(&busy) {
        return;
    }
    assert!(!CpuQuota::clear_leftovers(&busy.process).unwrap());
    let mut quota = CpuQuota::new(Arc::clone(&busy.process));
    quota.limit(&[busy.pid()], 99).unwrap();
    // Nobody will ever clear it.
    std::mem::forget(quota);
    assert_eq!(busy.left().len(), 1);
    assert!(CpuQuota::clear_leftovers(&busy.process).unwrap());
    busy.assert_as_before();
    assert!(!CpuQuota::clear_leftovers(&busy.process).unwrap());
}

#[test]
fn a_process_that_ends_leaves_no_group() {
    let mut busy = Busy::start();
    if !can_limit(&busy) {
        return;
    }
    let mut quota = CpuQuota::new(Arc::clone(&busy.process));
    quota.limit(&[busy.pid()], 99).unwrap();
    busy.child.kill().unwrap();
    assert!(busy.process.wait_end(BOUND).unwrap());
    busy.child.wait().unwrap();
    quota.clear().unwrap();
    assert_eq!(busy.left(), BTreeSet::new());
    let gone = CpuQuota::check(&busy.process, &[busy.pid()]);
    assert!(matches!(gone, Ok(()) | Err(Error::Gone { .. })), "{gone:?}");
}
