//! Attaching, and what is refused before anything is changed.
#![cfg(feature = "qemu")]

mod qemu_support;

use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;
use std::{io, thread};

use ferry_engine::qemu::{Options, Problem, ProblemCode, Qemu, Side};
use ferry_engine::vmm::{PauseFor, VmmError};
use qemu_support::{Kept, Machine, NEW, RamPath, VERSIONS, raw_disk, runtime, until};
use serde_json::json;
use tokio::runtime::Runtime;

fn problems(runtime: &Runtime, machine: &Machine, side: Side) -> Vec<Problem> {
    let qemu = machine.attach(runtime);
    runtime.block_on(qemu.problems(side)).unwrap()
}

/// Starts QEMU with `arguments`, and expects exactly the problems that contain these words.
fn refuses(version: &str, arguments: &[&str], expected: &[(ProblemCode, &str)]) {
    let runtime = runtime();
    let machine = Machine::start_bare(version, &[&["-S"], arguments].concat());
    expects(&problems(&runtime, &machine, Side::Source), expected);
}

fn expects(found: &[Problem], expected: &[(ProblemCode, &str)]) {
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (problem, (code, words)) in found.iter().zip(expected) {
        assert_eq!(problem.code, *code, "{problem}");
        assert!(
            problem.found.contains(words),
            "{words:?} is not in {problem}"
        );
        assert!(!problem.remedy.is_empty(), "{problem}");
    }
}

#[test]
fn an_ordinary_guest_has_no_problem() {
    let runtime = runtime();
    for version in VERSIONS {
        let folder = tempfile::tempdir().unwrap();
        let image = raw_disk(folder.path(), 1);
        let drive = format!("if=virtio,format=raw,file={}", image.display());
        let devices = [
            "-drive",
            &drive,
            "-device",
            "virtio-rng-pci",
            "-device",
            "qemu-xhci",
            "-device",
            "usb-tablet",
            "-device",
            "VGA",
            "-netdev",
            "user,id=n0",
            "-device",
            "virtio-net-pci,netdev=n0,romfile=",
        ];
        let source = Machine::start(version, &devices);
        expects(&problems(&runtime, &source, Side::Source), &[]);
        let target = Machine::start(version, &[&devices[..], &["-incoming", "defer"]].concat());
        expects(&problems(&runtime, &target, Side::Target), &[]);

        let qemu = source.attach(&runtime);
        assert!(qemu.name().starts_with("QEMU "), "{}", qemu.name());
        assert_eq!(qemu.machine(), "pc-q35-7.2");
        assert_eq!(
            qemu.process().pid().as_raw().cast_unsigned(),
            source.process.id()
        );
        let mut vm = qemu.vm(Side::Source).unwrap();
        let began = Instant::now();
        vm.guest.inventory().unwrap();
        println!("inventory: {:?}", began.elapsed());
    }
}

#[test]
fn ram_that_cannot_be_moved_is_refused_by_name() {
    let ram = ProblemCode::Ram;
    for version in VERSIONS {
        refuses(
            version,
            &["-m", "64M"],
            &[(ram, "pc.ram is a memory-backend-ram")],
        );
        let file = ["-m", "64M", "-mem-path", "/dev/shm"];
        refuses(
            version,
            &file,
            &[(ram, "pc.ram is a memory-backend-file without share=on")],
        );
        let memfd = [
            "-m",
            "64M",
            "-object",
            "memory-backend-memfd,id=mem,size=64M,share=on",
            "-machine",
            "q35,memory-backend=mem",
        ];
        refuses(version, &memfd, &[(ram, "mem is a memory-backend-memfd")]);
        let path = RamPath::new();
        let good = path.backend("good", 64);
        let bad = "memory-backend-ram,id=bad,size=64M,share=on";
        let nodes = [
            "-m",
            "128M",
            "-object",
            &good,
            "-object",
            bad,
            "-numa",
            "node,memdev=good",
            "-numa",
            "node,memdev=bad",
        ];
        refuses(version, &nodes, &[(ram, "bad is a memory-backend-ram")]);
    }
}

#[test]
fn a_vm_is_not_made_of_ram_that_cannot_be_moved() {
    let runtime = runtime();
    let machine = Machine::start_bare(NEW, &["-S", "-m", "64M"]);
    let refused = machine
        .attach(&runtime)
        .vm(Side::Source)
        .map(drop)
        .unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("pc.ram") && text.contains("share=on"),
        "{text}"
    );
}

#[test]
fn memory_used_in_other_ways_is_refused() {
    let runtime = runtime();
    for version in VERSIONS {
        let files = [RamPath::new(), RamPath::new()];
        let (main, extra) = (files[0].backend("main", 64), files[1].backend("extra", 128));
        let base = [
            "-object",
            &main,
            "-object",
            &extra,
            "-m",
            "64M,slots=2,maxmem=1G",
        ];
        let plain = "pc-q35-7.2,memory-backend=main";
        let nvdimm = "pc-q35-7.2,memory-backend=main,nvdimm=on";
        for (machine, device) in [
            (plain, "ivshmem-plain"),
            (nvdimm, "nvdimm"),
            (plain, "virtio-pmem-pci"),
            (plain, "virtio-mem-pci"),
        ] {
            let odd = format!("{device},id=odd,memdev=extra");
            let arguments = [&base[..], &["-machine", machine, "-device", &odd]].concat();
            let machine = Machine::start_bare(version, &arguments);
            let found = problems(&runtime, &machine, Side::Source);
            let named = format!("odd is a {device}");
            let is_it = |problem: &&Problem| {
                problem.code == ProblemCode::Device && problem.found.contains(&named)
            };
            assert_eq!(found.iter().filter(is_it).count(), 1, "{found:#?}");
            let blocked = machine.operator(&runtime).ask("query-migrate")["blocked-reasons"].take();
            let told = found
                .iter()
                .filter(|problem| problem.code == ProblemCode::Blocked);
            assert_eq!(
                told.count(),
                blocked.as_array().map_or(0, Vec::len),
                "{found:#?}"
            );
        }
    }
}

/// Devices and disks that write guest RAM unseen, all told together and with what QEMU says itself.
#[test]
fn all_problems_are_told_together() {
    let runtime = runtime();
    for version in VERSIONS {
        let folder = tempfile::tempdir().unwrap();
        let image = raw_disk(folder.path(), 1);
        let drive = format!("if=virtio,format=raw,cache=none,file={}", image.display());
        let shared = format!(
            "local,id=fs0,path={},security_model=none",
            folder.path().display()
        );
        let machine = Machine::start_bare(
            version,
            &[
                "-m",
                "64M",
                "-drive",
                &drive,
                "-fsdev",
                &shared,
                "-device",
                "virtio-9p-pci,fsdev=fs0,mount_tag=t,id=share",
                "-incoming",
                "defer",
            ],
        );
        expects(
            &problems(&runtime, &machine, Side::Source),
            &[
                (ProblemCode::Ram, "pc.ram"),
                (ProblemCode::RunState, "inmigrate"),
                (ProblemCode::Device, "share is a virtio-9p-pci"),
                (ProblemCode::Disk, "uses O_DIRECT"),
            ],
        );
    }
}

#[test]
fn a_run_state_to_begin_with_is_needed() {
    let runtime = runtime();
    for version in VERSIONS {
        let machine = Machine::start(version, &[]);
        let found = problems(&runtime, &machine, Side::Target);
        expects(&found, &[(ProblemCode::RunState, "running")]);
        let mut vm = machine.vm(&runtime, Side::Source);
        vm.state.open(Kept::default().sink()).unwrap();
        vm.guest.pause(PauseFor::Switchover).unwrap();
        vm.state.save().unwrap();
        vm.state.abandon().unwrap();
        vm.guest.restore().unwrap();
        drop(vm);
        let found = problems(&runtime, &machine, Side::Source);
        expects(&found, &[(ProblemCode::RunState, "postmigrate")]);
        assert!(found[0].remedy.contains("cont"));
    }
}

#[test]
fn a_socket_without_a_process_is_refused() {
    let runtime = runtime();
    // The port is free once the listener is dropped.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let server = format!("tcp:127.0.0.1:{port},server=on,wait=off");
    let _machine = Machine::start(NEW, &["-qmp", &server]);
    let address = format!("tcp:127.0.0.1:{port}").parse().unwrap();
    let refused = until("QEMU listens", || {
        match runtime.block_on(Qemu::attach(&address, &Options::default())) {
            Err(VmmError::Failed { .. }) => None,
            other => Some(other.map(drop)),
        }
    });
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("Unix socket"), "{text}");
}

/// Passes bytes on between one client and the socket at `to`.
fn proxy(listener: UnixListener, to: PathBuf) {
    thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let server = UnixStream::connect(to).unwrap();
        for (mut from, mut to) in [
            (client.try_clone().unwrap(), server.try_clone().unwrap()),
            (server, client),
        ] {
            thread::spawn(move || io::copy(&mut from, &mut to));
        }
    });
}

#[test]
fn a_socket_that_is_not_qemus_own_is_told() {
    let runtime = runtime();
    let machine = Machine::start(NEW, &[]);
    let folder = tempfile::tempdir().unwrap();
    let attach = |name: &str, pid: Option<i32>| {
        let path = folder.path().join(name);
        let qmp = machine
            .folder
            .path()
            .join(if pid.is_some() { "qmp" } else { "other" });
        proxy(UnixListener::bind(&path).unwrap(), qmp);
        let options = Options {
            pid,
            ..Options::default()
        };
        runtime.block_on(Qemu::attach(&ferry_qmp::Address::Unix(path), &options))
    };
    let refused = attach("first", None).map(drop).unwrap_err().to_string();
    assert!(
        refused.contains("is not the QEMU that answers"),
        "{refused}"
    );
    let pid = Some(machine.process.id().cast_signed());
    let qemu = attach("second", pid).unwrap();
    assert_eq!(Some(qemu.process().pid().as_raw()), pid);
}

#[test]
fn what_is_no_qemu_is_refused() {
    let runtime = runtime();
    let machine = Machine::start(NEW, &[]);
    let mut wrong = machine.folder.path().to_owned();
    wrong.push("nothing");
    let attach = |path| {
        let address = ferry_qmp::Address::Unix(path);
        runtime
            .block_on(Qemu::attach(&address, &Options::default()))
            .map(drop)
    };
    let refused = attach(wrong).unwrap_err();
    assert!(matches!(refused, VmmError::Failed { .. }), "{refused:?}");
    let state = json!(machine.operator(&runtime).status());
    assert_eq!(state, "running");
}
