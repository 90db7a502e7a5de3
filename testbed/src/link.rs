//! A network of two hosts on one machine: two namespaces and a wire of known speed between them.
//!
//! The rate is the kernel's own token bucket's, and the wire can be cut. QEMU's sockets are files and
//! work from either side. A loop of its own is the same without a wire: loopback, with nobody else's
//! traffic on it.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};

use crate::TestbedError;

/// What the token bucket lets through at once: enough that the kernel's timers do not limit the rate.
const BURST: &str = "256kb";

/// How long a packet may wait for a token; what would wait longer is dropped, and TCP slows down.
const QUEUE: &str = "20ms";

/// Counters of `/proc/net/dev` between the bytes received and the bytes sent.
const SENT_AFTER: usize = 7;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Target,
}

impl End {
    /// The other one: the guest may go back.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// What is between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire {
    /// Nothing: both are one namespace.
    Loop,
    Rate {
        mbit_per_s: u32,
    },
}

/// Two namespaces with a wire, or one with its loopback; gone when dropped. Needs root, `ip` and `tc`.
#[derive(Debug)]
pub struct Link {
    name: String,
    wire: Wire,
}

impl Link {
    /// Lays a wire that carries `rate_mbit_per_s` in each direction.
    pub fn lay(rate_mbit_per_s: u32) -> Result<Self, TestbedError> {
        let link = Self::named(Wire::Rate {
            mbit_per_s: rate_mbit_per_s,
        });
        for end in [End::Source, End::Target] {
            run("ip", &format!("netns add {}", link.namespace(end)))?;
        }
        let [a, b] = [End::Source, End::Target].map(|end| link.namespace(end));
        run(
            "ip",
            &format!("link add {a} netns {a} type veth peer name {b} netns {b}"),
        )?;
        for end in [End::Source, End::Target] {
            let (name, address) = (link.namespace(end), link.address(end));
            run(
                "ip",
                &format!("-n {name} address add {address}/30 dev {name}"),
            )?;
            run("ip", &format!("-n {name} link set lo up"))?;
            run("ip", &format!("-n {name} link set {name} up"))?;
        }
        link.mend()?;
        Ok(link)
    }

    /// One host alone, talking to itself.
    pub fn loop_back() -> Result<Self, TestbedError> {
        let link = Self::named(Wire::Loop);
        let name = link.namespace(End::Source);
        run("ip", &format!("netns add {name}"))?;
        run("ip", &format!("-n {name} link set lo up"))?;
        Ok(link)
    }

    /// Dropped, and so removed, when one of the steps after it fails.
    fn named(wire: Wire) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Interface names have at most 15 characters: p4194304-999-s fits.
        let name = format!("p{}-{number}", std::process::id());
        Self { name, wire }
    }

    /// The address of a host, seen from both.
    pub fn address(&self, end: End) -> IpAddr {
        if self.wire == Wire::Loop {
            return Ipv4Addr::LOCALHOST.into();
        }
        // Every link has namespaces of its own, so that all may use the same network.
        let host = match end {
            End::Source => 1,
            End::Target => 2,
        };
        Ipv4Addr::new(10, 99, 0, host).into()
    }

    /// A command that will run on a host. The process is the program's own.
    pub fn command(&self, end: End, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(end)]);
        command.arg(program);
        command
    }

    /// Runs `work` on a host, in a thread of its own; sockets made there belong to it for ever.
    ///
    /// # Panics
    ///
    /// When `work` does.
    pub fn on<T: Send>(
        &self,
        end: End,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, TestbedError> {
        let path = format!("/run/netns/{}", self.namespace(end));
        let error = || TestbedError::io(format!("enter {path}"));
        let namespace = File::open(&path).map_err(error())?;
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| error()(errno.into()))
                    .map(|()| work())
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Bytes that the wire has carried so far, both directions together, by the counters of its
    /// interface. Packets that the kernel carries as one count one header.
    pub fn carried_bytes(&self) -> Result<u64, TestbedError> {
        let interface = self.interface(End::Source);
        let counted = self.on(End::Source, || interface_bytes(&interface))?;
        let (received, sent) = counted?;
        Ok(match self.wire {
            // What loopback sends it receives.
            Wire::Loop => sent,
            Wire::Rate { .. } => received + sent,
        })
    }

    /// Cuts the wire: nothing arrives any more, and nobody is told.
    pub fn cut(&self) -> Result<(), TestbedError> {
        self.queue("blackhole")
    }

    /// Mends a cut wire.
    pub fn mend(&self) -> Result<(), TestbedError> {
        match self.wire {
            Wire::Loop => self.queue("noqueue"),
            Wire::Rate { mbit_per_s } => self.queue(&format!(
                "tbf rate {mbit_per_s}mbit burst {BURST} latency {QUEUE}"
            )),
        }
    }

    /// Puts a queueing discipline before both ends of the wire.
    fn queue(&self, discipline: &str) -> Result<(), TestbedError> {
        for end in [End::Source, End::Target] {
            let (name, interface) = (self.namespace(end), self.interface(end));
            let arguments = format!("-n {name} qdisc replace dev {interface} root {discipline}");
            run("tc", &arguments)?;
        }
        Ok(())
    }

    fn namespace(&self, end: End) -> String {
        let side = match (self.wire, end) {
            (Wire::Loop, _) => "l",
            (Wire::Rate { .. }, End::Source) => "s",
            (Wire::Rate { .. }, End::Target) => "t",
        };
        format!("{}-{side}", self.name)
    }

    fn interface(&self, end: End) -> String {
        match self.wire {
            Wire::Loop => "lo".into(),
            Wire::Rate { .. } => self.namespace(end),
        }
    }
}

/// Bytes that an interface of this thread's host has received and sent so far.
pub fn interface_bytes(interface: &str) -> Result<(u64, u64), TestbedError> {
    let path = "/proc/thread-self/net/dev";
    let table = std::fs::read_to_string(path).map_err(TestbedError::io(path))?;
    let fields = |line: &str| -> Option<(u64, u64)> {
        let (name, counters) = line.split_once(':')?;
        let mut counters = (name.trim() == interface).then(|| counters.split_whitespace())?;
        let received = counters.next()?.parse().ok()?;
        // Bytes sent come after the eight counters of what was received.
        let sent = counters.nth(SENT_AFTER)?.parse().ok()?;
        Some((received, sent))
    };
    let found = table.lines().find_map(fields);
    found.ok_or_else(|| TestbedError::Program {
        program: path.into(),
        log: format!("no {interface} in {table}"),
    })
}

impl Drop for Link {
    fn drop(&mut self) {
        for end in [End::Source, End::Target] {
            // The interfaces go with their namespaces. One that was never made is no matter.
            let _ = run("ip", &format!("netns delete {}", self.namespace(end)));
        }
    }
}

fn run(program: &str, arguments: &str) -> Result<(), TestbedError> {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .map_err(TestbedError::io(format!("start {program} (of iproute2)")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(TestbedError::Program {
        program: format!("{program} {arguments}"),
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
