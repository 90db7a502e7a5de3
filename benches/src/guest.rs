//! The guest that moves: the testbed's own, which counts and verifies, or the user's.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ferry_testbed::{
    Backing, Device, Disk, DiskFormat, Field, Linux, Machine, Qemu, QemuVersion, StatusPage, Sweep,
    TestbedError, wait_until,
};
use serde::{Deserialize, Serialize};

use crate::case::{Conditions, Equipment};
use crate::peer::{Memory, Peer};

/// How long a guest may take to boot, to arrive, to verify its memory.
pub const BOUND: Duration = Duration::from_secs(300);

/// How long a guest is watched after its arrival: what it loses there counts.
pub const AFTERMATH: Duration = Duration::from_secs(1);

/// What target RAM that is not preallocated may have in it before the clock starts: firmware and
/// whatever QEMU looks at.
const UNTOUCHED_BYTES: u64 = 16 << 20;

/// Size of the testbed's disk in MiB.
const DISK_MIB: u64 = 64;

/// How a qcow2 image begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The guest of a case, with one kind of memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Guest {
    /// What it is and does.
    pub conditions: Conditions,
    /// Its memory.
    pub memory: Memory,
    /// The user's own, in place of the testbed's.
    pub own: Option<Own>,
    /// After whose moves it verifies its memory.
    pub verifies: Verifies,
}

/// After whose moves a guest verifies all of its memory, which takes longer than most moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verifies {
    /// Everybody's.
    All,
    /// Ferry's.
    Ours,
}

impl Verifies {
    /// Whether it does after a move by `peer`.
    pub fn after(self, peer: Peer) -> bool {
        self == Self::All || !peer.is_qemu()
    }
}

/// A guest of the user's: nothing is known of it but what QEMU tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Own {
    /// Its first disk, a virtio-blk, on storage that both sides have under this name.
    pub image: Option<PathBuf>,
    /// More of QEMU's arguments.
    pub arguments: Vec<String>,
    /// How long it takes to boot and to come to its work.
    pub settle: Duration,
}

impl Guest {
    /// A disk for the guests that use one.
    pub fn disk(&self) -> Result<Option<Disk>, TestbedError> {
        match self.conditions.equipment {
            Equipment::Bare => Ok(None),
            Equipment::Full => Disk::create(DiskFormat::Qcow2, DISK_MIB).map(Some),
        }
    }

    /// Its machine.
    pub fn machine(&self, disk: Option<&Disk>) -> Result<Machine, TestbedError> {
        let backing = match self.memory {
            Memory::SharedFile => Backing::Shm,
            Memory::Private => Backing::Private,
        };
        let conditions = &self.conditions;
        let machine = Machine::new(QemuVersion::V10_0, conditions.guest_mib)
            .cpus(conditions.cpus)
            .backing(backing);
        if let Some(own) = &self.own {
            return own.equip(machine);
        }
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
        Ok(match disk {
            None => machine.linux(linux),
            Some(disk) => equip(machine.linux(linux.verifying_disk()), disk),
        })
    }

    /// Waits until it has booted and is at work; tells where it counts, if it does.
    pub fn wait_for_work(&self, qemu: &Qemu) -> Result<Option<StatusPage>, TestbedError> {
        let Some(own) = &self.own else {
            return qemu.wait_for_guest(BOUND).map(Some);
        };
        let deadline = Instant::now() + own.settle;
        // Nothing tells that somebody else's guest has booted; but QEMU may end.
        while Instant::now() < deadline {
            if qemu.ended()?.is_some() {
                return Err(failed("QEMU ended while the guest booted", &qemu.log()));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(None)
    }

    /// Waits until it has been at work at the target for a while.
    pub fn wait_for_arrival(
        &self,
        target: &Qemu,
        arrived: Option<&StatusPage>,
    ) -> Result<(), TestbedError> {
        let Some(arrived) = arrived else {
            target.wait_for_run_state("running", BOUND)?;
            std::thread::sleep(AFTERMATH);
            return Ok(());
        };
        let moving = |than: u64| {
            wait_until("the guest goes on at the target", BOUND, || {
                let progress = arrived.value(Field::Progress).ok()?;
                (progress > than).then_some(progress)
            })
        };
        let first = moving(arrived.value(Field::Progress)?)?;
        let began = Instant::now();
        wait_until("the guest has gone on for a while", BOUND, || {
            (began.elapsed() >= AFTERMATH).then_some(())
        })?;
        moving(first).map(drop)
    }

    /// Waits until it has verified every page since it arrived; tells what it has found bad.
    pub fn verify(&self, qemu: &Qemu, page: &StatusPage) -> Result<u64, TestbedError> {
        if self.conditions.is_idle() {
            qemu.send_line("sweep 1")?;
        }
        let sweeps = page.value(Field::Sweeps)?;
        // The first to end may have begun before the move.
        wait_until("the guest verifies all of its memory", BOUND, || {
            (page.value(Field::Sweeps).ok()? >= sweeps + 2).then_some(())
        })?;
        if self.conditions.is_idle() {
            qemu.send_line("sweep 0")?;
        }
        Ok(page.read()?.faults())
    }

    /// Whoever touches the target's RAM before the clock starts has done part of the work unseen.
    pub fn check_untouched(&self, target: &Qemu) -> Result<(), TestbedError> {
        if self.conditions.preallocated {
            return Ok(());
        }
        let bytes = target.ram().allocated_bytes()?;
        if bytes <= UNTOUCHED_BYTES {
            return Ok(());
        }
        let log = format!("{bytes} bytes of its RAM were allocated before the clock started");
        Err(failed("the target", &log))
    }
}

impl Own {
    fn equip(&self, machine: Machine) -> Result<Machine, TestbedError> {
        let mut machine = machine;
        if let Some(path) = &self.image {
            let format = format_of(path)?;
            let path = path.clone();
            machine = machine.device(Device::Disk { format, path });
        }
        for argument in &self.arguments {
            machine = machine.arg(argument);
        }
        Ok(machine)
    }
}

fn format_of(image: &Path) -> Result<DiskFormat, TestbedError> {
    let what = || TestbedError::io(format!("read {}", image.display()));
    let mut magic = [0; QCOW2_MAGIC.len()];
    let mut file = File::open(image).map_err(what())?;
    file.read_exact(&mut magic).map_err(what())?;
    Ok(if magic == QCOW2_MAGIC {
        DiskFormat::Qcow2
    } else {
        DiskFormat::Raw
    })
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

/// An error of something that ran.
pub fn failed(program: &str, log: &str) -> TestbedError {
    TestbedError::Program {
        program: program.into(),
        log: log.into(),
    }
}
