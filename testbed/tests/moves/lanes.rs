//! Real guests move while their page lanes die, hang and corrupt.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ferry_stream::frame::Kind;
use ferry_testbed::proxy::{CONTROL, Deed, FrameName, Way};
use ferry_testbed::{QemuVersion, Turn};

use crate::pair::{Pair, SLOW, small};

/// Lanes that die in one move.
const DEATHS: usize = 10;

/// Within the data of a page frame.
const WITHIN_PAGES: usize = 60_000;

/// Where the round and the number of records end in a page frame, and its checksum, table and data
/// begin: bytes of each, for corruption.
const FIELDS: [usize; 6] = [0, 20, 28, 33, 50, 60_000];

fn carries_pages(frame: FrameName) -> bool {
    frame.connection != CONTROL && frame.way == Way::ToTarget && frame.kind == Kind::Pages
}

#[test]
fn ten_lanes_die_in_one_move() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    let killed = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&killed);
    // Lanes on which pages came since the last death.
    let mut alive = BTreeSet::new();
    let kills = move |frame: FrameName, _: &mut Vec<u8>| {
        if !carries_pages(frame) {
            return Deed::Pass;
        }
        alive.insert(frame.connection);
        let nth = killed.load(Ordering::Relaxed);
        if alive.len() < 2 || nth == DEATHS {
            return Deed::Pass;
        }
        alive.clear();
        killed.fetch_add(1, Ordering::Relaxed);
        // Before a frame, within one, and behind one.
        let after_bytes = [0, WITHIN_PAGES, usize::MAX][nth % 3];
        Deed::Kill { after_bytes }
    };
    let args = ["--live", SLOW, "--parallel-connections=3"];
    let moved = pair.begin_through(&args, kills).moved();
    assert_eq!(counted.load(Ordering::Relaxed), DEATHS, "{}", moved.told);
    assert_eq!(moved.json["lanes_lost"], DEATHS, "{}", moved.told);
    assert_eq!(moved.json["lanes"], 3);
}

/// The last round is the one that is told Complete, with the guest standing.
#[test]
fn a_lane_dies_while_the_guest_stands() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    let mut complete = false;
    let mut killed = false;
    let kills = move |frame: FrameName, _: &mut Vec<u8>| {
        complete |= frame.connection == CONTROL && frame.kind == Kind::Paused;
        let dies = frame.connection != CONTROL
            && frame.way == Way::ToTarget
            && matches!(frame.kind, Kind::Pages | Kind::RoundEnd);
        if complete && dies && !killed {
            killed = true;
            return Deed::Kill { after_bytes: 17 };
        }
        Deed::Pass
    };
    let args = ["--live", "--parallel-connections=2"];
    let moved = pair.begin_through(&args, kills).moved();
    assert_eq!(moved.json["lanes_lost"], 1, "{}", moved.told);
}

#[test]
fn a_lane_in_a_black_hole_holds_nobody_up_for_long() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    let hole = |frame: FrameName, _: &mut Vec<u8>| {
        let swallowed = frame.connection == 2
            && frame.way == Way::ToTarget
            && (frame.kind == Kind::RoundEnd || frame.kind == Kind::Pages && frame.nth > 3);
        if swallowed { Deed::Swallow } else { Deed::Pass }
    };
    let args = ["--live", "--parallel-connections=2"];
    let moved = pair.begin_through(&args, hole).moved();
    assert_eq!(moved.json["lanes_lost"], 1, "{}", moved.told);
}

#[test]
fn all_lanes_dead_is_a_lost_link() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    let kills = |frame: FrameName, _: &mut Vec<u8>| {
        if carries_pages(frame) && frame.nth > 5 {
            return Deed::Kill { after_bytes: 0 };
        }
        Deed::Pass
    };
    let args = ["--live", SLOW, "--parallel-connections=2"];
    let begun = pair.begin_through(&args, kills);
    begun.kept("the link to the peer was lost", "running");
}

#[test]
fn a_corrupted_frame_is_found_and_its_lane_named() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let mut pair = Pair::boot(&machine);
    for (nth, at) in (3..).zip(FIELDS) {
        let lane = 1 + nth % 2;
        let corrupts = move |frame: FrameName, bytes: &mut Vec<u8>| {
            if carries_pages(frame) && frame.connection == lane && frame.nth == nth {
                bytes[at] ^= 0x10;
            }
            Deed::Pass
        };
        let args = ["--live", "--parallel-connections=2"];
        let begun = pair.begin_through(&args, corrupts);
        let json = begun.kept("moving pages failed: page lane", "running");
        println!("byte {at}: {}", json["reason"]);
        pair = pair.again(&machine);
    }
}
