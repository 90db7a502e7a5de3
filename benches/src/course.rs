//! One guest, carried from QEMU to QEMU.

use std::time::Duration;

use ferry_testbed::{
    Device, Disk, DiskFormat, Field, Linux, Machine, Populate, Probe, Qemu, QemuVersion,
    StatusPage, TestbedError, wait_until,
};
use serde::Serialize;

use crate::peer::Peer;

const BOUND: Duration = Duration::from_secs(300);

/// How much the guest progresses at the target before the watch ends: brown-out after the move counts.
const AFTERMATH: Duration = Duration::from_millis(500);

/// The guest and the conditions.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Conditions {
    /// Guest RAM in MiB.
    pub guest_mib: u64,
    /// Of that, filled with random bytes.
    pub data_mib: u64,
    /// Pages rewritten a second.
    pub writes_per_s: u64,
    /// The downtime limit of every way, in ms.
    pub downtime_limit_ms: u64,
    /// Whether the target's RAM is allocated before.
    pub preallocated: bool,
    /// The guest's CPUs, each with a thread that writes and verifies.
    pub cpus: u32,
    /// What the machine has besides.
    pub equipment: Equipment,
}

/// What a machine has besides CPUs and RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Equipment {
    /// Nothing.
    Bare,
    /// A network card, a disk that the guest writes and verifies all the time, a source of random
    /// numbers, a tablet and a screen.
    Full,
}

/// Size of the disk in MiB.
const DISK_MIB: u64 = 64;

/// One move, as the guest saw it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// From the client's start to the first progress at the target, in ms.
    pub total_ms: f64,
    /// The longest time without progress, in ms.
    pub blackout_ms: f64,
    /// Time with less than half of the normal progress, in ms.
    pub brownout_ms: f64,
    /// Pages and disk blocks that the guest found bad.
    pub bad: u64,
}

/// A guest under way.
pub struct Course {
    machine: Machine,
    conditions: Conditions,
    here: Qemu,
    page: StatusPage,
    /// Shared by source and target, and gone with the course.
    _disk: Option<Disk>,
}

impl Course {
    /// Boots the guest.
    pub fn begin(conditions: Conditions) -> Result<Self, TestbedError> {
        let linux = Linux::filling_mib(conditions.data_mib)
            .writing_pages_per_s(conditions.writes_per_s)
            .workers(conditions.cpus);
        let machine = Machine::new(QemuVersion::V10_0, conditions.guest_mib).cpus(conditions.cpus);
        let disk = match conditions.equipment {
            Equipment::Bare => None,
            Equipment::Full => Some(Disk::create(DiskFormat::Qcow2, DISK_MIB)?),
        };
        let machine = match &disk {
            None => machine.linux(linux),
            Some(disk) => equip(machine.linux(linux.verifying_disk()), disk),
        };
        let here = machine.start()?;
        let page = here.wait_for_guest(BOUND)?;
        Ok(Self {
            machine,
            conditions,
            here,
            page,
            _disk: disk,
        })
    }

    /// Carries the guest on to a fresh QEMU, and tells what it saw.
    pub fn carry(&mut self, peer: Peer) -> Result<Measured, TestbedError> {
        let populate = if self.conditions.preallocated {
            Populate::AtStart
        } else {
            Populate::OnDemand
        };
        let target = self.machine.clone().populate(populate).incoming().start()?;
        let arrived = target.counterpart(&self.page);
        let waiting = peer.wait(&self.here, &target)?;
        let limit = Duration::from_millis(self.conditions.downtime_limit_ms);
        let probe = Probe::start(self.page.clone(), Some(arrived.clone()));
        let began = peer.carry(&self.here, &target, waiting, limit)?;
        progress_on(&arrived)?;
        let seen = probe.finish()?;
        let moved_at = seen.moved_at.ok_or_else(|| TestbedError::Program {
            program: peer.to_string(),
            log: "the guest never went on".into(),
        })?;
        let total = moved_at.saturating_sub(began.duration_since(seen.started));
        sweep(&arrived)?;
        // The old QEMU ends here; the next move begins at the new one.
        self.here = target;
        self.page = arrived;
        Ok(Measured {
            total_ms: ms(total),
            blackout_ms: ms(seen.blackout),
            brownout_ms: ms(seen.brownout),
            bad: self.page.read()?.faults(),
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

/// Waits until the guest has been at work for a while.
fn progress_on(arrived: &StatusPage) -> Result<(), TestbedError> {
    let first = wait_until("the guest goes on at the target", BOUND, || {
        let progress = arrived.value(Field::Progress).ok()?;
        (progress > 0).then_some(progress)
    })?;
    let began = std::time::Instant::now();
    wait_until("the guest has gone on for a while", BOUND, || {
        let progress = arrived.value(Field::Progress).ok()?;
        (progress > first && began.elapsed() >= AFTERMATH).then_some(())
    })
}

/// Waits until the guest has verified every page at the target.
fn sweep(arrived: &StatusPage) -> Result<(), TestbedError> {
    let sweeps = arrived.value(Field::Sweeps)?;
    wait_until("the guest verifies all of its memory", BOUND, || {
        (arrived.value(Field::Sweeps).ok()? >= sweeps + 2).then_some(())
    })
}

fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}
