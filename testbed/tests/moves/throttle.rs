//! A guest that writes faster than the link carries is slowed until it can move, and by nobody any longer.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use ferry_testbed::{Ferry, Linux, Machine, Qemu, QemuVersion, Turn, ferry_binary, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::pair::{BOUND, Move, Pair, assert_whole, made_groups};

/// The link carries less than the guest of [`restless`] writes, and the blackout that is wanted is short.
const TIGHT: [&str; 4] = [
    "--live",
    "--bandwidth=24",
    "--max-downtime=50",
    "--compression=none",
];

/// It writes all that it has time for.
fn restless(version: QemuVersion) -> Machine {
    let linux = Linux::filling_mib(32).writing_pages_per_s(100_000);
    Machine::new(version, 256).linux(linux)
}

fn begin_slowing(pair: &Pair) -> Move<'_> {
    pair.begin(&[&TIGHT[..], &["--auto-converge"]].concat())
}

/// Waits until the guest is slow.
fn wait_for_step(under_way: &Move<'_>, source: &Qemu) {
    under_way
        .migrate
        .wait_until_told("less time now", BOUND)
        .unwrap();
    assert_ne!(made_groups(source), Vec::<PathBuf>::new());
}

#[test]
fn without_it_the_guest_is_kept_and_told_of_it() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&restless(QemuVersion::V10_0));
    let json = pair.begin(&TIGHT).kept("not converging", "running");
    let reason = json["reason"].as_str().unwrap();
    assert!(reason.contains("use --auto-converge or"), "{reason}");
    assert_eq!(json["throttled_percent_max"], 0, "{json}");
}

#[test]
fn with_it_the_guest_moves_and_has_all_of_its_time_again() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let pair = Pair::boot(&restless(version));
        let under_way = begin_slowing(&pair);
        wait_for_step(&under_way, &pair.source);
        let moved = under_way.moved();
        let steps = moved.told.matches("less time now").count();
        let most = moved.json["throttled_percent_max"].as_u64().unwrap();
        println!("{version:?}: {steps} steps to {most} %");
        assert!((20..=99).contains(&most), "{}", moved.json);
        assert_eq!(moved.json["throttled_percent"], 0);
    }
}

/// Told before anything is begun, with all else that stands in the way.
#[test]
fn where_nobody_may_make_groups_it_is_refused() {
    let _turn = Turn::take().unwrap();
    let source = Machine::new(QemuVersion::V10_0, 64).start().unwrap();
    // In mounts of its own, where control groups can only be read.
    let read_only = "awk '/ - cgroup2? /{print $5}' /proc/self/mountinfo | \
        while read -r point; do mount -o remount,bind,ro \"$point\"; done; exec \"$0\" \"$@\"";
    let mut ferry = Command::new("unshare");
    ferry
        .args(["--mount", "sh", "-ec", read_only])
        .arg(ferry_binary().unwrap())
        .args(["migrate", "--json", "--live", "--auto-converge", "--qmp"])
        .arg(source.qmp_path())
        .arg("ferry://127.0.0.1:1");
    let ended = ferry.output().unwrap();
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    let json: Value = serde_json::from_slice(&ended.stdout).unwrap();
    let problem = &json["problems"][0];
    assert_eq!(problem["code"], "throttle", "{json}");
    let remedy = problem["remedy"].as_str().unwrap();
    assert!(remedy.contains("without --auto-converge"), "{json}");
    assert!(json.to_string().contains("mounted read-only"), "{json}");
}

/// One thread runs all vCPUs.
#[test]
fn a_guest_on_one_thread_and_a_source_that_is_kept() {
    let _turn = Turn::take().unwrap();
    let machine = restless(QemuVersion::V10_0)
        .arg("-accel")
        .arg("tcg,thread=single");
    let pair = Pair::boot(&machine);
    let args = ["--auto-converge", "--keep-source"];
    let under_way = pair.begin(&[&TIGHT[..], &args].concat());
    wait_for_step(&under_way, &pair.source);
    // The source is compared with how it was, its threads' groups among all else.
    under_way.moved();
}

#[test]
fn whoever_watches_is_told() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&restless(QemuVersion::V10_0));
    let state = Ferry::state_folder(&pair.source);
    let args = ["--auto-converge", "--auto-converge-initial=70"];
    // No blackout is as short as that: the guest is never stopped.
    let under_way = pair.begin(&[&TIGHT[..2], &["--max-downtime=1"], &args].concat());
    wait_for_step(&under_way, &pair.source);
    let look = |args: &[&str]| Ferry::run(&state, args, BOUND).unwrap();
    let info = wait_until("the figures say so", BOUND, || {
        let info = look(&["jobinfo", "--json"]).json();
        (info["throttled_percent"].as_u64() >= Some(70)).then_some(info)
    });
    let info = info.unwrap();
    assert!(info["throttled_percent_max"].as_u64() >= Some(70), "{info}");
    let words = look(&["jobinfo"]).stdout;
    assert!(words.contains("Guest slowed:"), "{words}");
    under_way.interrupt(Signal::SIGINT);
    let json = under_way.kept("cancelled", "running");
    assert_eq!(json["throttled_percent"], 0, "{json}");
}

#[test]
fn giving_up_leaves_nobody_slow() {
    let _turn = Turn::take().unwrap();
    let machine = restless(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let under_way = begin_slowing(&pair);
    wait_for_step(&under_way, &pair.source);
    under_way.interrupt(Signal::SIGTERM);
    under_way.kept("cancelled", "running");
    // It moves when there is room for it.
    pair.again(&machine)
        .begin(&["--live", "--timeout=20"])
        .moved();
}

#[test]
fn what_a_killed_engine_left_slow_the_next_one_sets_free() {
    let _turn = Turn::take().unwrap();
    let machine = restless(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let under_way = begin_slowing(&pair);
    wait_for_step(&under_way, &pair.source);
    under_way.migrate.signal(Signal::SIGKILL).unwrap();
    let ended = under_way.migrate.wait(BOUND).unwrap();
    assert_eq!(ended.code(), 128 + Signal::SIGKILL as i32);
    under_way.receive.wait(BOUND).unwrap();
    assert_ne!(made_groups(&pair.source), Vec::<PathBuf>::new());
    // Takes the connection and never says a word: the next engine gets no further than to look.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("ferry://{}", silent.local_addr().unwrap());
    let next = Ferry::migrate(&pair.source, &uri, &["--live"]).unwrap();
    let _connection = silent.accept().unwrap();
    assert_eq!(made_groups(&pair.source), Vec::<PathBuf>::new());
    next.signal(Signal::SIGINT).unwrap();
    assert_eq!(next.wait(BOUND).unwrap().code(), 1);
    assert_whole(pair.page());
}
