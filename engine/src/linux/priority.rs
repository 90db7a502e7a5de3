//! Threads that run only when nobody else wants to, until somebody waits for them.

use std::io;

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;

/// Puts the calling thread behind every other of this machine: it runs on processors that would be
/// idle. Needs no right.
pub fn give_way() -> io::Result<()> {
    schedule(Pid::from_raw(0), libc::SCHED_IDLE)
}

/// Makes a thread that gave way one like any other. Needs `CAP_SYS_NICE`, or an `RLIMIT_NICE` that allows
/// its nice value.
pub fn come_back(thread: Pid) -> io::Result<()> {
    schedule(thread, libc::SCHED_OTHER)
}

/// Puts the calling thread before others: somebody waits for what it does, each time, and it does little.
/// Without `CAP_SYS_NICE` it stays where it is.
pub fn hurry() {
    // SAFETY: takes numbers and touches no memory of ours.
    let outcome = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, HURRIED) };
    if outcome != 0 {
        tracing::debug!("this thread cannot go before others");
    }
}

/// The nice value of those who hurry.
const HURRIED: i32 = -15;

fn schedule(thread: Pid, policy: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: `parameters` lives as long as the call, which reads it and nothing else of ours.
    let outcome =
        unsafe { libc::sched_setscheduler(thread.as_raw(), policy, &raw const parameters) };
    Errno::result(outcome).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_caller_gives_way() {
        // The forty-first field is the scheduling policy.
        let policy = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields = stat.rsplit_once(')').unwrap().1;
            let policy = fields.split_whitespace().nth(38).unwrap();
            policy.parse::<i32>().unwrap()
        };
        let before = policy();
        std::thread::scope(|scope| {
            let idle = scope.spawn(|| {
                give_way().unwrap();
                policy()
            });
            assert_eq!(idle.join().unwrap(), libc::SCHED_IDLE);
        });
        assert_eq!(policy(), before);
    }

    #[test]
    fn who_hurries_goes_before_others_or_stays() {
        let nice = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields = stat.rsplit_once(')').unwrap().1;
            fields
                .split_whitespace()
                .nth(16)
                .unwrap()
                .parse::<i32>()
                .unwrap()
        };
        let before = nice();
        let after = std::thread::spawn(move || {
            hurry();
            nice()
        });
        let after = after.join().unwrap();
        assert!(after == HURRIED || after == before, "{after}");
        assert_eq!(nice(), before, "only the caller");
    }

    #[test]
    fn who_is_waited_for_comes_back() {
        let (gave_way, told) = std::sync::mpsc::channel();
        let (go_on, waits) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let idle = scope.spawn(move || {
                give_way().unwrap();
                gave_way.send(nix::unistd::gettid()).unwrap();
                waits.recv().unwrap();
                // SAFETY: asks for the caller's policy; no memory is touched.
                unsafe { libc::sched_getscheduler(0) }
            });
            let outcome = come_back(told.recv().unwrap());
            go_on.send(()).unwrap();
            let policy = idle.join().unwrap();
            match outcome {
                Ok(()) => assert_eq!(policy, libc::SCHED_OTHER),
                // Not everybody may.
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                    assert_eq!(policy, libc::SCHED_IDLE);
                }
            }
        });
    }
}
