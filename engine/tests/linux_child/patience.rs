//! Waiting in one system call after the other, with a close look at what each of them returns.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, ptr, thread};

use nix::libc::{self, c_int};

/// Bounded waits take this long.
const WAIT: Duration = Duration::from_millis(5);

static QUEUED_SIGNALS: AtomicU64 = AtomicU64::new(0);
static ALARMS: AtomicU64 = AtomicU64::new(0);

/// Kinds of waiting, by the number that stands for them in an order.
pub(crate) const KINDS: [&str; 5] = ["ppoll", "read", "nanosleep", "futex", "busy"];

/// How often a call ended as it should, and how often because of a signal.
#[derive(Default)]
struct Outcome {
    calls: u64,
    interrupted: u64,
}

impl Outcome {
    fn count(&mut self, result: Result<(), c_int>) {
        match result {
            Ok(()) => self.calls += 1,
            Err(libc::EINTR) => self.interrupted += 1,
            Err(other) => panic!("{}", io::Error::from_raw_os_error(other)),
        }
    }
}

/// Waits in one way until there is input.
pub(crate) fn wait(kind: u64) -> String {
    let kind = KINDS[usize::try_from(kind).unwrap()];
    super::guest::say("waiting");
    let mut outcome = Outcome::default();
    loop {
        let result = match kind {
            "ppoll" => poll_input(None),
            // The loop that reads the orders does that.
            "read" => break,
            "nanosleep" => takes_its_time(sleep),
            "futex" => takes_its_time(wait_on_futex),
            "busy" => {
                compute();
                Ok(())
            }
            other => panic!("no such kind: {other}"),
        };
        outcome.count(result);
        if poll_input(Some(Duration::ZERO)).is_ok() {
            break;
        }
    }
    format!("{} {}", outcome.calls, outcome.interrupted)
}

fn last_error() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap()
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: duration.as_secs().cast_signed(),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Waits for input without a time-out, or looks for it.
fn poll_input(time_out: Option<Duration>) -> Result<(), c_int> {
    let mut input = libc::pollfd {
        fd: 0,
        events: libc::POLLIN,
        revents: 0,
    };
    let time_out = time_out.map(timespec);
    let time_out = time_out.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: a signal set is plain numbers, for which zero is a value.
    let mut open: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `open` is ours.
    unsafe { libc::sigemptyset(&raw mut open) };
    // SAFETY: one pollfd, and a time and a set that live longer than the call.
    match unsafe { libc::ppoll(&raw mut input, 1, time_out, &raw const open) } {
        1 if input.revents & libc::POLLIN != 0 => Ok(()),
        0 => Err(libc::EINTR),
        -1 => Err(last_error()),
        other => panic!("ppoll returned {other} with {:#x}", input.revents),
    }
}

fn takes_its_time(call: fn() -> Result<(), c_int>) -> Result<(), c_int> {
    let start = Instant::now();
    call()?;
    assert!(
        start.elapsed() >= WAIT,
        "a wait ended after {:?}",
        start.elapsed()
    );
    Ok(())
}

fn sleep() -> Result<(), c_int> {
    let time = timespec(WAIT);
    let clock = libc::CLOCK_MONOTONIC;
    // SAFETY: the time lives longer than the call, and no rest is asked for.
    match unsafe { libc::clock_nanosleep(clock, 0, &raw const time, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(error),
    }
}

fn wait_on_futex() -> Result<(), c_int> {
    let word = 0_u32;
    let time = timespec(WAIT);
    let (futex, operation) = (libc::SYS_futex, libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG);
    // SAFETY: word and time live longer than the call.
    let result = unsafe { libc::syscall(futex, &raw const word, operation, 0, &raw const time) };
    assert_eq!(result, -1, "nobody wakes this futex");
    match last_error() {
        libc::ETIMEDOUT => Ok(()),
        error => Err(error),
    }
}

/// What [`compute`] found the first time.
static DIGEST: AtomicU64 = AtomicU64::new(0);

/// Fills the registers with numbers whose end is known.
fn compute() {
    let (mut a, mut b, mut c) = (1_u64, 2_u64, 3_u64);
    for step in 0..10_000_u64 {
        a = a.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(step);
        b = b.rotate_left(7) ^ a;
        c = c.wrapping_add(b ^ step);
    }
    let digest = a ^ b.rotate_left(21) ^ c.rotate_left(42);
    let first = DIGEST.compare_exchange(0, digest, Ordering::Relaxed, Ordering::Relaxed);
    assert!(
        first.is_ok() || first == Err(digest),
        "a register was changed"
    );
}

extern "C" fn count_queued(_: c_int) {
    QUEUED_SIGNALS.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn count_alarm(_: c_int) {
    ALARMS.fetch_add(1, Ordering::Relaxed);
}

fn queued_signal() -> c_int {
    libc::SIGRTMIN() + 1
}

pub(crate) fn count_signals() {
    for (signal, handler) in [
        (queued_signal(), count_queued as extern "C" fn(c_int)),
        (libc::SIGALRM, count_alarm),
    ] {
        // SAFETY: an action is plain numbers, for which zero is a value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handlers do nothing but add to an atomic.
        let result = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
        assert_eq!(result, 0);
    }
}

pub(crate) fn storm(count: u64) -> &'static str {
    let tick = libc::timeval {
        tv_sec: 0,
        tv_usec: 1_000,
    };
    let timer = libc::itimerval {
        it_interval: tick,
        it_value: tick,
    };
    // SAFETY: the timer lives longer than the call, and no old one is asked for.
    let result = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) };
    assert_eq!(result, 0);
    thread::spawn(move || {
        for _ in 0..count {
            signal_main_thread();
            thread::sleep(Duration::from_micros(100));
        }
    });
    "storming"
}

fn signal_main_thread() {
    // SAFETY: takes nothing.
    let pid = unsafe { libc::getpid() };
    // SAFETY: takes three integers.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, queued_signal()) };
    assert_eq!(result, 0);
}

/// How many queued signals and how many alarms have come.
pub(crate) fn signals() -> String {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    format!("{} {}", count(&QUEUED_SIGNALS), count(&ALARMS))
}
