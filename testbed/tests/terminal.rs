//! A terminal that goes away takes no guest with it.

use std::time::Duration;

use ferry_testbed::{
    Ferry, Field, Linux, Machine, Qemu, QemuVersion, StatusPage, Turn, wait_until,
};
use nix::sys::signal::Signal;

const BOUND: Duration = Duration::from_secs(60);

fn booted() -> (Machine, Qemu, StatusPage) {
    let machine = Machine::new(QemuVersion::V10_0, 256).linux(Linux::filling_mib(64));
    let source = machine.start().unwrap();
    let page = source.wait_for_guest(BOUND).unwrap();
    (machine, source, page)
}

fn goes_on(page: &StatusPage) {
    let before = page.value(Field::Progress).unwrap();
    wait_until("the guest goes on", BOUND, || {
        (page.value(Field::Progress).unwrap() > before).then_some(())
    })
    .unwrap();
}

#[test]
fn nobody_hears_what_is_told() {
    let _turn = Turn::take().unwrap();
    let (machine, source, page) = booted();
    let target = machine.clone().incoming().start().unwrap();
    let (receive, uri) = Ferry::receive(&target, &[]).unwrap();
    // The time-out is told in the middle of the move, and the progress all the time.
    let options = ["--live", "--verbose", "--bandwidth", "32", "--timeout", "1"];
    let migrate = Ferry::migrate_unheard(&source, &uri, &options).unwrap();
    let ended = migrate.wait(BOUND).unwrap();
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(ended.json()["outcome"], "moved");
    assert_eq!(receive.wait(BOUND).unwrap().code(), 0);
    goes_on(&target.counterpart(&page));
}

#[test]
fn the_terminal_hangs_up() {
    let _turn = Turn::take().unwrap();
    let (machine, source, page) = booted();
    let target = machine.clone().incoming().start().unwrap();
    let (receive, uri) = Ferry::receive(&target, &[]).unwrap();
    // Without --live: the guest stands while its RAM is copied.
    let migrate = Ferry::migrate(&source, &uri, &["--bandwidth", "4"]).unwrap();
    source.wait_for_run_state("paused", BOUND).unwrap();
    migrate.signal(Signal::SIGHUP).unwrap();
    let ended = migrate.wait(BOUND).unwrap();
    assert_eq!(ended.code(), 1, "{ended:?}");
    assert_eq!(ended.json()["outcome"], "kept");
    assert_eq!(receive.wait(BOUND).unwrap().code(), 1);
    assert_eq!(source.run_state().unwrap(), "running");
    goes_on(&page);
}
