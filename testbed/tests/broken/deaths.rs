//! QEMUs and engines that die, at both sides and in every phase; and a target without room.

use std::path::{Path, PathBuf};

use ferry_engine::core::message::Record;
use ferry_engine::journal::Journal;
use ferry_engine::message::SessionId;
use ferry_stream::frame::Kind;
use ferry_testbed::proxy::{Deed, FrameName, Reach};
use ferry_testbed::{Backing, Ferry, Qemu, Turn, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{Attempt, BOUND, Bed, assert_told, is_watched, journals, machine};

/// Holds the first frame of this kind.
fn at(kind: Kind) -> impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static {
    hold(kind, 1)
}

/// In the middle of the first round.
fn in_first_round() -> impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static {
    hold(Kind::Pages, 20)
}

fn hold(kind: Kind, nth: usize) -> impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static {
    move |frame, _| {
        if (frame.kind, frame.nth) == (kind, nth) {
            return Deed::Hold;
        }
        Deed::Pass
    }
}

fn signal(qemu: &Qemu, signal: Signal) {
    let pid = Pid::from_raw(qemu.pid().try_into().unwrap());
    kill(pid, signal).unwrap();
}

fn held(attempt: &Attempt) {
    attempt.proxy.wait_held(BOUND).unwrap();
}

#[test]
fn the_targets_qemu_dies_in_the_first_round() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let attempt = bed.attempt(&["--live"], in_first_round());
    held(&attempt);
    attempt.target.kill().unwrap();
    attempt.proxy.release();
    lost_its_target(&bed, attempt);
}

#[test]
fn the_targets_qemu_dies_while_it_loads() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let attempt = bed.attempt(&["--live"], at(Kind::Complete));
    held(&attempt);
    // It stands still before it has read all of its state: a load that goes on for ever.
    signal(&attempt.target, Signal::SIGSTOP);
    attempt.proxy.release();
    wait_until("everything was sent", BOUND, || {
        let passed = attempt.proxy.passed();
        let is_last = |frame: &FrameName| frame.kind == Kind::Complete;
        passed.iter().any(is_last).then_some(())
    })
    .unwrap();
    attempt.target.kill().unwrap();
    lost_its_target(&bed, attempt);
}

fn lost_its_target(bed: &Bed, attempt: Attempt) {
    let tried = attempt.end();
    tried.assert_kept(bed, 1);
    assert_told(&tried.migrate, 1, "kept", "the target's VMM is gone");
    let received = tried.receive.wait(BOUND).unwrap();
    assert_told(&received, 1, "kept", "the target's VMM is gone");
}

/// The source may have said Go already, so it asks, or is told in time.
#[test]
fn the_targets_qemu_dies_after_ready() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let attempt = bed.attempt(&["--live"], at(Kind::Ready));
    held(&attempt);
    attempt.target.kill().unwrap();
    attempt.proxy.release();
    attempt.end().assert_kept(&bed, 1);
}

#[test]
fn the_sources_qemu_dies() {
    let _turn = Turn::take().unwrap();
    for kind in [Kind::Pages, Kind::Paused] {
        println!("{kind:?}");
        let bed = Bed::new(machine());
        let attempt = match kind {
            Kind::Pages => bed.attempt(&["--live"], in_first_round()),
            _ => bed.attempt(&["--live"], at(kind)),
        };
        held(&attempt);
        bed.source.kill().unwrap();
        attempt.proxy.release();
        let tried = attempt.end();
        // There is no guest any more, and nobody makes one of half its memory.
        assert_told(&tried.migrate, 1, "kept", "the guest is gone");
        tried.target.wait_for_end(BOUND).unwrap();
        assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 1);
    }
}

/// After Go the source's QEMU is nobody's: its death changes nothing.
#[test]
fn the_sources_qemu_dies_after_go() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let attempt = bed.attempt(&["--live"], at(Kind::Running));
    held(&attempt);
    bed.source.kill().unwrap();
    attempt.proxy.release();
    let tried = attempt.end();
    tried.assert_moved(&bed);
    assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 0);
}

#[test]
fn ferry_receive_dies() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    for kind in [Kind::Pages, Kind::Ready] {
        println!("{kind:?}");
        let attempt = bed.attempt(&["--live"], at(kind));
        held(&attempt);
        attempt.receive.signal(Signal::SIGKILL).unwrap();
        // The death of a process ends its connections; what it had said is not lost with it.
        attempt.proxy.cut(Reach::Gone);
        let tried = attempt.end();
        assert_told(&tried.migrate, 1, "kept", "the link to the peer was lost");
        bed.assert_kept();
        // Its QEMU has nobody left to let it run.
        let state = tried.target.run_state().unwrap();
        assert!(
            ["inmigrate", "paused", "prelaunch"].contains(&&*state),
            "{state}"
        );
    }
}

#[test]
fn ferry_migrate_dies() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let attempt = bed.attempt(&["--live"], in_first_round());
    held(&attempt);
    attempt.migrate.signal(Signal::SIGKILL).unwrap();
    attempt.proxy.cut(Reach::Gone);
    let tried = attempt.end();
    assert_eq!(tried.migrate.code(), 128 + Signal::SIGKILL as i32);
    bed.assert_runs();
    tried.target.wait_for_end(BOUND).unwrap();
    assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 1);

    let [journal] = journals(&bed.source).try_into().unwrap();
    assert_eq!(record(&journal), Some(Record::Migrating));
    a_dead_engines_socket_is_nobodys(&bed);
    let again = bed.attempt(&["--live"], |_, _| Deed::Pass).end();
    again.assert_moved(&bed);
    let state = Ferry::state_folder(&bed.source);
    assert_eq!(Ferry::left_in(&state), Vec::<PathBuf>::new());
}

fn a_dead_engines_socket_is_nobodys(bed: &Bed) {
    let state = Ferry::state_folder(&bed.source);
    let left = Ferry::left_in(&state);
    let is_socket = |path: &&PathBuf| path.extension().is_some_and(|ending| ending == "sock");
    let socket = left.iter().find(is_socket).unwrap();
    let name = socket.file_stem().unwrap().to_str().unwrap();
    let jobs = Ferry::run(&state, &["jobs", "--json"], BOUND).unwrap();
    assert_eq!(jobs.code(), 0, "{jobs:?}");
    assert_eq!(jobs.json(), json!({"jobs": [], "silent": []}));
    let abort = Ferry::run(&state, &["jobabort", name], BOUND).unwrap();
    assert_eq!(abort.code(), 2, "{abort:?}");
    assert!(abort.stderr.contains("no migration runs here"), "{abort:?}");
}

/// A guest that only the dead engine had paused runs after the next move.
#[test]
fn ferry_migrate_dies_while_the_guest_is_paused() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let attempt = bed.attempt(&[], in_first_round());
    held(&attempt);
    assert_eq!(bed.source.run_state().unwrap(), "paused");
    attempt.migrate.signal(Signal::SIGKILL).unwrap();
    attempt.proxy.cut(Reach::Gone);
    let tried = attempt.end();
    assert_eq!(bed.source.run_state().unwrap(), "paused");
    tried.target.wait_for_end(BOUND).unwrap();
    assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 1);

    let again = bed.attempt(&["--live"], |_, _| Deed::Pass).end();
    let told = &again.migrate.stderr;
    assert!(told.contains("it is taken for running"), "{told}");
    again.assert_moved(&bed);
}

/// Whoever dies while the target takes pages from the source's RAM: it is as between two hosts.
#[test]
fn deaths_within_the_host() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let hold_at = |kind| {
        let attempt = bed.attempt_near(&["--live"], at(kind));
        held(&attempt);
        let passed = attempt.proxy.passed();
        let is_pages = |frame: &FrameName| frame.kind == Kind::Pages;
        assert!(!passed.iter().any(is_pages), "pages came by the proxy");
        attempt
    };
    for kind in [Kind::Paused, Kind::Ready] {
        println!("the target's QEMU, {kind:?}");
        let attempt = hold_at(kind);
        attempt.target.kill().unwrap();
        attempt.proxy.release();
        let tried = attempt.end();
        tried.assert_kept(&bed, 1);
        let shared = tried.migrate.json()["pages_shared"].as_u64();
        assert!(shared.is_some_and(|pages| pages > 0), "{:?}", tried.migrate);
    }
    for kind in [Kind::RoundDone, Kind::Ready] {
        println!("ferry receive, {kind:?}");
        let attempt = hold_at(kind);
        attempt.receive.signal(Signal::SIGKILL).unwrap();
        attempt.proxy.cut(Reach::Gone);
        let tried = attempt.end();
        assert_told(&tried.migrate, 1, "kept", "the link to the peer was lost");
        bed.assert_kept();
    }
    println!("ferry migrate");
    let attempt = hold_at(Kind::RoundDone);
    attempt.migrate.signal(Signal::SIGKILL).unwrap();
    attempt.proxy.cut(Reach::Gone);
    let tried = attempt.end();
    bed.assert_runs();
    tried.target.wait_for_end(BOUND).unwrap();
    assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 1);
    println!("the source's QEMU");
    let attempt = hold_at(Kind::Paused);
    bed.source.kill().unwrap();
    attempt.proxy.release();
    let tried = attempt.end();
    assert_told(&tried.migrate, 1, "kept", "the guest is gone");
    tried.target.wait_for_end(BOUND).unwrap();
    assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 1);
}

fn record(journal: &Path) -> Option<Record> {
    let name = journal.file_stem().unwrap().to_str().unwrap();
    let journal = Journal::open(journal.parent().unwrap(), name, SessionId([0; 16]), "");
    journal.unwrap().last().map(|entry| entry.record)
}

#[test]
fn the_targets_tmpfs_is_full() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let target = bed.machine.clone().backing(Backing::Limited { mib: 8 });
    let target = target.incoming().start().unwrap();
    let tried = bed.attempt_to(target, &["--live"], |_, _| Deed::Pass).end();
    tried.assert_kept(&bed, 1);
    assert_told(&tried.migrate, 1, "kept", "no room for RAM region");
    assert_told(&tried.migrate, 1, "kept", "No space left on device");
    assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 1);
}

/// Ctrl-C before Go: the guest goes on at the source.
#[test]
fn cancelled() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    for kind in [Kind::Pages, Kind::Ready] {
        let attempt = bed.attempt(&["--live"], at(kind));
        held(&attempt);
        attempt.migrate.signal(Signal::SIGINT).unwrap();
        wait_until("the guest is put back", BOUND, || {
            let is_back = bed.source.run_state().unwrap() == "running" && !is_watched(&bed.source);
            is_back.then_some(())
        })
        .unwrap();
        attempt.proxy.release();
        let tried = attempt.end();
        assert_told(&tried.migrate, 1, "kept", "cancelled");
        tried.assert_kept(&bed, 1);
        let received = tried.receive.wait(BOUND).unwrap();
        assert_told(&received, 1, "kept", "cancelled");
    }
}
