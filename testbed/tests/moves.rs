//! A real guest moves, and its own checks say whether anything was lost.

use std::time::Duration;

use ferry_testbed::{Ferry, Field, Linux, Machine, Probe, QemuVersion, Turn, wait_until};

const BOUND: Duration = Duration::from_secs(60);

#[test]
fn a_writing_guest_moves_live() {
    let _turn = Turn::take().unwrap();
    let machine = Machine::new(QemuVersion::V10_0, 512)
        .linux(Linux::filling_mib(128).writing_pages_per_s(2000));
    let source = machine.start().unwrap();
    let page = source.wait_for_guest(BOUND).unwrap();
    let target = machine.clone().incoming().start().unwrap();
    let arrived = target.counterpart(&page);
    let (receive, uri) = Ferry::receive(&target, &[]).unwrap();
    let probe = Probe::start(page.clone(), Some(arrived.clone()));
    let migrate = Ferry::migrate(&source, &uri, &["--live", "--verbose"]).unwrap();
    let moved = migrate.wait(BOUND).unwrap();
    assert_eq!(moved.code(), 0, "{moved:?}");
    assert_eq!(receive.wait(BOUND).unwrap().code(), 0);
    let sweeps = arrived.value(Field::Sweeps).unwrap();
    wait_until("the guest has verified all of its memory", BOUND, || {
        (arrived.value(Field::Sweeps).unwrap() >= sweeps + 2).then_some(())
    })
    .unwrap();
    assert_eq!(arrived.read().unwrap().faults(), 0);
    let seen = probe.finish().unwrap();
    println!("{:?} {}", seen.blackout, moved.json());
    assert!(seen.moved_at.is_some());
}
