//! The Linux guest under both QEMUs: it fills, counts, verifies, and finds what is wrong.

use std::time::Duration;

use ferry_testbed::{
    Content, Device, Disk, DiskFormat, Field, Linux, Machine, Pattern, Probe, Qemu, QemuVersion,
    StatusPage, Turn, wait_until,
};
use serde_json::json;

const BOOT_BOUND: Duration = Duration::from_secs(60);
const BOUND: Duration = Duration::from_secs(30);

fn boot(machine: &Machine) -> (Qemu, StatusPage) {
    let qemu = machine.start().unwrap();
    let page = qemu.wait_for_guest(BOOT_BOUND).unwrap();
    (qemu, page)
}

fn wait_for_count(page: &StatusPage, field: Field, count: u64) {
    let what = format!(
        "{field:?} reaches {count}: {:?}",
        page.value(field).unwrap()
    );
    wait_until(&what, BOUND, || {
        (page.value(field).unwrap() >= count).then_some(())
    })
    .unwrap();
}

#[test]
fn fills_counts_and_verifies_under_both_qemus() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let linux = Linux::filling_mib(64).writing_pages_per_s(2000);
        let (_qemu, page) = boot(&Machine::new(version, 256).linux(linux));
        wait_for_count(&page, Field::Writes, 4000);
        wait_for_count(&page, Field::Sweeps, 2);
        let status = page.read().unwrap();
        assert_eq!(status.value(Field::Pages), 64 << 8, "QEMU {version}");
        assert!(
            status.value(Field::Verified) > 2 * (64 << 8),
            "QEMU {version}"
        );
        assert_eq!(status.faults(), 0, "QEMU {version}");
    }
}

#[test]
fn keeps_its_rate() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(32).writing_pages_per_s(5000);
    let (_qemu, page) = boot(&Machine::new(QemuVersion::V10_0, 256).linux(linux));
    let writes = page.value(Field::Writes).unwrap();
    let began = std::time::Instant::now();
    wait_for_count(&page, Field::Writes, writes + 10_000);
    let rate = 10_000.0 / began.elapsed().as_secs_f64();
    assert!((3500.0..6000.0).contains(&rate), "{rate} pages/s");
}

#[test]
fn every_pattern_and_content_stays_whole() {
    let _turn = Turn::take().unwrap();
    for (pattern, content) in [
        (Pattern::Hot, Content::Text),
        (Pattern::Sequential, Content::Random),
    ] {
        let linux = Linux::filling_mib(16)
            .writing_pages_per_s(5000)
            .pattern(pattern)
            .content(content)
            .workers(2);
        let (_qemu, page) = boot(&Machine::new(QemuVersion::V10_0, 256).cpus(2).linux(linux));
        wait_for_count(&page, Field::Writes, 5000);
        wait_for_count(&page, Field::Sweeps, 4);
        assert_eq!(page.read().unwrap().faults(), 0, "{pattern:?} {content:?}");
    }
}

#[test]
fn finds_a_planted_stale_page() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(32).writing_pages_per_s(1000);
    let (qemu, page) = boot(&Machine::new(QemuVersion::V10_0, 256).linux(linux));
    wait_for_count(&page, Field::Sweeps, 1);
    assert_eq!(page.value(Field::Bad).unwrap(), 0);
    qemu.send_line("plant").unwrap();
    wait_for_count(&page, Field::Bad, 1);
    let status = page.read().unwrap();
    assert_eq!(status.value(Field::Planted), 1);
    let bad = status.value(Field::LastBadPage);
    qemu.wait_for_serial(&format!("planted a stale page {bad}"), BOUND)
        .unwrap();
    qemu.wait_for_serial(&format!("BAD page {bad}: "), BOUND)
        .unwrap();
    qemu.wait_for_serial("found Stale", BOUND).unwrap();
    // It was one page, and is made good.
    let sweeps = page.value(Field::Sweeps).unwrap();
    wait_for_count(&page, Field::Sweeps, sweeps + 2);
    assert_eq!(page.value(Field::Bad).unwrap(), 1);
}

#[test]
fn verifies_its_disk_with_all_devices_there() {
    let _turn = Turn::take().unwrap();
    for (version, format) in [
        (QemuVersion::V7_2, DiskFormat::Raw),
        (QemuVersion::V10_0, DiskFormat::Qcow2),
    ] {
        let disk = Disk::create(format, 64).unwrap();
        let path = disk.path().to_owned();
        let machine = Machine::new(version, 256)
            .linux(Linux::filling_mib(16).verifying_disk())
            .device(Device::Disk { format, path })
            .device(Device::Net)
            .device(Device::Rng)
            .device(Device::Tablet)
            .device(Device::Vga)
            .device(Device::Pvpanic);
        let (qemu, page) = boot(&machine);
        wait_for_count(&page, Field::DiskOps, 500);
        let status = page.read().unwrap();
        assert_eq!(status.faults(), 0, "QEMU {version}: {}", qemu.serial());
    }
}

#[test]
fn finds_a_disk_block_that_is_not_its_own() {
    let _turn = Turn::take().unwrap();
    let disk = Disk::create(DiskFormat::Raw, 64).unwrap();
    let device = Device::Disk {
        format: DiskFormat::Raw,
        path: disk.path().to_owned(),
    };
    let linux = Linux::filling_mib(16).verifying_disk();
    let machine = Machine::new(QemuVersion::V10_0, 256)
        .linux(linux)
        .device(device);
    let (_qemu, page) = boot(&machine);
    wait_for_count(&page, Field::DiskOps, 2000);
    assert_eq!(page.value(Field::DiskBad).unwrap(), 0);
    // Behind the guest's back: all blocks change places by one.
    let mut image = std::fs::read(disk.path()).unwrap();
    image[..4 << 20].rotate_left(4096);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(disk.path())
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &image[..4 << 20], 0).unwrap();
    wait_for_count(&page, Field::DiskBad, 1);
}

#[test]
fn obeys_its_console() {
    let _turn = Turn::take().unwrap();
    let machine = Machine::new(QemuVersion::V10_0, 256)
        .linux(Linux::filling_mib(16))
        .device(Device::Pvpanic)
        .arg("-action")
        .arg("panic=pause");
    let (qemu, page) = boot(&machine);
    qemu.send_line("rate 500").unwrap();
    wait_for_count(&page, Field::Writes, 100);
    let booted = page.read().unwrap().value(Field::BootId);
    qemu.send_line("reboot").unwrap();
    let again = wait_until("the guest has booted again", BOOT_BOUND, || {
        let page = qemu.find_status().unwrap()?;
        let status = page.read().unwrap();
        let is_new = status.value(Field::BootId) != booted;
        (is_new && status.value(Field::Filled) == 1).then_some(page)
    })
    .unwrap();
    wait_for_count(&again, Field::Sweeps, 1);
    assert_eq!(again.read().unwrap().faults(), 0);
    qemu.send_line("panic").unwrap();
    qemu.wait_for_run_state("guest-panicked", BOUND).unwrap();
    let events = qemu.take_events().unwrap();
    let named = |name: &str| events.iter().any(|event| event["event"] == name);
    assert!(named("RESET") && named("GUEST_PANICKED"), "{events:?}");
    drop(qemu);

    let (qemu, _page) = boot(&machine);
    qemu.send_line("poweroff").unwrap();
    assert!(qemu.wait_for_end(BOUND).unwrap().success());
}

#[test]
fn the_probe_sees_a_pause_of_known_length() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(32).writing_pages_per_s(2000);
    let (qemu, page) = boot(&Machine::new(QemuVersion::V10_0, 256).linux(linux));
    let progress = page.value(Field::Progress).unwrap();
    let probe = Probe::start(page.clone(), None);
    wait_for_count(&page, Field::Progress, progress + 20_000);
    qemu.execute("stop", &json!({})).unwrap();
    let stopped = std::time::Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    let paused = stopped.elapsed();
    qemu.execute("cont", &json!({})).unwrap();
    let progress = page.value(Field::Progress).unwrap();
    wait_for_count(&page, Field::Progress, progress + 20_000);
    let seen = probe.finish().unwrap();
    // A little longer than what was asked: the commands themselves take time.
    let most = paused + Duration::from_millis(30) + seen.resolution;
    assert!(
        seen.blackout + seen.resolution >= paused,
        "{:?} of {paused:?}",
        seen.blackout
    );
    assert!(seen.blackout <= most, "{:?} of {paused:?}", seen.blackout);
    assert!(
        seen.brownout + Duration::from_millis(20) >= paused,
        "{:?}",
        seen.brownout
    );
    assert_eq!(seen.moved_at, None);
    assert!(seen.normal_per_s > 10_000, "{}", seen.normal_per_s);
}
