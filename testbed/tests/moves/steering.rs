//! Moves that are watched and steered by other commands while they run.

use std::path::{Path, PathBuf};

use ferry_testbed::{Ended, Ferry, Linux, Machine, Qemu, QemuVersion, Turn, wait_until};
use serde_json::{Value, json};

use crate::pair::{BOUND, Pair, SLOW, small};

/// At this pace the first round of a guest with 64 MiB takes more than a minute.
const CRAWLING: [&str; 3] = ["--live", "--bandwidth=1", "--compression=none"];

/// How long such a move may take once it is let go, with time to look at it before.
const LET_GO_MS: f64 = 45_000.0;

fn ferry(state: &Path, args: &[&str]) -> Ended {
    Ferry::run(state, args, BOUND).unwrap()
}

/// Runs a command that does what is wanted.
fn done(state: &Path, args: &[&str]) -> Ended {
    let ended = ferry(state, args);
    assert_eq!(ended.code(), 0, "{ended:?}");
    ended
}

/// Runs a command that is refused with `words`.
fn refused(state: &Path, args: &[&str], words: &[&str]) {
    let ended = ferry(state, args);
    assert_eq!(ended.code(), 2, "{ended:?}");
    for word in words {
        assert!(ended.stderr.contains(word), "{word:?}: {ended:?}");
    }
}

/// Waits until `count` moves are copying, and tells what `ferry jobs` says of them.
fn jobs(state: &Path, count: usize) -> Vec<Value> {
    wait_until("the moves are listed", BOUND, || {
        let listed = done(state, &["jobs", "--json"]).json();
        let jobs = listed["jobs"].as_array().unwrap().clone();
        let copying = |job: &&Value| job["phase"] == "copying";
        (jobs.iter().filter(copying).count() == count).then_some(jobs)
    })
    .unwrap()
}

fn nothing_runs(state: &Path) {
    assert_eq!(
        done(state, &["jobs", "--json"]).json(),
        json!({"jobs": [], "silent": []})
    );
    let told = done(state, &["jobs"]);
    assert!(told.stderr.contains("No migration runs here"), "{told:?}");
    refused(state, &["jobinfo"], &["no migration runs here"]);
    refused(state, &["jobabort", "qemu-1-1"], &["no job qemu-1-1"]);
}

fn socket(qemu: &Qemu) -> String {
    format!("--qmp={}", qemu.qmp_path().display())
}

#[test]
fn a_crawling_move_is_seen_and_let_go() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    let state = &*Ferry::state_folder(&pair.source);
    nothing_runs(state);
    let crawling = pair.begin(&CRAWLING);
    let job = jobs(state, 1).remove(0);
    let name = job["name"].as_str().unwrap();
    assert_eq!(job["bandwidth_bytes_per_s"], 1 << 20, "{job}");
    assert_eq!(job["engine_pid"], crawling.migrate.pid(), "{job}");
    assert!(job["percent"].as_u64().unwrap() < 98, "{job}");
    let table = done(state, &["jobs"]).stdout;
    assert!(
        table.contains(name) && table.contains("copying RAM"),
        "{table}"
    );
    for which in [&[name][..], &[&socket(&pair.source)], &[]] {
        let info = done(state, &[&["jobinfo", "--json"], which].concat());
        assert_eq!(info.json()["name"], name, "{info:?}");
    }
    let words = done(state, &["jobinfo"]).stdout;
    for word in [name, "at most 1.00 MiB/s", "100 ms", "lanes"] {
        assert!(words.contains(word), "{word:?}: {words}");
    }
    let watch = Ferry::start(state, &["jobinfo", "--watch", "--json"]).unwrap();
    done(state, &["setspeed", "unlimited"]);
    let moved = crawling.moved();
    assert!(moved.ms("total_ms") < LET_GO_MS, "{}", moved.json);
    assert_eq!(moved.json["job"], name);
    assert!(
        moved.told.contains(&format!("Job {name}\n")),
        "{}",
        moved.told
    );
    let watched = watch.wait(BOUND).unwrap();
    assert_eq!(watched.code(), 0, "{watched:?}");
    assert_eq!(watched.json()["name"], name, "{watched:?}");
    assert!(watched.stderr.contains("is over"), "{watched:?}");
    nothing_runs(state);
}

/// The guest writes faster than the link carries, and would be kept.
#[test]
fn a_higher_downtime_limit_lets_a_restless_guest_move() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(16).writing_pages_per_s(8000);
    let pair = Pair::boot(&Machine::new(QemuVersion::V10_0, 256).linux(linux));
    let state = &*Ferry::state_folder(&pair.source);
    let restless = pair.begin(&["--live", "--bandwidth=24", "--max-downtime=1"]);
    jobs(state, 1);
    done(state, &["setmaxdowntime", &socket(&pair.source), "20000"]);
    let info = done(state, &["jobinfo", "--json"]).json();
    assert_eq!(info["max_downtime_ms"], 20_000, "{info}");
    restless.moved();
    nothing_runs(state);
}

#[test]
fn an_aborted_move_leaves_the_guest_at_the_source() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let mut pair = Pair::boot(&machine);
    for args in [&["--live", SLOW][..], &[SLOW]] {
        let state = &*Ferry::state_folder(&pair.source);
        let under_way = pair.begin(args);
        under_way.wait_for_pages();
        done(state, &["jobabort"]);
        let json = under_way.kept("cancelled", "running");
        assert_eq!(json["reason"], "cancelled");
        nothing_runs(state);
        pair = pair.again(&machine);
    }
}

#[test]
fn of_two_moves_one_has_to_be_named() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pairs = [Pair::boot(&machine), Pair::boot(&machine)];
    // Journals and sockets of both in one folder, as on any host.
    let state = pairs[0].source.folder().join("shared");
    let at = format!("--state-dir={}", state.display());
    let crawling: Vec<_> = pairs
        .iter()
        .map(|pair| pair.begin(&[&CRAWLING[..], &[&at]].concat()))
        .collect();
    let listed = jobs(&state, 2);
    let names: Vec<&str> = listed
        .iter()
        .map(|job| job["name"].as_str().unwrap())
        .collect();
    for args in [
        &["jobinfo"][..],
        &["setspeed", "7"],
        &["setmaxdowntime", "7"],
        &["jobabort"],
    ] {
        refused(&state, args, &["2 migrations run here", names[0], names[1]]);
    }
    // By its socket one of them alone is let go.
    done(
        &state,
        &["setspeed", &socket(&pairs[0].source), "unlimited"],
    );
    let mut crawling = crawling.into_iter();
    let first = crawling.next().unwrap().moved();
    let other = jobs(&state, 1).remove(0);
    assert_ne!(first.json["job"], other["name"]);
    assert_eq!(other["bandwidth_bytes_per_s"], 1 << 20, "{other}");
    done(&state, &["jobabort", other["name"].as_str().unwrap()]);
    crawling.next().unwrap().kept("cancelled", "running");
    nothing_runs(&state);
    assert_eq!(Ferry::left_in(&state), Vec::<PathBuf>::new());
}
