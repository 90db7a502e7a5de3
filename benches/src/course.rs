//! One guest, carried from QEMU to QEMU.

use std::time::{Duration, Instant};

use ferry_testbed::{
    Backing, Device, Disk, DiskFormat, End, Field, Link, Linux, Machine, Populate, Probe, Qemu,
    QemuVersion, Seen, StatusPage, Sweep, TestbedError, wait_until,
};
use serde_json::json;

use crate::case::{Conditions, Equipment, Wire};
use crate::cost::Account;
use crate::figures::{Curve, EngineFigures, Move};
use crate::peer::{Memory, Peer};
use crate::way::{Gone, Road};

const BOUND: Duration = Duration::from_secs(300);

/// How long the guest is watched before the move: what it does then is normal.
const LEAD: Duration = Duration::from_secs(1);

/// How long it is watched after its first progress at the target: what it loses there counts.
const AFTERMATH: Duration = Duration::from_secs(1);

/// Size of the disk in MiB.
const DISK_MIB: u64 = 64;

/// What target RAM that is not preallocated may have in it before the clock starts: firmware and
/// whatever QEMU looks at.
const UNTOUCHED_BYTES: u64 = 16 << 20;

/// A guest under way. Between two moves it rests.
pub struct Course {
    machine: Machine,
    conditions: Conditions,
    link: Link,
    /// At which end of the link the guest is: it goes there and back.
    end: End,
    here: Qemu,
    page: StatusPage,
    /// Shared by source and target, and gone with the course.
    _disk: Option<Disk>,
}

impl Course {
    /// Boots the guest and lets it rest.
    pub fn begin(conditions: Conditions, memory: Memory) -> Result<Self, TestbedError> {
        let sweep = if conditions.is_idle() {
            Sweep::Off
        } else {
            Sweep::On
        };
        let linux = Linux::filling_mib(conditions.data_mib)
            .content(conditions.bytes.into())
            .pattern(conditions.order.into())
            .writing_pages_per_s(conditions.writes_per_s)
            .sweep(sweep)
            .workers(conditions.cpus);
        let backing = match memory {
            Memory::SharedFile => Backing::Shm,
            Memory::Private => Backing::Private,
        };
        let machine = Machine::new(QemuVersion::V10_0, conditions.guest_mib)
            .cpus(conditions.cpus)
            .backing(backing);
        let disk = match conditions.equipment {
            Equipment::Bare => None,
            Equipment::Full => Some(Disk::create(DiskFormat::Qcow2, DISK_MIB)?),
        };
        let machine = match &disk {
            None => machine.linux(linux),
            Some(disk) => equip(machine.linux(linux.verifying_disk()), disk),
        };
        let link = match conditions.wire {
            Wire::Loopback => Link::loop_back()?,
            Wire::Link { mbit_per_s } => Link::lay(mbit_per_s)?,
        };
        let here = link.on(End::Source, || machine.start())??;
        let page = here.wait_for_guest(BOUND)?;
        let course = Self {
            machine,
            conditions,
            link,
            end: End::Source,
            here,
            page,
            _disk: disk,
        };
        course.rest()?;
        Ok(course)
    }

    /// Where the guest is now.
    pub fn here(&self) -> &Qemu {
        &self.here
    }

    /// Carries the guest on to a fresh QEMU, and tells what that was like.
    pub fn carry(&mut self, peer: Peer) -> Result<Move, TestbedError> {
        let target = self.target(peer)?;
        let arrived = target.counterpart(&self.page);
        let mut figures = self.measure(peer, &target, &arrived)?;
        // The old QEMU ends here; the next move begins at the new one.
        self.here = target;
        self.end = self.end.other();
        self.page = arrived;
        self.verify()?;
        self.rest()?;
        figures.bad = self.page.read()?.faults();
        Ok(figures)
    }

    fn measure(
        &self,
        peer: Peer,
        target: &Qemu,
        arrived: &StatusPage,
    ) -> Result<Move, TestbedError> {
        let road = Road {
            source: &self.here,
            target,
            link: &self.link,
            end: self.end,
            limit: Duration::from_millis(self.conditions.downtime_limit_ms),
        };
        let waiting = road.wait(peer)?;
        if !self.conditions.preallocated && peer != Peer::Switchover {
            is_untouched(arrived)?;
        }
        self.wake()?;
        // On one memory the two counters are one.
        let there = (peer != Peer::Switchover).then(|| arrived.clone());
        let probe = Probe::start(self.page.clone(), there);
        std::thread::sleep(LEAD);
        let accounts = Accounts::of(&road)?;
        let bytes = self.link.carried_bytes()?;
        let gone = road.go(peer, waiting)?;
        progress_on(arrived)?;
        let later = Accounts::of(&road)?;
        let wire_bytes = self.link.carried_bytes()?.saturating_sub(bytes);
        let figures = evaluate(peer, &probe.finish()?, &gone)?;
        let engine = |side: usize| {
            let engines = gone.engines.as_ref();
            engines.map_or(Duration::ZERO, |both| both[side].cpu)
        };
        Ok(Move {
            wire_bytes,
            source: accounts.source.until(&later.source, engine(0)),
            target: accounts.target.until(&later.target, engine(1)),
            engine: gone.engines.map(|[source, target]| EngineFigures {
                source_peak_kib: source.peak_kib,
                target_peak_kib: target.peak_kib,
                told: source.ended.json(),
            }),
            ..figures
        })
    }

    fn target(&self, peer: Peer) -> Result<Qemu, TestbedError> {
        let machine = self.machine.clone().incoming();
        let machine = match peer {
            Peer::Switchover => machine.on_ram_of(&self.here),
            _ if self.conditions.preallocated => machine.populate(Populate::AtStart),
            _ => machine.populate(Populate::OnDemand),
        };
        self.link.on(self.end.other(), || machine.start())?
    }

    fn rest(&self) -> Result<(), TestbedError> {
        self.here.execute("stop", &json!({})).map(drop)
    }

    fn wake(&self) -> Result<(), TestbedError> {
        self.here.execute("cont", &json!({})).map(drop)
    }

    /// Waits until the guest has verified every page since it arrived.
    fn verify(&self) -> Result<(), TestbedError> {
        if self.conditions.is_idle() {
            self.here.send_line("sweep 1")?;
        }
        let sweeps = self.page.value(Field::Sweeps)?;
        // The first to end may have begun before the move.
        wait_until("the guest verifies all of its memory", BOUND, || {
            (self.page.value(Field::Sweeps).ok()? >= sweeps + 2).then_some(())
        })?;
        if self.conditions.is_idle() {
            self.here.send_line("sweep 0")?;
        }
        Ok(())
    }
}

/// What both QEMUs have used so far.
struct Accounts {
    source: Account,
    target: Account,
}

impl Accounts {
    fn of(road: &Road<'_>) -> Result<Self, TestbedError> {
        Ok(Self {
            source: Account::of(road.source)?,
            target: Account::of(road.target)?,
        })
    }
}

fn equip(machine: Machine, disk: &Disk) -> Machine {
    let (format, path) = (disk.format(), disk.path().to_owned());
    machine
        .device(Device::Disk { format, path })
        .device(Device::Net)
        .device(Device::Rng)
        .device(Device::Tablet)
        .device(Device::Vga)
}

/// Whoever touches the target's RAM before the clock starts has done part of the work unseen.
fn is_untouched(arrived: &StatusPage) -> Result<(), TestbedError> {
    let bytes = arrived.ram().allocated_bytes()?;
    if bytes <= UNTOUCHED_BYTES {
        return Ok(());
    }
    Err(TestbedError::Program {
        program: "the target".into(),
        log: format!("{bytes} bytes of its RAM were allocated before the clock started"),
    })
}

/// Waits until the guest has been at work at the target for a while.
fn progress_on(arrived: &StatusPage) -> Result<(), TestbedError> {
    let first = arrived.value(Field::Progress)?;
    let moving = |than: u64| {
        wait_until("the guest goes on at the target", BOUND, || {
            let progress = arrived.value(Field::Progress).ok()?;
            (progress > than).then_some(progress)
        })
    };
    let first = moving(first)?;
    let began = Instant::now();
    wait_until("the guest has gone on for a while", BOUND, || {
        (began.elapsed() >= AFTERMATH).then_some(())
    })?;
    moving(first).map(drop)
}

/// What the probe tells; the rest is filled in by whoever knows it.
fn evaluate(peer: Peer, seen: &Seen, gone: &Gone) -> Result<Move, TestbedError> {
    let began = gone.began.duration_since(seen.started);
    let (blackout, moved_at) = if peer == Peer::Switchover {
        // One memory, one counter: the guest stands still once for long.
        let watched = seen.progress.last().map_or(began, |&(at, _)| at);
        let (at, stall) = seen.longest_stall_between(began, watched);
        (stall, at + stall)
    } else {
        let moved_at = seen.moved_at.ok_or_else(|| TestbedError::Program {
            program: peer.to_string(),
            log: "the guest never went on".into(),
        })?;
        (seen.blackout, moved_at)
    };
    let end = moved_at + AFTERMATH;
    let ms = |span: Duration| (span.as_secs_f64() * 1e6).round() / 1e3;
    Ok(Move {
        total_ms: ms(moved_at.saturating_sub(began)),
        blackout_ms: ms(blackout),
        stall_ms: ms(seen.longest_stall),
        brownout_ms: ms(seen.brownout),
        lost_s: seen.lost_s(began, end),
        resolution_ms: ms(seen.resolution),
        curve: Curve::of(seen, began, end),
        ..Move::default()
    })
}
