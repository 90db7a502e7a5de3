//! Pausing, saving, loading: one QEMU's state, and from one QEMU into another.
#![cfg(feature = "qemu")]

mod qemu_support;

use std::fs::{self, Permissions};
use std::io::{self, Cursor, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use ferry_engine::qemu::{Options, Qemu, Side};
use ferry_engine::vmm::{PauseFor, RunState, Vm, VmmError};
use qemu_support::{Kept, Machine, NEW, OLD, VERSIONS, copy_ram, raw_disk, runtime, until, watch};
use serde_json::json;
use tokio::runtime::Runtime;

const DEVICES: [&str; 4] = ["-device", "VGA", "-device", "virtio-rng-pci"];

/// A disk that QEMU locks.
fn drive(folder: &Path) -> String {
    let image = raw_disk(folder, 1);
    format!("if=virtio,format=raw,file={}", image.display())
}

/// Moves a guest by hand, and says how the blackout's steps went.
fn moves(source: &str, target: &str, target_arguments: &[&str]) {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let drive = drive(folder.path());
    let devices = [&DEVICES[..], &["-drive", &drive]].concat();
    let source = Machine::start(source, &devices);
    let waiting = [&devices, target_arguments, &["-incoming", "defer"]].concat();
    let target = Machine::start(target, &waiting);
    let mut from = source.vm(&runtime, Side::Source);
    let mut to = target.vm(&runtime, Side::Target);
    let events = watch(&mut from);
    let target_events = watch(&mut to);
    assert_eq!(from.guest.run_state().unwrap(), RunState::Running);

    to.state.prepare().unwrap();
    let kept = Kept::default();
    from.state.open(kept.sink()).unwrap();
    from.guest.flusher()().unwrap();
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

/// QEMUs that see another file system, run as another user and in a sandbox.
#[test]
fn state_moves_between_confined_qemus() {
    let runtime = runtime();
    for version in VERSIONS {
        let jail = tempfile::tempdir().unwrap();
        let open_to_all = Permissions::from_mode(0o777);
        fs::set_permissions(jail.path(), open_to_all.clone()).unwrap();
        fs::create_dir(jail.path().join("tmp")).unwrap();
        fs::set_permissions(jail.path().join("tmp"), open_to_all).unwrap();
        let root = jail.path().display();
        let chroot = format!("chroot={root},user=nobody");
        let root = root.to_string();
        let as_nobody = match version {
            OLD => vec!["-chroot", &root, "-runas", "nobody"],
            _ => vec!["-run-with", &chroot],
        };
        // elevateprivileges=deny would forbid the change of user.
        let sandbox = [
            "-sandbox",
            "on,obsolete=deny,spawn=deny,resourcecontrol=deny",
        ];
        let confined = [&as_nobody[..], &sandbox].concat();
        let source = Machine::start(version, &confined);
        let target = Machine::start(version, &[&confined[..], &["-incoming", "defer"]].concat());
        let attach = |machine: &Machine, side| {
            let options = Options::default();
            let attached = runtime.block_on(Qemu::attach(&machine.address(), &options));
            attached.unwrap().vm(side).unwrap()
        };
        let mut from = attach(&source, Side::Source);
        let mut to = attach(&target, Side::Target);
        to.state.prepare().unwrap();
        let kept = Kept::default();
        from.state.open(kept.sink()).unwrap();
        from.guest.pause(PauseFor::Switchover).unwrap();
        from.state.save().unwrap();
        copy_ram(&from, &to);
        to.state.load(&mut Cursor::new(kept.bytes())).unwrap();
        to.guest.resume().unwrap();
        let left = fs::read_dir(jail.path().join("tmp")).unwrap();
        assert_eq!(left.count(), 0);
    }
}

/// Up to Go the source can resume, and then the target cannot: the images' locks are a second fence.
#[test]
fn the_source_can_resume_after_the_target_has_loaded() {
    let runtime = runtime();
    for version in VERSIONS {
        let folder = tempfile::tempdir().unwrap();
        let drive = drive(folder.path());
        let source = Machine::start(version, &["-drive", &drive]);
        let target = Machine::start(version, &["-drive", &drive, "-incoming", "defer"]);
        let mut from = source.vm(&runtime, Side::Source);
        let mut to = target.vm(&runtime, Side::Target);
        to.state.prepare().unwrap();
        let kept = Kept::default();
        from.state.open(kept.sink()).unwrap();
        from.guest.pause(PauseFor::Switchover).unwrap();
        from.state.save().unwrap();
        copy_ram(&from, &to);
        to.state.load(&mut Cursor::new(kept.bytes())).unwrap();

        from.state.abandon().unwrap();
        from.guest.resume().unwrap();
        assert_eq!(from.guest.run_state().unwrap(), RunState::Running);
        let error = to.guest.resume().unwrap_err();
        assert!(matches!(error, VmmError::Failed { .. }), "{error:?}");
        assert_eq!(to.guest.run_state().unwrap(), RunState::Paused);
        to.guest.quit().unwrap();
    }
}

/// Where a move is called off.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Opened,
    Paused,
    PausedForCopy,
    Saved,
}

const STAGES: [Stage; 4] = [
    Stage::Opened,
    Stage::Paused,
    Stage::PausedForCopy,
    Stage::Saved,
];

fn reach(stage: Stage, vm: &mut Vm) {
    let kept = Kept::default();
    vm.state.open(kept.sink()).unwrap();
    if stage == Stage::PausedForCopy {
        vm.guest.pause(PauseFor::Copy).unwrap();
    }
    if stage != Stage::Opened {
        let stopped = vm.guest.pause(PauseFor::Switchover).unwrap();
        assert_eq!(vm.guest.pause(PauseFor::Switchover).unwrap(), stopped);
        assert_eq!(vm.guest.run_state().unwrap(), RunState::Paused);
    }
    if stage == Stage::Saved {
        vm.state.save().unwrap();
    }
}

/// A move that is called off leaves a guest, running or paused, and its QEMU as they were.
#[test]
fn calling_off_leaves_everything_as_it_was() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &DEVICES);
        let operator = machine.operator(&runtime);
        let parameters = json!({"max-bandwidth": 5_000_000, "downtime-limit": 123});
        operator.run("migrate-set-parameters", parameters);
        let capability = json!([{"capability": "multifd", "state": true}]);
        operator.run(
            "migrate-set-capabilities",
            json!({ "capabilities": capability }),
        );
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        let settings = operator.settings();
        let descriptors = machine.descriptors();
        for stage in STAGES {
            reach(stage, &mut vm);
            vm.state.abandon().unwrap();
            vm.state.abandon().unwrap();
            vm.guest.resume().unwrap();
            vm.guest.restore().unwrap();
            vm.guest.restore().unwrap();
            assert_eq!(operator.status(), "running", "{version} {stage:?}");
            assert_eq!(operator.settings(), settings, "{version} {stage:?}");
            assert_eq!(
                events.try_iter().collect::<Vec<_>>(),
                [],
                "{version} {stage:?}"
            );
            until("QEMU has closed the socket", || {
                (machine.descriptors() == descriptors).then_some(())
            });
        }
        let leftovers = fs::read_dir(machine.folder.path()).unwrap();
        assert_eq!(leftovers.count(), 2, "the two monitors and nothing else");
    }
}

#[test]
fn a_guest_that_was_paused_stays_paused() {
    let runtime = runtime();
    for version in VERSIONS {
        for stage in STAGES {
            let machine = Machine::start(version, &[&DEVICES[..], &["-S"]].concat());
            let mut vm = machine.vm(&runtime, Side::Source);
            let events = watch(&mut vm);
            reach(stage, &mut vm);
            vm.state.abandon().unwrap();
            vm.guest.restore().unwrap();
            assert_eq!(vm.guest.run_state().unwrap(), RunState::Paused);
            assert_eq!(events.try_iter().collect::<Vec<_>>(), []);
        }
    }
}

/// Nothing that must be held back is in the sink before `save`.
#[test]
fn the_device_state_comes_with_save() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &DEVICES);
        let mut vm = machine.vm(&runtime, Side::Source);
        let kept = Kept::default();
        vm.state.open(kept.sink()).unwrap();
        vm.guest.pause(PauseFor::Switchover).unwrap();
        let is_there = |name: &[u8]| kept.bytes().windows(name.len()).any(|part| part == name);
        assert!(!is_there(b"cpu_common"));
        vm.state.save().unwrap();
        assert!(is_there(b"cpu_common"));
    }
}

/// A sink that fails after some bytes, as a lost link does.
struct Failing(usize);

impl Write for Failing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self
            .0
            .checked_sub(bytes.len())
            .ok_or(io::ErrorKind::ConnectionReset)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_that_fails_leaves_the_guest_running() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &DEVICES);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        // Not a byte; some early bytes; all early bytes and a part of the device state.
        for room in [0, 100_000, 400_000] {
            vm.state.open(Box::new(Failing(room))).unwrap();
            let outcome = vm
                .guest
                .pause(PauseFor::Switchover)
                .and_then(|_| vm.state.save());
            let error = outcome.unwrap_err();
            assert!(error.to_string().contains("pass on"), "{room}: {error:?}");
            vm.state.abandon().unwrap();
            vm.guest.resume().unwrap();
            assert_eq!(vm.guest.run_state().unwrap(), RunState::Running);
        }
        assert_eq!(events.try_iter().collect::<Vec<_>>(), []);
    }
}

fn saved_state(runtime: &Runtime, version: &str) -> Vec<u8> {
    let machine = Machine::start(version, &DEVICES);
    let mut vm = machine.vm(runtime, Side::Source);
    let kept = Kept::default();
    vm.state.open(kept.sink()).unwrap();
    vm.guest.pause(PauseFor::Switchover).unwrap();
    vm.state.save().unwrap();
    kept.bytes()
}

#[test]
fn a_load_that_fails_is_told_in_qemus_words() {
    let runtime = runtime();
    for version in VERSIONS {
        let state = saved_state(&runtime, version);
        let arguments = [&DEVICES[..], &["-incoming", "defer"]].concat();
        let target = Machine::start_as(version, "pc-q35-7.1", &arguments);
        let mut vm = target.vm(&runtime, Side::Target);
        vm.state.prepare().unwrap();
        match vm.state.load(&mut Cursor::new(state)).unwrap_err() {
            VmmError::Failed { source, .. } if version == NEW => {
                assert!(
                    source.to_string().contains("load of migration failed"),
                    "{source}"
                );
            }
            // 7.2 ends, and tells why in its log alone.
            VmmError::Gone { what } if version == OLD => {
                assert!(what.contains("could not load"), "{what}");
            }
            other => panic!("{version}: {other:?}"),
        }
        vm.guest.quit().unwrap();
    }
}

#[test]
fn a_state_that_does_not_arrive_whole_is_an_error() {
    let runtime = runtime();
    for version in VERSIONS {
        let mut state = saved_state(&runtime, version);
        state.truncate(state.len() / 2);
        let arguments = [&DEVICES[..], &["-incoming", "defer"]].concat();
        let target = Machine::start(version, &arguments);
        let mut vm = target.vm(&runtime, Side::Target);
        vm.state.prepare().unwrap();
        let mut cut = Cursor::new(state).chain(Broken);
        let error = vm.state.load(&mut cut).unwrap_err();
        assert!(
            error.to_string().contains("did not arrive whole"),
            "{error:?}"
        );
        vm.guest.quit().unwrap();
    }
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

#[test]
fn only_a_waiting_qemu_can_be_a_target() {
    let runtime = runtime();
    let machine = Machine::start(NEW, &[]);
    let mut vm = machine.vm(&runtime, Side::Target);
    let error = vm.state.prepare().unwrap_err();
    assert!(error.to_string().contains("-incoming defer"), "{error}");
    vm.guest.restore().unwrap();
    assert_eq!(vm.guest.run_state().unwrap(), RunState::Running);
}

#[test]
fn a_qemu_that_dies_is_seen_at_once() {
    let runtime = runtime();
    for version in VERSIONS {
        let mut machine = Machine::start(version, &DEVICES);
        let mut vm = machine.vm(&runtime, Side::Source);
        vm.state.open(Kept::default().sink()).unwrap();
        vm.guest.pause(PauseFor::Switchover).unwrap();
        machine.process.kill().unwrap();
        machine.process.wait().unwrap();
        let error = vm.state.save().unwrap_err();
        assert!(matches!(error, VmmError::Gone { .. }), "{error:?}");
        vm.guest.quit().unwrap();
    }
}

#[test]
fn quit_ends_the_process() {
    let runtime = runtime();
    for version in VERSIONS {
        let mut machine = Machine::start(version, &[]);
        let mut vm = machine.vm(&runtime, Side::Source);
        let events = watch(&mut vm);
        vm.guest.quit().unwrap();
        assert!(
            machine
                .process
                .try_wait()
                .unwrap()
                .is_some_and(|status| status.success())
        );
        vm.guest.quit().unwrap();
        drop(vm);
        assert_eq!(events.iter().collect::<Vec<_>>(), []);
    }
}

/// A QEMU that does not answer is killed: it is not told to quit while it owns a guest.
#[test]
fn quit_ends_a_process_that_hangs() {
    let runtime = runtime();
    let mut machine = Machine::start(NEW, &[]);
    let mut vm = machine.vm(&runtime, Side::Source);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(machine.process.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    vm.guest.quit().unwrap();
    assert!(machine.process.try_wait().unwrap().is_some());
}
