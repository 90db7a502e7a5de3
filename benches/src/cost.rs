//! What a move costs the hosts: CPU time and memory, by the kernel's account.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_testbed::{Ended, Ferry, Qemu, TestbedError, wait_until};
use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Between two looks at the memory of an engine.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// CPU seconds of one side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// All of QEMU but its vCPU threads, and the engine.
    pub migration_s: f64,
    /// The vCPU threads: the guest itself.
    pub guest_s: f64,
}

/// The account of one QEMU at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    all: Duration,
    vcpus: Duration,
}

impl Account {
    /// Reads it.
    pub fn of(qemu: &Qemu) -> Result<Self, TestbedError> {
        let mut vcpus = Duration::ZERO;
        let cpus = qemu.execute("query-cpus-fast", &json!({}))?;
        for cpu in cpus.as_array().into_iter().flatten() {
            let thread = cpu["thread-id"].as_u64().unwrap_or_default();
            vcpus += thread_time(qemu.pid(), thread)?;
        }
        Ok(Self {
            all: process_time(qemu.pid())?,
            vcpus,
        })
    }

    /// What has been used since, and `engine` besides.
    pub fn until(&self, later: &Self, engine: Duration) -> Cpu {
        let guest = later.vcpus.saturating_sub(self.vcpus);
        let all = later.all.saturating_sub(self.all);
        Cpu {
            migration_s: (all.saturating_sub(guest) + engine).as_secs_f64(),
            guest_s: guest.as_secs_f64(),
        }
    }
}

/// CPU time of a process, of its threads that have ended too.
fn process_time(pid: u32) -> Result<Duration, TestbedError> {
    let what = || TestbedError::io("read the CPU clock of a process");
    let clock = ClockId::pid_cpu_clock_id(as_pid(pid)).map_err(|errno| what()(errno.into()))?;
    let time = clock_gettime(clock).map_err(|errno| what()(errno.into()))?;
    Ok(time.into())
}

/// CPU time of one thread.
fn thread_time(pid: u32, thread: u64) -> Result<Duration, TestbedError> {
    let path = format!("/proc/{pid}/task/{thread}/schedstat");
    let text = fs::read_to_string(&path).map_err(TestbedError::io(&*path))?;
    let ns = text
        .split_whitespace()
        .next()
        .and_then(|ns| ns.parse().ok());
    Ok(Duration::from_nanos(ns.unwrap_or_default()))
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).expect("a pid fits in an i32"))
}

/// One engine at work, watched from outside.
pub struct Engine {
    ferry: Ferry,
    watch: Watch,
}

/// What an engine used.
#[derive(Debug)]
pub struct Used {
    /// How it ended.
    pub ended: Ended,
    /// Its CPU time.
    pub cpu: Duration,
    /// The most memory that it had besides guest RAM, in KiB: `VmRSS` less `RssShmem`, sampled.
    pub peak_kib: u64,
}

impl Engine {
    /// Begins to watch.
    pub fn watch(ferry: Ferry) -> Self {
        let watch = Watch::start(ferry.pid());
        Self { ferry, watch }
    }

    /// Waits for its end.
    pub fn finish(self, bound: Duration) -> Result<Used, TestbedError> {
        let pid = self.ferry.pid();
        // Ended but not yet waited for, a process still has its CPU clock.
        wait_until("ferry ends", bound, || has_ended(pid).then_some(()))?;
        let cpu = process_time(pid)?;
        let peak_kib = self.watch.finish();
        let ended = self.ferry.wait(bound)?;
        Ok(Used {
            ended,
            cpu,
            peak_kib,
        })
    }
}

fn has_ended(pid: u32) -> bool {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    match waitid(Id::Pid(as_pid(pid)), look) {
        Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => false,
        // Whatever is wrong, waiting longer does not mend it.
        _ => true,
    }
}

/// A thread that looks at the memory of a process.
struct Watch {
    stop: Arc<AtomicBool>,
    peak_kib: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(pid: u32) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let peak_kib = Arc::<AtomicU64>::default();
        let (stopped, peak) = (Arc::clone(&stop), Arc::clone(&peak_kib));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                peak.fetch_max(own_memory_kib(pid), Ordering::Relaxed);
                thread::sleep(LOOK_INTERVAL);
            }
        });
        Self {
            stop,
            peak_kib,
            thread: Some(thread),
        }
    }

    fn finish(self) -> u64 {
        self.peak_kib.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What a process has in memory besides shared memory: guest RAM is shared. A process that has ended
/// has nothing.
fn own_memory_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        kib.unwrap_or_default()
    };
    field("VmRSS").saturating_sub(field("RssShmem"))
}
