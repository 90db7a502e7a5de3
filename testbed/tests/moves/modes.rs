//! What the options of `ferry migrate` promise, and what the guest may be doing.

use ferry_testbed::{Content, Ferry, Linux, Machine, Pattern, QemuVersion, Turn};
use serde_json::json;

use crate::pair::{BOUND, Pair, small};

fn filling() -> Linux {
    Linux::filling_mib(64)
}

fn machine(linux: Linux) -> Machine {
    Machine::new(QemuVersion::V10_0, 256).linux(linux)
}

#[test]
fn an_idle_guest_moves() {
    let _turn = Turn::take().unwrap();
    Pair::boot(&machine(filling())).move_live();
}

#[test]
fn a_guest_that_writes_5000_pages_a_second_moves() {
    let _turn = Turn::take().unwrap();
    Pair::boot(&machine(filling().writing_pages_per_s(5000))).move_live();
}

#[test]
fn hot_and_sequential_writers_move() {
    let _turn = Turn::take().unwrap();
    for (pattern, content) in [
        (Pattern::Hot, Content::Text),
        (Pattern::Sequential, Content::Random),
    ] {
        let linux = filling()
            .writing_pages_per_s(3000)
            .pattern(pattern)
            .content(content);
        Pair::boot(&machine(linux)).move_live();
    }
}

#[test]
fn two_vcpus_move() {
    let _turn = Turn::take().unwrap();
    let linux = filling().writing_pages_per_s(2000).workers(2);
    Pair::boot(&machine(linux).cpus(2)).move_live();
}

#[test]
fn without_live_the_guest_stands_for_the_whole_copy() {
    let _turn = Turn::take().unwrap();
    let moved = Pair::boot(&small(QemuVersion::V10_0)).begin(&[]).moved();
    let first = moved.json["rounds"][0]["ms"].as_f64().unwrap();
    assert!(moved.ms("downtime_ms") >= first, "{}", moved.json);
}

/// With the guest standing at both sides, every byte can be compared.
#[test]
fn a_suspended_guest_arrives_byte_for_byte() {
    let _turn = Turn::take().unwrap();
    for (version, live) in [(QemuVersion::V10_0, true), (QemuVersion::V7_2, false)] {
        let pair = Pair::boot(&small(version));
        let mut args = vec!["--suspend", "--keep-source"];
        args.extend(live.then_some("--live"));
        pair.begin(&args).moved();
    }
}

#[test]
fn a_paused_guest_arrives_paused_and_costs_no_memory() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    pair.source.execute("stop", &json!({})).unwrap();
    let before = pair.source.ram().allocated_bytes().unwrap();
    let moved = pair.begin(&["--live", "--keep-source"]).moved();
    assert_eq!(pair.source.ram().allocated_bytes().unwrap(), before);
    // What is not allocated is not sent.
    let wire = moved.json["bytes_wire"].as_u64().unwrap();
    assert!(wire < before + (2 << 20), "{wire} for {before}");
}

#[test]
fn a_kept_source_cannot_be_moved_again() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    pair.begin(&["--live", "--keep-source"]).moved();
    let target = small(QemuVersion::V10_0).incoming().start().unwrap();
    let (_receive, uri) = Ferry::receive(&target, &[]).unwrap();
    let again = Ferry::migrate(&pair.source, &uri, &["--live"]).unwrap();
    let again = again.wait(BOUND).unwrap();
    assert_eq!(again.code(), 2, "{again:?}");
    assert_eq!(again.json()["problems"][0]["code"], "run-state");
    assert_eq!(pair.source.run_state().unwrap(), "postmigrate");
    // Not even when somebody lets it run, which makes a second guest: its journal knows better.
    pair.source.execute("cont", &json!({})).unwrap();
    let again = Ferry::migrate(&pair.source, &uri, &["--live"]).unwrap();
    let again = again.wait(BOUND).unwrap();
    assert_eq!(again.code(), 2, "{again:?}");
    assert!(again.stderr.contains("given away"), "{again:?}");
}

#[test]
fn a_bandwidth_is_kept() {
    let _turn = Turn::take().unwrap();
    let moved = Pair::boot(&machine(filling()))
        .begin(&["--live", "--bandwidth", "64"])
        .moved();
    let first = &moved.json["rounds"][0];
    let mib = first["bytes"].as_f64().unwrap() / f64::from(1 << 20);
    let rate = mib / first["ms"].as_f64().unwrap() * 1e3;
    assert!((32.0..68.0).contains(&rate), "{rate} MiB/s");
}

#[test]
fn past_the_timeout_the_guest_is_suspended_and_the_move_finishes() {
    let _turn = Turn::take().unwrap();
    // 20 MiB/s written and 16 carried: it would never end by itself.
    let linux = filling().writing_pages_per_s(5000);
    let moved = Pair::boot(&machine(linux))
        .begin(&["--live", "--bandwidth", "16", "--timeout", "3"])
        .moved();
    assert!(moved.told.contains("paused now"), "{}", moved.told);
    assert!(moved.ms("total_ms") > 3000.0, "{}", moved.json);
    assert!(moved.ms("downtime_ms") > 100.0, "{}", moved.json);
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_kept() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(16).writing_pages_per_s(8000);
    let pair = Pair::boot(&machine(linux));
    pair.begin(&["--live", "--bandwidth", "24"])
        .kept("not converging", "running");
}
