//! The runner as a user has it: a short run, everything that it writes, and what it says of it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use ferry_benches::figures::{Figures, Move};
use ferry_benches::peer::{Memory, Peer};
use tempfile::TempDir;

fn run(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferry-benches"));
    command.args(args).current_dir(folder).output().unwrap()
}

fn told(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}{err}")
}

fn plausible(run: &Move, data_mib: u64, way: &str) {
    let guest = run.guest.as_ref().unwrap();
    assert_eq!(guest.bad, 0, "{way}");
    assert!(
        run.total_ms > run.blackout_ms && run.blackout_ms > 0.0,
        "{run:?}"
    );
    assert!(guest.stall_ms >= run.blackout_ms, "{run:?}");
    // Random bytes: nothing can make them fewer, but that they need not travel at all.
    let shared_pages = run
        .engine
        .as_ref()
        .map_or(0, |engine| engine.told["pages_shared"].as_u64().unwrap());
    if shared_pages == 0 {
        assert!(run.wire_bytes >= data_mib << 20, "{run:?}");
    } else {
        assert!(shared_pages >= data_mib << 8, "{run:?}");
        assert!(run.wire_bytes < data_mib << 20, "{run:?}");
    }
    for cpu in [run.source, run.target] {
        assert!(cpu.migration_s > 0.0 && cpu.guest_s > 0.0, "{run:?}");
    }
    let curve = &guest.curve;
    let steps = u32::try_from(curve.done_s.len()).unwrap();
    let spans_the_move = curve.step_ms * f64::from(steps) > run.total_ms;
    assert!(spans_the_move, "{run:?}");
    assert!(
        curve.done_s.is_sorted() && curve.done_s.last() > Some(&0.1),
        "{curve:?}"
    );
}

#[test]
fn a_short_run_and_all_that_it_tells() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let args = [
        "--quick",
        "--case",
        "writes",
        "--peers",
        "ferry,ferry:2,precopy",
        "--runs",
        "1",
        "--check",
        "--json",
        "run.json",
        "--csv",
        "run.csv",
        "--html",
        "run.html",
        "--save-baseline",
        "base.json",
    ];
    let output = run(folder.path(), &args);
    assert!(output.status.success(), "{}", told(&output));

    let figures: Figures = serde_json::from_slice(&fs::read(at("run.json")).unwrap()).unwrap();
    let case = figures.case("writes").unwrap();
    let series: Vec<_> = case
        .series
        .iter()
        .map(|series| (series.peer, series.memory, series.moves.len()))
        .collect();
    let expected = [
        (Peer::Ferry, Memory::SharedFile, 1),
        (Peer::FerryOver { lanes: 2 }, Memory::SharedFile, 1),
        (Peer::Precopy, Memory::Private, 1),
        (Peer::Precopy, Memory::SharedFile, 1),
    ];
    assert_eq!(series, expected);
    for series in &case.series {
        plausible(&series.moves[0], case.conditions.data_mib, &series.label());
    }
    let engine = case.series[0].moves[0].engine.as_ref().unwrap();
    assert!(
        engine.source_peak_kib > 0 && engine.target_peak_kib > 0,
        "{engine:?}"
    );
    assert_eq!(engine.told["outcome"], "moved");
    let shared = |series: usize| {
        let engine = case.series[series].moves[0].engine.as_ref();
        engine.unwrap().told["pages_shared"].as_u64().unwrap()
    };
    assert!(
        shared(0) > 0 && shared(1) == 0,
        "ferry shares, ferry:2 does not"
    );
    assert!(case.clean_round_ms_per_gib.unwrap() > 0.0);
    assert!(figures.host.qemu.contains("10.0") && !figures.host.kernel.is_empty());

    let csv = fs::read_to_string(at("run.csv")).unwrap();
    let columns: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(columns, [columns[0]; 5], "{csv}");

    let page = fs::read_to_string(at("run.html")).unwrap();
    assert_eq!(
        page.matches("<svg").count(),
        7,
        "six charts of bars, one of curves"
    );
    for foreign in ["<script", "http://", "https://", "NaN", "inf\""] {
        assert!(!page.contains(foreign), "{foreign}");
    }

    // The same figures again, without measuring: no worse than themselves.
    let again = ["--from", "run.json", "--compare", "base.json"];
    let output = run(folder.path(), &again);
    assert!(output.status.success(), "{}", told(&output));

    // Against a baseline in which ferry was ten times as good, they are.
    let base = fs::read_to_string(at("base.json")).unwrap();
    let mut base: serde_json::Value = serde_json::from_str(&base).unwrap();
    for figure in ["median", "min", "max"] {
        let value = &mut base["cases"]["writes"]["total"][figure];
        *value = (value.as_f64().unwrap() / 10.0).into();
    }
    fs::write(at("base.json"), base.to_string()).unwrap();
    let output = run(folder.path(), &again);
    assert!(!output.status.success(), "{}", told(&output));
    assert!(told(&output).contains("writes: total"), "{}", told(&output));
}

#[test]
fn what_cannot_be_compared_is_no_success() {
    let folder = TempDir::new().unwrap();
    for args in [
        &["--case", "nonsense"][..],
        &["--from", "missing.json"],
        // Told before anything is measured.
        &["--quick", "--compare", "missing.json"],
        &["--peers", "carrier-pigeon"],
    ] {
        let output = run(folder.path(), args);
        assert!(!output.status.success(), "{args:?}: {}", told(&output));
    }
}
