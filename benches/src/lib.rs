//! Ferry against QEMU's own migration, side by side in one run.
//!
//! A guest goes from QEMU to QEMU, each time by another way in turn, so that whatever the machine does
//! meanwhile it does to all of them. What either side claims about itself is not used.
//!
//! # What is inside the clock
//!
//! The clock starts when the client is started: the process `ferry migrate`, or the command `migrate`
//! over QMP. It stops at the guest's first progress at the target, by the guest's own counter, which
//! the probe reads from outside 4,000 times a second.
//!
//! | | before the clock | inside |
//! |---|---|---|
//! | both | the target's QEMU is started with `-incoming defer` | everything else |
//! | target RAM preallocated | QEMU's `prealloc=on` populates it, for all ways | |
//! | not preallocated | that it is untouched is verified | its population |
//! | Ferry | `ferry receive` is started and listens | the client's start, its checks, its journal |
//! | QEMU | capabilities and parameters are set, `migrate-incoming` listens | |
//!
//! The source's QEMU is left (`--keep-source`), as QEMU's own migration leaves it: a process that ends
//! would take CPU time away from the guest that has just arrived.
//!
//! # Where the figures come from
//!
//! - *Blackout*: from the last progress at the source to the first at the target. *Stall*: the longest
//!   time without progress while the guest was watched. *Brown-out*: time with less than half of the
//!   normal progress. *Lost*: seconds of normal running that are missing from the client's start to a
//!   second after the arrival; the second before the start is normal.
//! - *Wire*: the interface's counters in a network namespace where nobody else is, both directions
//!   together. Segments that the kernel carries as one packet count one header.
//! - *CPU*: the CPU clocks of QEMU and of the engine at each side, to a second after the arrival; the
//!   guest's own vCPU threads are told apart.
//! - *Engine memory*: the most that `ferry` had besides guest RAM: `VmRSS` less `RssShmem`, sampled
//!   every 2 ms. Its program text counts.
//!
//! `ferry` is the command with its defaults: where source and target share a network namespace, which
//! they do on loopback, the target takes pages from the source's RAM and only the frames that tell of
//! them are on the wire. `ferry:N` is told `--within-host never`: its pages travel over N connections,
//! as from host to host. So every report has both. Over the link between two namespaces, and to another
//! host, pages travel either way.
//!
//! Each of QEMU's ways runs with private memory and with shared files, and the better counts. The
//! guests are apart: Ferry's, QEMU's with private memory, QEMU's with shared files. While one moves the
//! others are stopped.
//!
//! The *empty switchover* is QEMU's own migration between two QEMUs on the very same RAM files with
//! `x-ignore-shared`: stop, save the device state, load it, run. Nothing is copied and no engine is
//! involved; what remains is what QEMU needs itself.
//!
//! # Two hosts, and a guest of one's own
//!
//! With `--target-host` the guest boots here and moves to a host that is reached over ssh, where a
//! second process of this program (`--serve`) starts the target and watches the arrival by its own
//! clock. How far the two clocks are apart is measured over the ssh connection around each move, and the
//! error of that stands beside the figures ([`hosts`]).
//!
//! A guest of the user's own (`--image`, `--qemu-args`) does not count for us: its blackout is the time
//! from QEMU's event `STOP` to `RESUME`, and there is no progress, no verification.
#![forbid(unsafe_code)]

pub mod agent;
pub mod baseline;
pub mod case;
pub mod clean_round;
pub mod cost;
pub mod course;
pub mod csv;
pub mod figures;
pub mod guest;
pub mod hold;
pub mod host;
pub mod hosts;
pub mod html;
pub mod matrix;
pub mod peer;
pub mod table;
pub mod watch;
pub mod way;
