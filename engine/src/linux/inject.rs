//! One system call, run by another process.
//!
//! A userfaultfd belongs to the address space that made it, so the VMM itself must make ours. It is
//! stopped with `ptrace` for a fraction of a millisecond, borrowed for one call, and put back:
//!
//! ```text
//!   seize ─ interrupt ─► at rest ─ save ─ set registers ─► entry ─► exit ─ interrupt ─► at rest
//!                                                                                         │
//!                                        runs on as if nothing had been ◄─ detach ◄─ restore
//! ```
//!
//! What makes this harmless, and must stay so:
//! - The main thread is borrowed only where it has just been in a system call: the two bytes before
//!   its instruction pointer are `syscall`, which is then what it runs for us. So it is in no
//!   restartable sequence, and no code has to be written into the process.
//! - It is left from an interrupt stop, never from a system-call stop: only then does the kernel see
//!   to it that the interrupted call (`ppoll`, a sleep, a futex) begins anew. What it must know for
//!   that is in `orig_rax`, which is saved and restored with the registers. A few calls, `epoll_wait`
//!   among them, are not begun anew by any kernel but return `EINTR`, as for any stop.
//! - Signals are blocked while the registers are ours, so that no handler runs on them, and stay
//!   pending. One that is reported to us outside of that time is handed on. `SIGSTOP` cannot be
//!   blocked: a process that it has stopped is borrowed all the same, and is stopped again afterwards.
//! - `PTRACE_O_EXITKILL` is never set: our death must not be the guest's.
//!
//! `ptrace` ties the traced thread to the tracing *thread*, so each injection is made on a thread of
//! its own, and the caller waits for it. Should all else fail, the end of that thread detaches.
//! While an injection runs, nobody else in our own process may wait for the traced one: should it be
//! a child of ours, such a wait could take the stop that we are waiting for.

use std::io;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{self, c_int, c_long, c_uint, user_regs_struct};
use nix::sys::ptrace;
use nix::unistd::{Pid, Uid};

use super::error::TraceRefusal;
use super::{Error, Process, RemoteFd};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("a system call is injected by the registers and instructions of x86-64");

/// Longest time from the first stop to the last, in milliseconds. The usual time is 0.2 ms; a main
/// thread in an uninterruptible call, on a disk that does not answer, takes any time.
const LIMIT_MS: u64 = 2_000;

/// What is granted on top of [`LIMIT_MS`] to put the process back, in milliseconds.
const RESTORE_LIMIT_MS: u64 = 1_000;

/// Looks at the process without a pause before the first pause.
const LOOKS_BEFORE_PAUSE: u32 = 64;

/// Time between two looks afterwards.
const PAUSE: Duration = Duration::from_micros(50);

/// The instruction that enters the kernel.
const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// `wait` reports it in the byte above the signal for a stop that is no signal's: after
/// `PTRACE_INTERRUPT` (with `SIGTRAP`) or within a group stop (with the signal that began it).
const PTRACE_EVENT_STOP: c_int = 128;

/// `wait` adds it to `SIGTRAP` at a system call's entry and exit, given `PTRACE_O_TRACESYSGOOD`.
const SYSCALL_STOP_FLAG: c_int = 0x80;

/// The kernel's own signal set, smaller than the C library's.
const KERNEL_SIGSET_BYTES: usize = size_of::<u64>();

/// A system call: its number on x86-64 and its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syscall {
    /// The call's name, for errors.
    pub name: &'static str,
    /// Its number.
    pub number: c_long,
    /// Its arguments; those that it does not take are ignored.
    pub args: [u64; 6],
}

/// Makes a userfaultfd inside `process`: close-on-exec, non-blocking, for faults of every mode.
pub fn userfaultfd(process: &Process) -> Result<RemoteFd, Error> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let call = Syscall {
        name: "userfaultfd",
        number: libc::SYS_userfaultfd,
        args: [flags.unsigned_abs().into(), 0, 0, 0, 0, 0],
    };
    let number = syscall(process, call)?;
    i32::try_from(number)
        .map(RemoteFd)
        .map_err(|_| Error::Astray { pid: process.pid() })
}

/// Closes a descriptor inside `process`.
pub fn close(process: &Process, fd: RemoteFd) -> Result<(), Error> {
    let number = u64::try_from(fd.0)
        .map_err(|_| Error::call("closing a descriptor of another process", Errno::EBADF))?;
    let call = Syscall {
        name: "close",
        number: libc::SYS_close,
        args: [number, 0, 0, 0, 0, 0],
    };
    syscall(process, call).map(drop)
}

/// Has the main thread of `process` run one system call and returns its result. Blocks, for
/// 2 s at most, and a little more on errors.
///
/// The call must not block and must not need memory of the process to be prepared.
/// On every error the process runs on as before.
pub fn syscall(process: &Process, call: Syscall) -> Result<u64, Error> {
    on_own_thread(|| Tracee::seize(process)?.run(call))
}

/// Fails as an injection would when `process` may not be traced. Does not stop it.
pub fn check_permitted(process: &Process) -> Result<(), Error> {
    // The end of the thread detaches without a stop.
    on_own_thread(|| seize(process))
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("inject".into());
        let handle = builder
            .spawn_scoped(scope, work)
            .map_err(|error| Error::call("starting a thread", error))?;
        handle.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Where a traced thread has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// An interrupt stop or a group stop: on its way out of the kernel, with no signal in hand.
    AtRest,
    /// The entry or the exit of a system call.
    Syscall,
    /// About to receive this signal, which is lost unless it is handed on.
    Signal(c_int),
}

impl Stop {
    fn parse(status: c_int) -> Self {
        const SYSCALL: c_int = libc::SIGTRAP | SYSCALL_STOP_FLAG;
        match (status >> 8, status) {
            (PTRACE_EVENT_STOP, _) => Self::AtRest,
            (_, SYSCALL) => Self::Syscall,
            (_, signal) => Self::Signal(signal),
        }
    }

    /// The signal that resuming from here must hand on.
    fn signal(self) -> c_int {
        match self {
            Self::Signal(signal) => signal,
            Self::AtRest | Self::Syscall => 0,
        }
    }
}

/// What is restored before the process runs on.
struct Saved {
    registers: user_regs_struct,
    blocked_signals: u64,
}

/// A traced thread. Dropping it puts the thread back as it was and detaches.
struct Tracee<'a> {
    process: &'a Process,
    deadline: Instant,
    /// Where it stands; none while it runs.
    stop: Option<Stop>,
    saved: Option<Saved>,
    attached: bool,
}

impl<'a> Tracee<'a> {
    fn seize(process: &'a Process) -> Result<Self, Error> {
        seize(process)?;
        Ok(Self {
            process,
            deadline: Instant::now() + Duration::from_millis(LIMIT_MS),
            stop: None,
            saved: None,
            attached: true,
        })
    }

    fn run(mut self, call: Syscall) -> Result<u64, Error> {
        self.rest_after_a_syscall()?;
        self.save()?;
        self.enter(call)?;
        self.run_to_syscall_stop()?;
        self.run_to_syscall_stop()?;
        let registers = self.registers()?;
        self.release()?;
        if registers.orig_rax != call.number.unsigned_abs() {
            return Err(Error::Astray { pid: self.pid() });
        }
        match remote_error(registers.rax) {
            None => Ok(registers.rax),
            Some(source) => Err(Error::Remote {
                pid: self.pid(),
                call: call.name,
                source,
            }),
        }
    }

    fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Brings the thread to rest right behind a `syscall` instruction.
    fn rest_after_a_syscall(&mut self) -> Result<(), Error> {
        loop {
            self.rest()?;
            if self.is_after_syscall_instruction()? {
                return Ok(());
            }
            // It was computing. Let it run into its next system call; the interrupt that follows
            // comes when that call has ended, or ends it.
            self.run_to_syscall_stop()?;
        }
    }

    /// Brings the thread to rest, wherever it is.
    fn rest(&mut self) -> Result<(), Error> {
        while self.stop != Some(Stop::AtRest) {
            // Any stop takes back an interrupt that is still pending: so one for each turn, and
            // before the thread is resumed, so that no instruction of its own is run in between.
            self.interrupt()?;
            if self.stop.is_some() {
                self.resume(libc::PTRACE_CONT)?;
            }
            self.wait()?;
        }
        Ok(())
    }

    /// Lets the thread run to the next entry or exit of a system call.
    fn run_to_syscall_stop(&mut self) -> Result<(), Error> {
        loop {
            self.resume(libc::PTRACE_SYSCALL)?;
            self.wait()?;
            if self.stop == Some(Stop::Syscall) {
                return Ok(());
            }
        }
    }

    fn save(&mut self) -> Result<(), Error> {
        let registers = self.registers()?;
        let blocked_signals = signal_mask(self.pid())
            .map_err(|error| self.failure("reading the signal mask", error))?;
        self.saved = Some(Saved {
            registers,
            blocked_signals,
        });
        Ok(())
    }

    /// Sets the registers so that the next instruction is `call`.
    fn enter(&mut self, call: Syscall) -> Result<(), Error> {
        set_signal_mask(self.pid(), u64::MAX)
            .map_err(|error| self.failure("blocking signals", error))?;
        let mut registers = self.registers()?;
        registers.rax = call.number.unsigned_abs();
        [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ] = call.args;
        registers.rip -= SYSCALL_INSTRUCTION.len() as u64;
        // Not in a system call: the interrupted one is not begun anew now.
        registers.orig_rax = u64::MAX;
        ptrace::setregs(self.pid(), registers)
            .map_err(|error| self.failure("setting registers", error))
    }

    /// Puts the thread back as it was and lets it go.
    fn release(&mut self) -> Result<(), Error> {
        self.deadline += Duration::from_millis(RESTORE_LIMIT_MS);
        self.rest()?;
        if let Some(saved) = self.saved.take() {
            ptrace::setregs(self.pid(), saved.registers)
                .map_err(|error| self.failure("restoring registers", error))?;
            set_signal_mask(self.pid(), saved.blocked_signals)
                .map_err(|error| self.failure("restoring the signal mask", error))?;
        }
        self.attached = false;
        ptrace_resume(libc::PTRACE_DETACH, self.pid(), 0)
            .map_err(|error| self.failure("detaching", error))
    }

    fn is_after_syscall_instruction(&self) -> Result<bool, Error> {
        let registers = self.registers()?;
        let memory = self.process.open_proc("mem", OFlag::O_RDONLY)?;
        let mut before = [0; SYSCALL_INSTRUCTION.len()];
        let at = registers.rip.wrapping_sub(before.len() as u64);
        // An address that cannot be read holds no instruction.
        let read = memory.read_exact_at(&mut before, at);
        Ok(read.is_ok() && before == SYSCALL_INSTRUCTION)
    }

    fn registers(&self) -> Result<user_regs_struct, Error> {
        ptrace::getregs(self.pid()).map_err(|error| self.failure("reading registers", error))
    }

    fn interrupt(&self) -> Result<(), Error> {
        ptrace::interrupt(self.pid()).map_err(|error| self.failure("interrupting", error))
    }

    fn resume(&mut self, request: c_uint) -> Result<(), Error> {
        let signal = self.stop.take().map_or(0, Stop::signal);
        ptrace_resume(request, self.pid(), signal)
            .map_err(|error| self.failure("resuming a process", error))
    }

    /// The one place that waits.
    fn wait(&mut self) -> Result<(), Error> {
        let mut looks = 0;
        loop {
            if let Some(status) = stop_status(self.pid()).map_err(|error| self.lost(error))? {
                self.stop = Some(Stop::parse(status));
                return Ok(());
            }
            self.process.check_alive()?;
            if Instant::now() > self.deadline {
                return Err(Error::NotStopping {
                    pid: self.pid(),
                    limit_ms: LIMIT_MS,
                });
            }
            looks += 1;
            if looks < LOOKS_BEFORE_PAUSE {
                thread::yield_now();
            } else {
                thread::sleep(PAUSE);
            }
        }
    }

    /// A tracee for which `ptrace` knows no thread was killed, though its end may not show yet.
    fn lost(&self, error: Errno) -> Error {
        match error {
            Errno::ESRCH | Errno::ECHILD => Error::Gone { pid: self.pid() },
            other => Error::call("waiting for a process to stop", other),
        }
    }

    fn failure(&self, what: &'static str, error: Errno) -> Error {
        match error {
            Errno::ESRCH => Error::Gone { pid: self.pid() },
            other => self.process.failure(what, other),
        }
    }
}

impl Drop for Tracee<'_> {
    fn drop(&mut self) {
        if self.attached
            && let Err(error) = self.release()
        {
            tracing::warn!(pid = %self.pid(), %error, "a traced process could not be put back");
        }
    }
}

fn seize(process: &Process) -> Result<(), Error> {
    // An id that is used again would stop a stranger: this one is ours, the pidfd says.
    process.check_alive()?;
    match ptrace::seize(process.pid(), ptrace::Options::PTRACE_O_TRACESYSGOOD) {
        Ok(()) => Ok(()),
        Err(Errno::ESRCH) => Err(Error::Gone { pid: process.pid() }),
        Err(Errno::EPERM) => Err(why_refused(process)),
        Err(error) => Err(process.failure("tracing a process", error)),
    }
}

/// The kernel says EPERM for everything; `/proc` tells the reasons apart.
fn why_refused(process: &Process) -> Error {
    let pid = process.pid();
    let status = match process.read_proc("status") {
        Ok(status) => String::from_utf8_lossy(&status).into_owned(),
        Err(error) => return error,
    };
    let field = |name: &str, column: usize| -> Option<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().nth(column)?.parse().ok()
    };
    // A process that is ending has given up its memory, and is refused before its pidfd tells.
    if field("VmSize:", 0).is_none() {
        return Error::Gone { pid };
    }
    if let Some(tracer) = field("TracerPid:", 0).filter(|tracer| *tracer != 0) {
        let tracer = Pid::from_raw(tracer.cast_signed());
        return Error::TracedByOther { pid, tracer };
    }
    let ours = Uid::effective();
    let theirs = field("Uid:", 1).map(Uid::from_raw);
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let scope: Option<u32> = yama.ok().and_then(|text| text.trim().parse().ok());
    let why = match (theirs, scope) {
        (Some(theirs), _) if theirs != ours => TraceRefusal::OtherUser { ours, theirs },
        (_, Some(scope)) if scope != 0 => TraceRefusal::Yama { scope },
        _ => TraceRefusal::Policy,
    };
    Error::TraceRefused { pid, why }
}

/// The kernel returns errors as small negative numbers.
fn remote_error(rax: u64) -> Option<io::Error> {
    const MOST_ERRNO: i32 = 4095;
    let errno = i32::try_from(rax.wrapping_neg()).ok()?;
    (1..=MOST_ERRNO)
        .contains(&errno)
        .then(|| io::Error::from_raw_os_error(errno))
}

/// How the thread has stopped, if it has since the last look.
///
/// Only stops are asked for: the end of a process that happens to be our child stays to be reaped by
/// whoever started it.
fn stop_status(pid: Pid) -> Result<Option<c_int>, Errno> {
    let flags = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
    let id = pid.as_raw().unsigned_abs();
    // SAFETY: a siginfo_t is plain numbers, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is ours alone, and the kernel writes nothing else.
    let result = unsafe { libc::waitid(libc::P_PID, id, &raw mut info, flags) };
    Errno::result(result)?;
    // SAFETY: waitid has filled these fields, or left them zero when there is nothing to tell.
    let stopped = unsafe { info.si_pid() };
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    Ok((stopped != 0).then_some(status))
}

/// `PTRACE_CONT`, `PTRACE_SYSCALL` or `PTRACE_DETACH`. Not by nix, which knows no real-time signals.
fn ptrace_resume(request: c_uint, pid: Pid, signal: c_int) -> Result<(), Errno> {
    let no_address = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: these requests take a number in `data` and touch no memory of ours.
    let result = unsafe { libc::ptrace(request, pid.as_raw(), no_address, c_long::from(signal)) };
    Errno::result(result).map(drop)
}

fn signal_mask(pid: Pid) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes `KERNEL_SIGSET_BYTES` bytes to `mask`, which is that large.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_GETSIGMASK,
            pid.as_raw(),
            KERNEL_SIGSET_BYTES,
            &raw mut mask,
        )
    };
    Errno::result(result).map(|_| mask)
}

fn set_signal_mask(pid: Pid, mask: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads `KERNEL_SIGSET_BYTES` bytes of `mask`, which is that large.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_SETSIGMASK,
            pid.as_raw(),
            KERNEL_SIGSET_BYTES,
            &raw const mask,
        )
    };
    Errno::result(result).map(drop)
}
