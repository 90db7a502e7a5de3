//! What happens to a guest without the engine's doing.
#![cfg(feature = "qemu")]

mod qemu_support;

use std::sync::mpsc::Receiver;

use ferry_engine::qemu::Side;
use ferry_engine::vmm::{GuestEvent, PauseFor, RunState};
use qemu_support::{Kept, Machine, PATIENCE, VERSIONS, raw_disk, runtime, until, watch};
use serde_json::json;

fn next(events: &Receiver<GuestEvent>) -> GuestEvent {
    events.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn foreign_pause_and_resume_are_told() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &[]);
        let operator = machine.operator(&runtime);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        operator.ask("stop");
        assert_eq!(next(&events), GuestEvent::ForeignPause);
        assert_eq!(vm.guest.run_state().unwrap(), RunState::Paused);
        operator.ask("cont");
        assert_eq!(next(&events), GuestEvent::ForeignResume);
        // Our own are not, and do not hide the next foreign one.
        vm.guest.pause(PauseFor::Copy).unwrap();
        vm.guest.pause(PauseFor::Copy).unwrap();
        vm.guest.resume().unwrap();
        vm.guest.resume().unwrap();
        operator.ask("stop");
        assert_eq!(next(&events), GuestEvent::ForeignPause);
        vm.guest.pause(PauseFor::Copy).unwrap();
        operator.ask("cont");
        assert_eq!(next(&events), GuestEvent::ForeignResume);
        assert_eq!(events.try_iter().collect::<Vec<_>>(), []);
    }
}

/// While QEMU switches over nobody else can resume; once the state is saved, an operator can, and
/// that is told.
#[test]
fn a_foreign_resume_after_the_save_is_told() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &[]);
        let operator = machine.operator(&runtime);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        vm.state.open(Kept::default().sink()).unwrap();
        vm.guest.pause(PauseFor::Switchover).unwrap();
        operator.try_run("cont", json!(null)).unwrap_err();
        vm.state.save().unwrap();
        until("the migration is finalised", || {
            operator.try_run("cont", json!(null)).ok()
        });
        assert_eq!(next(&events), GuestEvent::ForeignResume);
    }
}

#[test]
fn reset_and_shutdown_are_told() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &["-no-shutdown"]);
        let operator = machine.operator(&runtime);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        operator.ask("system_reset");
        assert_eq!(next(&events), GuestEvent::Reset);
        operator.ask("quit");
        assert_eq!(next(&events), GuestEvent::ShutDown);
        assert!(matches!(next(&events), GuestEvent::Gone { .. }));
    }
}

#[test]
fn a_panic_is_told_once() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &["-device", "pvpanic", "-action", "panic=pause"]);
        let operator = machine.operator(&runtime);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        operator.human("o /b 0x505 1");
        assert_eq!(next(&events), GuestEvent::Panicked);
        until("QEMU has paused the guest", || {
            (vm.guest.run_state().unwrap() == RunState::Paused).then_some(())
        });
        assert_eq!(events.try_iter().collect::<Vec<_>>(), []);
    }
}

/// A disk that fails on its first read, which is that of its boot sector.
#[test]
fn a_pause_by_an_io_error_is_told_with_its_device() {
    let runtime = runtime();
    for version in VERSIONS {
        let folder = tempfile::tempdir().unwrap();
        let image = raw_disk(folder.path(), 1);
        let rules = folder.path().join("rules");
        std::fs::write(
            &rules,
            "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\n",
        )
        .unwrap();
        let drive = format!(
            "if=none,id=bad,rerror=stop,format=raw,file=blkdebug:{}:{}",
            rules.display(),
            image.display()
        );
        let arguments = [
            "-S",
            "-drive",
            &drive,
            "-device",
            "virtio-blk-pci,drive=bad",
        ];
        let machine = Machine::start(version, &arguments);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        vm.guest.resume().unwrap();
        let device = "bad".to_owned();
        assert_eq!(next(&events), GuestEvent::IoErrorPause { device });
        until("QEMU has paused the guest", || {
            (vm.guest.run_state().unwrap() == RunState::Paused).then_some(())
        });
        let more: Vec<_> = events.try_iter().collect();
        assert!(!more.contains(&GuestEvent::ForeignPause), "{more:?}");
    }
}

#[test]
fn the_end_of_qemu_is_told() {
    let runtime = runtime();
    for version in VERSIONS {
        let mut machine = Machine::start(version, &[]);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        machine.process.kill().unwrap();
        assert!(matches!(next(&events), GuestEvent::Gone { .. }));
        let late = watch(&mut vm);
        assert!(matches!(next(&late), GuestEvent::Gone { .. }));
    }
}
