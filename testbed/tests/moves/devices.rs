//! Guests with the devices that guests have.

use ferry_testbed::{
    Device, Disk, DiskFormat, Field, Linux, Machine, QemuVersion, Turn, wait_until,
};

use crate::pair::{BOUND, Pair};

/// Disk operations after the move that show the disk to be whole.
const DISK_OPS: u64 = 100;

fn moves_with_all(version: QemuVersion, format: DiskFormat) {
    let disk = Disk::create(format, 64).unwrap();
    let path = disk.path().to_owned();
    let linux = Linux::filling_mib(64)
        .writing_pages_per_s(2000)
        .verifying_disk();
    let machine = Machine::new(version, 320)
        .linux(linux)
        .device(Device::Disk { format, path })
        .device(Device::Net)
        .device(Device::Rng)
        .device(Device::Tablet)
        .device(Device::Vga)
        .device(Device::Pvpanic);
    let pair = Pair::boot(&machine);
    pair.move_live();
    let page = pair.target.counterpart(pair.page());
    let ops = page.value(Field::DiskOps).unwrap();
    wait_until("the guest writes and reads its disk", BOUND, || {
        (page.value(Field::DiskOps).unwrap() >= ops + DISK_OPS).then_some(())
    })
    .unwrap();
    assert_eq!(page.read().unwrap().faults(), 0);
}

#[test]
fn a_guest_with_every_device_and_a_raw_disk_moves() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        moves_with_all(version, DiskFormat::Raw);
    }
}

#[test]
fn a_guest_with_every_device_and_a_qcow2_disk_moves() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        moves_with_all(version, DiskFormat::Qcow2);
    }
}
