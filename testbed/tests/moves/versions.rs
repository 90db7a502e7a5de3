//! Between the two QEMUs, in every direction.

use ferry_testbed::{QemuVersion, Turn};

use crate::pair::{Pair, small};

/// One guest, four moves: every pair of versions, targets with and without `-S`.
#[test]
fn every_version_reaches_every_other() {
    use QemuVersion::{V7_2, V10_0};
    let _turn = Turn::take().unwrap();
    let mut pair = Pair::boot_towards(&small(V7_2), &small(V10_0));
    pair.move_live();
    for next in [small(V10_0).arg("-S"), small(V7_2), small(V7_2).arg("-S")] {
        pair = pair.onwards(&next);
        pair.move_live();
    }
}

/// How many times there and back: two for every day, more when asked.
fn returns() -> usize {
    let asked = std::env::var("FERRY_TEST_RETURNS").ok();
    asked.map_or(2, |count| count.parse().unwrap())
}

#[test]
fn a_guest_goes_there_and_back() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let mut pair = Pair::boot(&machine);
    for journey in 1..=2 * returns() {
        pair.move_live();
        if journey < 2 * returns() {
            pair = pair.onwards(&machine);
        }
    }
}
