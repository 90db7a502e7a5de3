//! What is refused before anything has changed.

use ferry_testbed::{Ferry, QemuVersion, Turn};

use crate::pair::{BOUND, Pair, SLOW, assert_whole, small};

#[test]
fn a_second_migration_of_one_guest_is_refused() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    let first = pair.begin(&["--live", SLOW]);
    first.wait_for_pages();
    let target = small(QemuVersion::V10_0).incoming().start().unwrap();
    let (_receive, uri) = Ferry::receive(&target, &[]).unwrap();
    let second = Ferry::migrate(&pair.source, &uri, &["--live"]).unwrap();
    let second = second.wait(BOUND).unwrap();
    assert_eq!(second.code(), 2, "{second:?}");
    assert_eq!(second.json()["guest"], "untouched");
    first.moved();
}

#[test]
fn a_target_that_waits_for_nothing_is_refused() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let qemu = machine.paused().start().unwrap();
    let refused = Ferry::refused_receive(&qemu, &["--json"]).unwrap();
    assert_eq!(refused.code(), 2, "{refused:?}");
    assert_eq!(refused.json()["problems"][0]["code"], "run-state");
    assert!(refused.stderr.contains("-incoming defer"), "{refused:?}");
    assert_eq!(qemu.run_state().unwrap(), "prelaunch");
}

#[test]
fn a_target_that_cannot_be_reached_leaves_nothing() {
    let _turn = Turn::take().unwrap();
    let qemu = small(QemuVersion::V10_0).paused().start().unwrap();
    // Port 1 of the loopback is nobody's.
    let refused = Ferry::migrate(&qemu, "ferry://127.0.0.1:1", &["--live"]).unwrap();
    let refused = refused.wait(BOUND).unwrap();
    assert_eq!(refused.code(), 2, "{refused:?}");
    let left = std::fs::read_dir(qemu.folder().join("state"));
    assert_eq!(left.into_iter().flatten().count(), 0, "a journal is left");
}

/// As with the source's command line used for the target as it is, on one host.
#[test]
fn a_target_on_the_memory_of_a_running_guest_is_refused() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let source = machine.start().unwrap();
    let page = source.wait_for_guest(BOUND).unwrap();
    let target = machine.incoming().on_ram_of(&source).start().unwrap();
    let refused = Ferry::refused_receive(&target, &["--json"]).unwrap();
    assert_eq!(refused.code(), 2, "{refused:?}");
    assert_eq!(refused.json()["problems"][0]["code"], "ram");
    assert!(
        refused.stderr.contains("mem-path of its own"),
        "{refused:?}"
    );
    assert_whole(&page);
}
