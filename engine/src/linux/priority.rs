//! Threads that run only when nobody else wants to.

use std::io;

use nix::errno::Errno;
use nix::libc;

/// Puts the calling thread behind every other of this machine: it runs on processors that would be
/// idle. Needs no right, and is for good: coming back would need one.
pub fn give_way() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: `parameters` lives as long as the call, which reads it and nothing else of ours; thread 0
    // is the caller.
    let outcome = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
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
}
