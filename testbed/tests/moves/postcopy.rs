//! Post-copy: the guest runs at the target before its pages are there.

use ferry_testbed::{Ferry, Linux, Machine, Qemu, QemuVersion, Turn, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::pair::{BOUND, Move, Moved, Pair, SLOW, small};

fn figure(of: &Value, name: &str) -> f64 {
    let value = of[name].as_f64();
    value.unwrap_or_else(|| panic!("{name}: {of}"))
}

/// What came after the guest.
fn followed(moved: &Moved) -> &Value {
    let postcopy = &moved.json["postcopy"];
    assert!(figure(postcopy, "last_page_ms") > 0.0, "{postcopy}");
    postcopy
}

#[test]
fn at_once() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let machine = small(version);
        let pair = Pair::boot(&machine);
        let moved = pair.begin(&["--live", "--postcopy-now"]).moved();
        let postcopy = followed(&moved);
        assert!(figure(postcopy, "pages_missing") > 10_000.0, "{postcopy}");
        assert!(figure(postcopy, "pages_asked") > 0.0, "{postcopy}");
        assert_eq!(moved.json["rounds"].as_array().unwrap().len(), 0);
    }
}

#[test]
fn after_one_round() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let moved = pair
        .begin(&["--live", "--postcopy-after-precopy", "--bandwidth=64"])
        .moved();
    let postcopy = followed(&moved);
    assert_eq!(moved.json["rounds"].as_array().unwrap().len(), 1);
    // What was written during the round, and not what it brought.
    let missing = figure(postcopy, "pages_missing");
    let told = figure(&moved.json["rounds"][0], "pages");
    assert!(missing > 100.0 && missing < told, "{}", moved.json);
}

#[test]
fn ordered_in_the_first_round() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&["--live", "--postcopy", SLOW]);
    under_way.wait_for_percent(20);
    let state = Ferry::state_folder(&pair.source);
    let ordered = Ferry::run(&state, &["postcopy"], BOUND).unwrap();
    assert_eq!(ordered.code(), 0, "{ordered:?}");
    let moved = under_way.moved();
    let postcopy = followed(&moved);
    let round = &moved.json["rounds"][0];
    assert!(figure(round, "pages") > 1000.0, "{}", moved.json);
    assert!(
        figure(postcopy, "pages_missing") > 10_000.0,
        "{}",
        moved.json
    );
}

#[test]
fn when_copying_cannot_keep_up() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(64).writing_pages_per_s(20_000);
    let machine = Machine::new(QemuVersion::V10_0, 256).linux(linux);
    let pair = Pair::boot(&machine);
    let moved = pair
        .begin(&[
            "--live",
            "--postcopy",
            "--bandwidth=32",
            "--max-downtime=20",
        ])
        .moved();
    followed(&moved);
    assert!(moved.told.contains("handed over now"), "{}", moved.told);
}

#[test]
fn when_time_is_up() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let moved = pair
        .begin(&["--live", "--timeout=1", "--timeout-postcopy", SLOW])
        .moved();
    let postcopy = followed(&moved);
    assert!(figure(postcopy, "pages_missing") > 1000.0, "{}", moved.json);
}

/// Nothing is missing: it is a move like any other.
#[test]
fn allowed_and_not_needed() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let moved = pair.begin(&["--live", "--postcopy"]).moved();
    assert_eq!(moved.json["postcopy"], Value::Null);
}

#[test]
fn there_and_back() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(64).writing_pages_per_s(5000);
    let machine = Machine::new(QemuVersion::V10_0, 256).linux(linux);
    let mut pair = Pair::boot(&machine);
    for _ in 0..3 {
        let moved = pair.begin(&["--live", "--postcopy-now"]).moved();
        followed(&moved);
        pair = pair.onwards(&machine);
    }
}

/// The guest waits for pages at a pace at which there is time to let engines die.
const CRAWLING: [&str; 3] = ["--live", "--postcopy-now", "--bandwidth=16"];

/// Begins a move, and waits until the guest was handed over.
fn handed_over(pair: &Pair) -> Move<'_> {
    let under_way = pair.begin(&CRAWLING);
    let state = Ferry::state_folder(&pair.source);
    wait_until("the guest was handed over", BOUND, || {
        let look = Ferry::run(&state, &["jobinfo", "--json"], BOUND).unwrap();
        (look.json()["phase"] == "serving").then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {}", under_way.migrate.told()));
    under_way
}

/// Goes on where the engine of this QEMU died.
fn resume(qemu: &Qemu) -> Ferry {
    let state = Ferry::state_folder(qemu);
    let left = Ferry::left_in(&state);
    let notes = left
        .iter()
        .find(|path| path.extension() == Some("resume".as_ref()));
    let job = notes
        .unwrap()
        .file_stem()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    Ferry::start(&state, &["resume", &job, "--json"]).unwrap()
}

fn killed(ferry: Ferry) {
    ferry.signal(Signal::SIGKILL).unwrap();
    assert_eq!(ferry.wait(BOUND).unwrap().code(), 128 + 9);
}

fn moved(ferry: Ferry) -> Value {
    let ended = ferry.wait(BOUND).unwrap();
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert_eq!(ended.json()["outcome"], "moved");
    ended.json()
}

/// The one death that a guest does not survive: both sides say so, and nobody claims that it moved.
#[test]
fn the_targets_qemu_dies() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let Move {
        migrate, receive, ..
    } = handed_over(&pair);
    pair.target.kill().unwrap();
    for ended in [migrate.wait(BOUND).unwrap(), receive.wait(BOUND).unwrap()] {
        assert_eq!(ended.code(), 3, "{ended:?}");
        assert_eq!(ended.json()["outcome"], "in-doubt");
        assert!(ended.stderr.contains("the guest is lost"), "{ended:?}");
        assert!(ended.stderr.contains("Start the guest anew"), "{ended:?}");
    }
    assert_ne!(pair.source.run_state().unwrap(), "running");
}

#[test]
fn the_targets_engine_dies() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let Move {
        migrate, receive, ..
    } = handed_over(&pair);
    killed(receive);
    let faults = moved(resume(&pair.target))["faults"].clone();
    assert!(figure(&faults, "count") > 0.0, "{faults}");
    moved(migrate);
    pair.assert_arrived();
}

#[test]
fn the_sources_engine_dies() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V7_2);
    let pair = Pair::boot(&machine);
    let Move {
        migrate, receive, ..
    } = handed_over(&pair);
    killed(migrate);
    let again = Ferry::migrate(&pair.source, "ferry://127.0.0.1:9", &["--live"]).unwrap();
    let ended = again.wait(BOUND).unwrap();
    assert_eq!(
        ended.code(),
        2,
        "a guest that was given away is not moved: {ended:?}"
    );
    moved(resume(&pair.source));
    moved(receive);
    pair.assert_arrived();
}

#[test]
fn both_engines_die() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let Move {
        migrate, receive, ..
    } = handed_over(&pair);
    killed(receive);
    killed(migrate);
    let [there, here] = [&pair.target, &pair.source].map(resume);
    moved(there);
    moved(here);
    pair.assert_arrived();
}

/// Both die again and again: each goes on where the other did.
#[test]
fn engines_die_again_and_again() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let Move {
        mut migrate,
        mut receive,
        ..
    } = handed_over(&pair);
    for _ in 0..3 {
        let before = pair.arrived_bytes();
        wait_until("more has come", BOUND, || {
            (pair.arrived_bytes() > before + (4 << 20)).then_some(())
        })
        .unwrap();
        killed(receive);
        receive = resume(&pair.target);
        let before = pair.arrived_bytes();
        wait_until("it goes on", BOUND, || {
            (pair.arrived_bytes() > before).then_some(())
        })
        .unwrap();
        killed(migrate);
        migrate = resume(&pair.source);
    }
    moved(receive);
    moved(migrate);
    pair.assert_arrived();
}
