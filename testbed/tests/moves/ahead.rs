//! Room at the target, made ahead of the pages and only where the source has data.

use ferry_testbed::{Linux, Machine, QemuVersion, Ram, Turn, wait_until};

use crate::pair::{BOUND, Pair};

/// At so many MiB a second the first round takes ten seconds and more: what the target has early on cannot
/// have come over the link.
const CRAWL: &str = "--bandwidth=8";

/// How far the first round may have come by then, in percent.
const EARLY: u32 = 60;

/// What is told of no hint, being in tatters, and what the guest does meanwhile.
const BESIDES_BYTES: u64 = 8 << 20;

fn held(rams: &[Ram]) -> u64 {
    rams.iter().map(|ram| ram.allocated_bytes().unwrap()).sum()
}

#[test]
fn room_is_made_ahead_of_the_pages_and_not_for_holes() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(96).writing_pages_per_s(200);
    let pair = Pair::boot(&Machine::new(QemuVersion::V10_0, 512).linux(linux));
    let at_source = held(pair.source.rams());
    let begun = pair.begin(&["--live", CRAWL, "--compression=none"]);
    let made = wait_until("room is made for the guest's pages", BOUND / 3, || {
        (pair.arrived_bytes() + BESIDES_BYTES >= at_source).then_some(())
    });
    let told = begun.migrate.told();
    let percent = begun.percent();
    assert!(
        made.is_ok() && percent <= Some(EARLY),
        "{} of {at_source} bytes at {percent:?} %: {told}",
        pair.arrived_bytes()
    );
    let moved = begun.moved();
    let at_target = pair.arrived_bytes();
    println!("{at_source} bytes at the source, {at_target} at the target");
    // The whole guest is there, and of 512 MiB as little as at the source.
    assert!(
        at_target <= at_source + BESIDES_BYTES,
        "{at_target} bytes for {at_source}: {}",
        moved.json
    );
}
