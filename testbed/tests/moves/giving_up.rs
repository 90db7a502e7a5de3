//! Ctrl-C and a polite kill, in every phase: the guest goes on at the source as if nothing had been,
//! and can be moved again.

use std::net::TcpListener;

use ferry_testbed::{Ferry, Linux, Machine, QemuVersion, Turn};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::pair::{BOUND, Pair, SLOW, small};

/// The next attempt, after one that was given up, succeeds.
fn moves_again(pair: Pair, machine: &Machine) {
    pair.again(machine).move_live();
}

#[test]
fn before_the_target_has_answered() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    // Takes the connection and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("ferry://{}", silent.local_addr().unwrap());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let migrate = Ferry::migrate(&pair.source, &uri, &["--live"]).unwrap();
        let _connection = silent.accept().unwrap();
        migrate.signal(signal).unwrap();
        let ended = migrate.wait(BOUND).unwrap();
        assert_eq!(ended.code(), 1, "{ended:?}");
        assert_eq!(ended.json()["reason"], "cancelled");
    }
    moves_again(pair, &machine);
}

#[test]
fn in_the_first_round() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V7_2);
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&["--live", SLOW]);
    under_way.wait_for_pages();
    under_way.interrupt(Signal::SIGINT);
    under_way.kept("cancelled", "running");
    moves_again(pair, &machine);
}

#[test]
fn in_a_later_round() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(32).writing_pages_per_s(5000);
    let machine = Machine::new(QemuVersion::V10_0, 256).linux(linux);
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&["--live", "--bandwidth", "32", "--max-downtime", "1"]);
    under_way.wait_for_percent(99);
    under_way.interrupt(Signal::SIGTERM);
    under_way.kept("cancelled", "running");
    moves_again(pair, &machine);
}

#[test]
fn while_the_guest_stands_for_the_copy() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&[SLOW]);
    under_way.wait_for_pages();
    assert_eq!(pair.source.run_state().unwrap(), "paused");
    under_way.interrupt(Signal::SIGINT);
    under_way.kept("cancelled", "running");
    moves_again(pair, &machine);
}

/// The last moment before the guest would be given away: everything is sent and the state is saved,
/// but the target's QEMU, held still, does not load.
#[test]
fn while_the_target_loads() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let machine = small(version);
        let pair = Pair::boot(&machine);
        let under_way = pair.begin(&["--live", SLOW]);
        // Room is made while the target's QEMU gets ready, which it must have done before it is held.
        under_way.wait_for_percent(1);
        let target = Pid::from_raw(pair.target.pid().try_into().unwrap());
        kill(target, Signal::SIGSTOP).unwrap();
        pair.source
            .wait_for_run_state("postmigrate", BOUND)
            .unwrap();
        under_way.interrupt(Signal::SIGINT);
        pair.source.wait_for_run_state("running", BOUND).unwrap();
        kill(target, Signal::SIGCONT).unwrap();
        under_way.kept("cancelled", "running");
        moves_again(pair, &machine);
    }
}

#[test]
fn at_the_target() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0);
    let pair = Pair::boot(&machine);
    let under_way = pair.begin(&["--live", SLOW]);
    under_way.wait_for_pages();
    under_way.receive.signal(Signal::SIGINT).unwrap();
    under_way.kept("the peer gave up (Cancelled)", "running");
    moves_again(pair, &machine);
}

/// Nobody has come, and nothing was changed: its QEMU can wait on.
#[test]
fn at_a_target_that_still_waits() {
    let _turn = Turn::take().unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let target = small(QemuVersion::V10_0).incoming().start().unwrap();
        let (receive, _) = Ferry::receive(&target, &["--json"]).unwrap();
        receive.signal(signal).unwrap();
        let ended = receive.wait(BOUND).unwrap();
        assert_eq!(ended.code(), 1, "{ended:?}");
        assert_eq!(target.run_state().unwrap(), "inmigrate");
    }
}
