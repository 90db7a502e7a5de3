//! A host that has much to write out when the guest is to be stopped.

use std::time::Duration;

use ferry_testbed::{Disk, DiskFormat, Linux, Machine, Qemu, QemuVersion, Turn};
use serde_json::json;

use crate::pair::Pair;

/// Dirty in the host's page cache, of both images together.
const DIRTY_MIB: u64 = 1024;

/// Written at once.
const PIECE_MIB: u64 = 64;

/// Where in an image the test writes: the guest writes before it.
const FROM_MIB: u64 = 64;

/// Most that QEMU's own flush may take, with nearly nothing left for it.
const MOST_FLUSH_MS: f64 = 20.0;

/// The downtime limit, as an argument.
const LIMIT_MS: &str = "100";

/// Has QEMU write to its drive `number`, behind what the guest uses: as a guest does that fills its
/// disk, into the page cache. Only what QEMU has written itself does it flush when it stops.
fn dirty(qemu: &Qemu, number: u32) {
    for piece in 0..DIRTY_MIB / 2 / PIECE_MIB {
        let at = FROM_MIB + piece * PIECE_MIB;
        let line = format!("qemu-io virtio{number} \"write -P 0xa5 {at}M {PIECE_MIB}M\"");
        let answer = qemu.execute("human-monitor-command", &json!({ "command-line": line }));
        assert_eq!(answer.unwrap(), "", "qemu-io has nothing to complain of");
    }
}

/// How often the guest may find the host too busy to let it go on in time, whatever was flushed. A flush
/// in the blackout would be there every time.
const ATTEMPTS: u32 = 4;

#[test]
fn a_full_page_cache_is_written_out_before_the_guest_is_stopped() {
    let _turn = Turn::take().unwrap();
    let limit = Duration::from_millis(LIMIT_MS.parse().unwrap());
    let mut seen = Vec::new();
    while seen.iter().all(|blackout| *blackout >= limit) {
        assert!(seen.len() < ATTEMPTS as usize, "{seen:?}");
        seen.push(blackout_of_a_move());
    }
}

/// Moves a guest whose disks are full of what is not written out; tells how long it stood at least.
fn blackout_of_a_move() -> Duration {
    let mib = FROM_MIB + DIRTY_MIB;
    let raw = Disk::create(DiskFormat::Raw, mib).unwrap();
    let qcow2 = Disk::create(DiskFormat::Qcow2, mib).unwrap();
    // Both QEMUs share one page cache here. QEMU throws an image's cache away when it takes the image
    // over, in the blackout (77 ms for this GiB); a second host would have none of it.
    let drive = |disk: &Disk, format| {
        let path = disk.path().display();
        format!(
            "if=virtio,format={format},file.driver=file,file.drop-cache=off,file.filename={path}"
        )
    };
    let linux = Linux::filling_mib(64)
        .writing_pages_per_s(1000)
        .verifying_disk();
    let machine = Machine::new(QemuVersion::V10_0, 256)
        .linux(linux)
        .arg("-drive")
        .arg(drive(&raw, "raw"))
        .arg("-drive")
        .arg(drive(&qcow2, "qcow2"));
    let pair = Pair::boot(&machine);
    (0..2).for_each(|number| dirty(&pair.source, number));
    let moved = pair.begin(&["--live", "--max-downtime", LIMIT_MS]).moved();
    assert!(moved.ms("downtime_ms") < 100.0, "{}", moved.json);
    // Unflushed before, the GiB took 40 to 44 ms on the fast disk on which this was written.
    let flush = moved.json["blackout_ms"]["flush"].as_f64().unwrap();
    assert!(flush < MOST_FLUSH_MS, "{}", moved.json);
    moved.blackout.unwrap().saturating_sub(moved.resolution)
}
