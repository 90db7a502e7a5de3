//! Pausing, saving, loading: one QEMU's state, and from one QEMU into another.
#![cfg(feature = "qemu")]

mod qemu_support;

use std::io::Cursor;
use std::time::Instant;

use ferry_engine::qemu::Side;
use ferry_engine::vmm::{PauseFor, RunState};
use qemu_support::{Kept, Machine, NEW, OLD, VERSIONS, copy_ram, runtime, watch};

const DEVICES: [&str; 4] = ["-device", "VGA", "-device", "virtio-rng-pci"];

/// Moves a guest by hand, and says how the blackout's steps went.
fn moves(source: &str, target: &str, target_arguments: &[&str]) {
    let runtime = runtime();
    let source = Machine::start(source, &DEVICES);
    let target = Machine::start(
        target,
        &[&DEVICES, target_arguments, &["-incoming", "defer"]].concat(),
    );
    let mut from = source.vm(&runtime, Side::Source);
    let mut to = target.vm(&runtime, Side::Target);
    let events = watch(&mut from);
    let target_events = watch(&mut to);
    assert_eq!(from.guest.run_state().unwrap(), RunState::Running);

    to.state.prepare().unwrap();
    let kept = Kept::default();
    from.state.open(kept.sink()).unwrap();
    let stopped = from.guest.pause(PauseFor::Switchover).unwrap();
    let paused = Instant::now();
    from.state.save().unwrap();
    let saved = Instant::now();
    assert!(kept.is_dropped());
    copy_ram(&from, &to);
    let registers = source.operator(&runtime).human("info registers");

    let copied = Instant::now();
    to.state.load(&mut Cursor::new(kept.bytes())).unwrap();
    let loaded = Instant::now();
    assert_eq!(to.guest.run_state().unwrap(), RunState::Paused);
    let operator = target.operator(&runtime);
    assert_eq!(operator.human("info registers"), registers);
    let asked = Instant::now();
    to.guest.resume().unwrap();
    let resumed = Instant::now();
    assert_eq!(to.guest.run_state().unwrap(), RunState::Running);
    println!(
        "STOP to pre-switchover {:?}, save {:?}, load {:?}, cont {:?}",
        paused - stopped.at,
        saved - paused,
        loaded - copied,
        resumed - asked
    );

    assert_eq!(from.guest.run_state().unwrap(), RunState::Paused);
    from.guest.quit().unwrap();
    assert_eq!(events.try_iter().collect::<Vec<_>>(), []);
    assert_eq!(target_events.try_iter().collect::<Vec<_>>(), []);
}

#[test]
fn state_moves_between_two_qemus() {
    for version in VERSIONS {
        for target_arguments in [&[][..], &["-S"]] {
            moves(version, version, target_arguments);
        }
    }
}

#[test]
fn state_moves_between_versions() {
    moves(OLD, NEW, &[]);
    moves(NEW, OLD, &[]);
}
