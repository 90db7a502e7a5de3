//! What happens under a migration: the guest, its operator and its disks go on living.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use ferry_testbed::{
    Device, DiskFormat, Field, Linux, Machine, QemuVersion, TestbedError, Turn, wait_until,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use tempfile::TempDir;

use crate::pair::{BOUND, Pair, SLOW, assert_whole, small};

fn guest() -> Machine {
    let linux = Linux::filling_mib(32).writing_pages_per_s(1000);
    Machine::new(QemuVersion::V10_0, 256).linux(linux)
}

#[test]
fn the_guest_shuts_down() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let pair = Pair::boot(&small(version));
        let under_way = pair.begin(&["--live", SLOW]);
        under_way.wait_for_pages();
        pair.source.send_line("poweroff").unwrap();
        under_way.given_up("shut down");
        // As it does without a migration.
        assert!(pair.source.wait_for_end(BOUND).unwrap().success());
    }
}

#[test]
fn the_guest_panics() {
    let _turn = Turn::take().unwrap();
    let machine = guest().device(Device::Pvpanic);
    let machine = machine.arg("-action").arg("panic=pause");
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&["--live", SLOW]);
    under_way.wait_for_pages();
    pair.source.send_line("panic").unwrap();
    under_way.kept("panicked", "guest-panicked");
}

/// The move goes on, and a freshly booted guest arrives.
#[test]
fn the_guest_resets() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&guest());
    let booted = pair.page().read().unwrap().value(Field::BootId);
    let under_way = pair.begin(&["--live", "--bandwidth", "32", "--timeout", "5"]);
    under_way.wait_for_pages();
    pair.source.send_line("reboot").unwrap();
    under_way
        .migrate
        .wait_until_told("the guest was reset", BOUND)
        .unwrap();
    let ended = under_way.migrate.wait(BOUND).unwrap();
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(under_way.receive.wait(BOUND).unwrap().code(), 0);
    let page = wait_until("the guest has booted again", BOUND, || {
        let page = pair.target.find_status().unwrap()?;
        let status = page.read().unwrap();
        let is_new = status.value(Field::BootId) != booted;
        (is_new && status.value(Field::Filled) == 1).then_some(page)
    })
    .unwrap();
    assert_whole(&page);
}

#[test]
fn somebody_pauses_the_guest() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&guest());
    let under_way = pair.begin(&["--live", SLOW, "--keep-source"]);
    under_way.wait_for_pages();
    pair.source.execute("stop", &json!({})).unwrap();
    let moved = under_way.will_be("paused").moved();
    assert!(moved.told.contains("left paused"), "{}", moved.told);
}

#[test]
fn somebody_resumes_a_guest_that_stands_for_the_copy() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&guest());
    let under_way = pair.begin(&[SLOW]);
    under_way.wait_for_pages();
    pair.source.execute("cont", &json!({})).unwrap();
    let moved = under_way.moved();
    assert!(moved.told.contains("left running"), "{}", moved.told);
    // From then on it was a live move.
    assert!(moved.ms("downtime_ms") < moved.ms("total_ms") / 2.0);
}

#[test]
fn a_paused_guest_is_resumed_and_so_it_arrives() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&guest());
    pair.source.execute("stop", &json!({})).unwrap();
    let under_way = pair.begin(&["--live", SLOW]);
    under_way.wait_for_pages();
    pair.source.execute("cont", &json!({})).unwrap();
    under_way.will_be("running").moved();
}

#[test]
fn a_device_is_plugged() {
    let _turn = Turn::take().unwrap();
    let machine = guest().device(Device::Tablet);
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&["--live", SLOW]);
    under_way.wait_for_pages();
    let mouse = json!({ "driver": "usb-mouse", "id": "mouse", "bus": "usb0.0" });
    pair.source.execute("device_add", &mouse).unwrap();
    under_way.kept("mouse (usb-mouse) was added", "running");
}

#[test]
fn a_dimm_is_plugged() {
    let _turn = Turn::take().unwrap();
    let machine = guest().arg("-m").arg("256M,slots=1,maxmem=1G");
    let source = machine.start().unwrap();
    let page = source.wait_for_guest(BOUND).unwrap();
    let late = source.ram().path().with_file_name("late");
    let backend = json!({
        "qom-type": "memory-backend-file", "id": "late", "mem-path": late, "size": 128 << 20,
        "share": true,
    });
    // A back end that nothing uses is no guest RAM yet.
    source.execute("object-add", &backend).unwrap();
    let pair = Pair::new(source, Some(page), &machine);
    let under_way = pair.begin(&["--live", SLOW]);
    under_way.wait_for_pages();
    let dimm = json!({ "driver": "pc-dimm", "id": "slot", "memdev": "late" });
    pair.source.execute("device_add", &dimm).unwrap();
    // Either side may be the first to see it: QEMU's own stream names the DIMM to the target, which
    // has none, while the source compares its hardware.
    let json = under_way.kept("", "running");
    let reason = json["reason"].as_str().unwrap();
    let is_told = |words: &&str| reason.contains(*words);
    assert!(
        ["hardware changed", "loading the device state failed"]
            .iter()
            .any(is_told),
        "{reason}"
    );
}

/// A tmpfs that can be filled up, unmounted when dropped.
struct SmallFileSystem(TempDir);

/// Twice what the guest writes to its disk.
const SMALL_MIB: u64 = 8;

impl SmallFileSystem {
    fn mount() -> Self {
        let folder = TempDir::with_prefix("ferry-full-").unwrap();
        let options = format!("size={SMALL_MIB}m");
        let flags = MsFlags::empty();
        mount(
            Some("ferry"),
            folder.path(),
            Some("tmpfs"),
            flags,
            Some(&*options),
        )
        .unwrap();
        Self(folder)
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("filler")
    }

    /// Leaves not a byte.
    fn fill(&self) {
        use std::io::Write as _;
        let mut file = File::create(self.filler()).unwrap();
        let page = [1; 4096];
        while file.write_all(&page).is_ok() {}
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// The disk's file system runs full: QEMU pauses the guest, to go on when there is room.
#[test]
fn a_disk_runs_full() {
    let _turn = Turn::take().unwrap();
    let small = SmallFileSystem::mount();
    let path = small.0.path().join("disk");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let linux = Linux::filling_mib(32).verifying_disk();
    let machine = Machine::new(QemuVersion::V10_0, 256).linux(linux);
    let machine = machine.device(Device::Disk {
        format: DiskFormat::Raw,
        path,
    });
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&["--live", SLOW]);
    under_way.wait_for_pages();
    small.fill();
    under_way.kept("I/O error", "io-error");
    fs::remove_file(small.filler()).unwrap();
    pair.source.execute("cont", &json!({})).unwrap();
    let ops = pair.page().value(Field::DiskOps).unwrap();
    let goes_on = || -> Result<bool, TestbedError> { Ok(pair.page().value(Field::DiskOps)? > ops) };
    wait_until(
        "the guest uses its disk again",
        Duration::from_secs(30),
        || goes_on().unwrap().then_some(()),
    )
    .unwrap();
    assert_whole(pair.page());
    pair.again(&machine).move_live();
}
