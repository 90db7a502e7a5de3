//! System calls injected into real processes, and what these notice of it: nothing.

mod linux_child;

use std::io::ErrorKind;
use std::thread;
use std::time::{Duration, Instant};

use ferry_engine::linux::error::TraceRefusal;
use ferry_engine::linux::inject::{self, Syscall};
use ferry_engine::linux::preflight::{self, Finding};
use ferry_engine::linux::{Error, Process};
use linux_child::guest::become_nobody;
use linux_child::patience::KINDS;
use linux_child::{Ram, Tracked};
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};

const GETPID: Syscall = Syscall {
    name: "getpid",
    number: libc::SYS_getpid,
    args: [0; 6],
};

/// Longest wait for a state that must come.
const PATIENCE: Duration = Duration::from_secs(30);

fn child() -> Tracked {
    Tracked::start(Ram::memfd(1 << 20).path())
}

fn own_pid(child: &Tracked) -> u64 {
    child.pid().as_raw().cast_unsigned().into()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come to hold");
        thread::yield_now();
    }
}

fn inject_many(child: &Tracked, count: u32) {
    for round in 0..count {
        assert_eq!(
            inject::syscall(&child.process, GETPID).unwrap(),
            own_pid(child)
        );
        if round % 10 == 0 {
            let fd = inject::userfaultfd(&child.process).unwrap();
            assert_eq!(
                child.process.fd_link(fd).unwrap(),
                "anon_inode:[userfaultfd]"
            );
            inject::close(&child.process, fd).unwrap();
        }
    }
}

/// The child waits in each kind of call, a thousand times stopped and put back: no call ends early,
/// no register is changed.
#[test]
fn a_waiting_process_notices_nothing() {
    for (number, kind) in KINDS.iter().enumerate() {
        let mut child = child();
        let descriptors = child.descriptors();
        assert_eq!(child.ask(format!("wait {number}")), "waiting");
        inject_many(&child, 1_000);
        assert_eq!(child.descriptors(), descriptors);
        // The answer to `wait` comes before the one to the order that ends it; `read` has given it
        // already.
        child.order("signals");
        let outcome = child.answer();
        assert!(
            outcome.ends_with(" 0"),
            "{kind}: {outcome} of its calls were interrupted"
        );
        assert_eq!(child.answer(), "0 0", "{kind}");
    }
}

/// The same with alarms every millisecond and real-time signals in between, of which none is lost,
/// and with other threads at work.
#[test]
fn no_signal_is_lost() {
    const SIGNALS: u64 = 1_000;
    for (number, kind) in KINDS.iter().enumerate() {
        let mut child = child();
        assert_eq!(child.ask("run 1"), "running");
        assert_eq!(child.ask(format!("storm {SIGNALS}")), "storming");
        assert_eq!(child.ask(format!("wait {number}")), "waiting");
        inject_many(&child, 200);
        child.order("halt");
        assert!(
            child.answer().split_once(' ').is_some(),
            "the answer to `wait`"
        );
        assert!(
            child.answer().parse::<u64>().unwrap() > 0,
            "the writers were at work"
        );
        until("every signal's arrival", || {
            let counts = child.ask("signals");
            let (queued, alarms) = counts.split_once(' ').unwrap();
            let queued: u64 = queued.parse().unwrap();
            assert!(queued <= SIGNALS, "{kind}: a signal was doubled");
            queued == SIGNALS && alarms.parse::<u64>().unwrap() > 0
        });
    }
}

#[test]
fn a_stopped_process_stays_stopped() {
    let mut child = child();
    kill(child.pid(), Signal::SIGSTOP).unwrap();
    until("the stop", || child.state() == 'T');
    inject_many(&child, 20);
    until("the stop again", || child.state() == 'T');
    child.order("signals");
    thread::yield_now();
    assert_eq!(child.state(), 'T');
    kill(child.pid(), Signal::SIGCONT).unwrap();
    assert_eq!(child.answer(), "0 0");
}

/// Stops and continuations come at any moment of an injection.
#[test]
fn stops_and_continuations_in_between_do_no_harm() {
    let mut child = child();
    let pid = child.pid();
    thread::scope(|scope| {
        let signals = scope.spawn(move || {
            for _ in 0..300 {
                kill(pid, Signal::SIGSTOP).unwrap();
                thread::yield_now();
                kill(pid, Signal::SIGCONT).unwrap();
                thread::sleep(Duration::from_micros(300));
            }
        });
        while !signals.is_finished() {
            inject_many(&child, 11);
        }
    });
    assert_eq!(child.ask("signals"), "0 0");
}

#[test]
fn the_end_of_the_process_is_told_as_gone() {
    for round in 0..20 {
        let mut child = child();
        let process = std::sync::Arc::clone(&child.process);
        let injections = thread::spawn(move || {
            loop {
                if let Err(error) = inject::syscall(&process, GETPID) {
                    return error;
                }
            }
        });
        thread::sleep(Duration::from_micros(137 * round));
        child.kill();
        let error = injections.join().unwrap();
        assert!(matches!(error, Error::Gone { .. }), "{error:?}");
    }
}

#[test]
fn another_tracer_is_named() {
    let mut child = child();
    let refused = thread::scope(|scope| {
        let tracer = scope.spawn(|| {
            // Ends with this thread.
            ptrace::seize(child.pid(), ptrace::Options::empty()).unwrap();
            inject::syscall(&child.process, GETPID)
        });
        tracer.join().unwrap()
    });
    assert!(
        matches!(refused, Err(Error::TracedByOther { .. })),
        "{refused:?}"
    );
    inject_many(&child, 1);
    assert_eq!(child.ask("signals"), "0 0");
}

#[test]
fn another_users_process_is_refused_with_a_reason() {
    let child = child();
    let refused = thread::scope(|scope| {
        let other_user = scope.spawn(|| {
            become_nobody();
            let findings = preflight::check(&child.process).unwrap();
            (inject::syscall(&child.process, GETPID), findings)
        });
        other_user.join().unwrap()
    });
    let why = match refused.0 {
        Err(Error::TraceRefused { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(matches!(why, TraceRefusal::OtherUser { .. }), "{why}");
    let findings = refused.1;
    let named = |finding: &Finding| matches!(finding, Finding::NotTraceable(_));
    assert!(findings.iter().any(named), "{findings:?}");
}

#[test]
fn a_process_that_may_not_make_a_userfaultfd_is_found() {
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    assert_eq!(
        setting.trim(),
        "0",
        "this test needs vm.unprivileged_userfaultfd=0"
    );
    let mut child = child();
    assert!(preflight::check(&child.process).unwrap().is_empty());
    let before = child.descriptors();
    assert_eq!(child.ask("nobody"), "nobody");
    let findings = preflight::check(&child.process).unwrap();
    assert!(
        matches!(&findings[..], [Finding::NoUserfaultfd { .. }]),
        "{findings:?}"
    );
    match inject::userfaultfd(&child.process) {
        Err(Error::Remote { source, .. }) => assert_eq!(source.kind(), ErrorKind::PermissionDenied),
        other => panic!("{other:?}"),
    }
    assert_eq!(child.descriptors(), before);
}

#[test]
fn takes_descriptors_and_tells_processes_apart() {
    let (mut first, second) = (child(), child());
    let fd = inject::userfaultfd(&first.process).unwrap();
    let ours = first.process.take_fd(fd).unwrap();
    inject::close(&first.process, fd).unwrap();
    assert!(first.process.take_fd(fd).is_err());
    drop(ours);
    assert!(!first.process.same_as(second.process.id()));
    let id = first.process.id();
    assert!(Process::reopen(id).is_ok());
    first.kill();
    assert!(!first.process.is_alive());
    assert!(matches!(Process::reopen(id), Err(Error::Gone { .. })));
}
