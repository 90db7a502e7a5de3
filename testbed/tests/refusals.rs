//! What the command refuses before it has changed anything: each time the words that a user needs,
//! exit code 2, and with `--json` one object that says the same.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use ferry_testbed::{
    Backing, Disk, DiskFormat, Ferry, Machine, Qemu, QemuVersion, Turn, ferry_binary,
};
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(60);

/// A target that nobody reaches: no refusal may depend on it.
const NOWHERE: &str = "ferry://127.0.0.1:9";

/// Runs `ferry` with a folder for journals of its own, and expects a refusal with these words.
fn refuses(args: &[&OsStr], words: &[&str]) -> Value {
    let state = tempfile::tempdir().unwrap();
    let output = Command::new(ferry_binary().unwrap())
        .args(args)
        .env("FERRY_STATE_DIR", state.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stdout}{stderr}");
    for words in words {
        assert!(stderr.contains(words), "{words:?} is not in {stderr:?}");
    }
    assert_eq!(
        std::fs::read_dir(state.path()).unwrap().count(),
        0,
        "a journal is left"
    );
    if !args.contains(&OsStr::new("--json")) {
        assert_eq!(stdout, "");
        return Value::Null;
    }
    // All of standard output is the object.
    let object: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(object["outcome"], "kept", "{object}");
    assert_eq!(object["guest"], "untouched", "{object}");
    assert!(!object["reason"].as_str().unwrap().is_empty(), "{object}");
    object
}

/// The same with and without `--json`.
fn refuses_both_ways(args: &[&str], words: &[&str]) {
    let mut args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
    refuses(&args, words);
    args.push("--json".as_ref());
    let object = refuses(&args, words);
    assert!(
        !object["reason"].as_str().unwrap().contains('\n'),
        "{object}"
    );
}

#[test]
fn usage() {
    let cases: [(&[&str], &str); 14] = [
        (&[], "Usage: ferry"),
        (&["move"], "unrecognized subcommand 'move'"),
        (&["migrate", "--qmp", "/x/qmp"], "<TARGET>"),
        (&["migrate", NOWHERE], "--qmp <SOCKET>"),
        (&["receive"], "--qmp <SOCKET>"),
        (
            &["migrate", "--qmp", "/x/qmp", "tcp://host:1"],
            "a target is written ferry://HOST:PORT",
        ),
        (
            &["migrate", "--qmp", "/x/qmp", "ferry://host"],
            "a target is written ferry://HOST:PORT",
        ),
        (
            &["migrate", "--qmp", "qmp", NOWHERE],
            "use unix:PATH, a path with a slash",
        ),
        (
            &[
                "migrate",
                "--qmp",
                "/x/qmp",
                "--max-downtime",
                "fast",
                NOWHERE,
            ],
            "--max-downtime",
        ),
        (
            &["migrate", "--qmp", "/x/qmp", "--bandwidth", "0", NOWHERE],
            "--bandwidth",
        ),
        (
            &["migrate", "--qmp", "/x/qmp", "--timeout", "-1", NOWHERE],
            "'-1'",
        ),
        (
            &[
                "migrate",
                "--qmp",
                "/x/qmp",
                "--timeout",
                "18446744073709551615",
                NOWHERE,
            ],
            "'18446744073709551615'",
        ),
        (
            &[
                "migrate",
                "--qmp",
                "/x/qmp",
                "--max-downtime",
                "18446744073709551615",
                NOWHERE,
            ],
            "'18446744073709551615'",
        ),
        (&["receive", "--qmp", "/x/qmp", "--live"], "'--live'"),
    ];
    for (args, words) in cases {
        refuses_both_ways(args, &[words]);
    }
    let help = Command::new(ferry_binary().unwrap())
        .arg("--help")
        .output()
        .unwrap();
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("3  in doubt"));
}

#[test]
fn addresses() {
    let migrate = |target| {
        refuses_both_ways(
            &["migrate", "--qmp", "/x/qmp", target],
            &["is not a loopback address", "--insecure"],
        );
    };
    migrate("ferry://192.0.2.1:4444");
    migrate("ferry://[2001:db8::1]:4444");
    refuses_both_ways(
        &["receive", "--qmp", "/x/qmp", "--listen", "0.0.0.0:0"],
        &["is not a loopback address", "--insecure"],
    );
    refuses_both_ways(
        &["receive", "--qmp", "/x/qmp", "--listen", "here"],
        &["here"],
    );
    refuses_both_ways(
        &[
            "migrate",
            "--qmp",
            "/x/qmp",
            "ferry://no-such-host.invalid:1",
        ],
        &["no-such-host.invalid:1"],
    );
}

/// Serves one connection after the other.
fn serve(path: &Path, mut with: impl FnMut(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            with(stream);
        }
    });
}

#[test]
fn sockets_that_are_no_qmp() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let refused = |name: &str, words: &[&str]| {
        let path = at(name);
        let path = path.to_str().unwrap();
        refuses_both_ways(&["migrate", "--qmp", path, NOWHERE], words);
        refuses_both_ways(&["receive", "--qmp", path], words);
    };
    refused(
        "none",
        &["No such file", "-qmp unix:PATH,server=on,wait=off"],
    );
    File::create(at("file")).unwrap();
    refused("file", &["that is no socket"]);
    drop(UnixListener::bind(at("dead")).unwrap());
    refused("dead", &["nobody listens there: has its QEMU ended?"]);
    serve(&at("http"), |mut stream| {
        _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    refused(
        "http",
        &["not a QMP server", "HTTP/1.1 400", "-qmp unix:PATH"],
    );
    serve(&at("closes"), drop);
    refused("closes", &["closed the connection"]);
    let mut silent = Vec::new();
    serve(&at("silent"), move |stream| silent.push(stream));
    // Once: each time takes as long as QEMU may take to greet.
    let path = at("silent");
    let args = [
        "migrate",
        "--json",
        "--qmp",
        path.to_str().unwrap(),
        NOWHERE,
    ];
    let words = ["no QMP greeting", "QEMU serves one at a time"];
    refuses(&args.map(OsStr::new), &words);
}

fn migrate(qemu: &Qemu) -> Vec<OsString> {
    let mut args = vec![OsString::from("migrate"), "--json".into(), "--qmp".into()];
    args.extend([qemu.qmp_path().into(), NOWHERE.into()]);
    args
}

fn receive(qemu: &Qemu) -> Vec<OsString> {
    vec![
        "receive".into(),
        "--json".into(),
        "--qmp".into(),
        qemu.qmp_path().into(),
    ]
}

fn refuses_qemu(args: &[OsString], words: &[&str]) -> Value {
    refuses(&args.iter().map(AsRef::as_ref).collect::<Vec<_>>(), words)
}

fn machine() -> Machine {
    Machine::new(QemuVersion::V10_0, 64).tiny()
}

/// What must be as before after a refusal.
fn state(qemu: &Qemu) -> [Value; 3] {
    [
        "query-status",
        "query-migrate-capabilities",
        "query-migrate-parameters",
    ]
    .map(|command| qemu.execute(command, &json!({})).unwrap())
}

/// Every one of `found` is among the problems that are told, each with a remedy, and nothing is
/// changed.
fn has_problems(qemu: &Qemu, args: &[OsString], found: &[(&str, &str)]) {
    let before = state(qemu);
    let words: Vec<&str> = found.iter().map(|(_, words)| *words).collect();
    let told = refuses_qemu(args, &words);
    let problems = told["problems"].as_array().unwrap();
    for (code, words) in found {
        let is_it = |problem: &&Value| {
            problem["code"] == *code && problem["found"].as_str().unwrap().contains(words)
        };
        let problem = problems.iter().find(is_it);
        let problem = problem.unwrap_or_else(|| panic!("no {code} with {words:?} in {told}"));
        assert!(!problem["remedy"].as_str().unwrap().is_empty(), "{problem}");
    }
    assert_eq!(state(qemu), before);
}

#[test]
fn a_socket_that_another_client_holds() {
    let _turn = Turn::take().unwrap();
    let qemu = machine().start().unwrap();
    let mut client = UnixStream::connect(qemu.qmp_path()).unwrap();
    // Greeted: QEMU serves it, and nobody else.
    client.read_exact(&mut [0; 1]).unwrap();
    refuses_qemu(&migrate(&qemu), &["another client may hold the socket"]);
    drop(client);
    // Now it gets further.
    refuses_qemu(&migrate(&qemu), &["cannot be reached"]);
}

#[test]
fn a_qmp_address_that_tells_no_process() {
    let _turn = Turn::take().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    drop(listener);
    let server = format!("{address},server=on,wait=off");
    let _qemu = machine().arg("-qmp").arg(server).start().unwrap();
    refuses_both_ways(
        &["migrate", "--qmp", &address, NOWHERE],
        &["does not tell which process QEMU is: use its Unix socket"],
    );
}

#[test]
fn a_port_in_use() {
    let _turn = Turn::take().unwrap();
    let qemu = machine().incoming().start().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().to_string();
    let mut args = receive(&qemu);
    args.extend(["--listen".into(), port.clone().into()]);
    refuses_qemu(&args, &["cannot listen on", &port, "in use"]);
    assert_eq!(qemu.run_state().unwrap(), "inmigrate");
}

#[test]
fn qemus_in_the_wrong_state() {
    let _turn = Turn::take().unwrap();
    let running = machine().start().unwrap();
    let words = [("run-state", "QEMU is running")];
    has_problems(&running, &receive(&running), &words);
    let waiting = machine().incoming().start().unwrap();
    let words = [("run-state", "QEMU is inmigrate")];
    has_problems(&waiting, &migrate(&waiting), &words);
}

#[test]
fn ram_that_cannot_be_moved() {
    let _turn = Turn::take().unwrap();
    let remedy = "share=on";
    for version in QemuVersion::ALL {
        let memfd = Machine::new(version, 64)
            .backing(Backing::Memfd)
            .start()
            .unwrap();
        has_problems(
            &memfd,
            &migrate(&memfd),
            &[("ram", "ram0 is a memory-backend-memfd")],
        );
        refuses_qemu(&migrate(&memfd), &[remedy]);
        // Two regions that will not do, and both are told.
        let kinds = [
            "memory-backend-ram,id=a,size=32M",
            "memory-backend-file,id=b,size=32M,mem-path=/dev/shm",
        ];
        let mut odd = Machine::new(version, 64);
        for kind in kinds {
            odd = odd.arg("-object").arg(kind);
        }
        let odd = odd.arg("-m").arg("64M,slots=2,maxmem=1G");
        let odd = odd
            .arg("-device")
            .arg("pc-dimm,memdev=a")
            .arg("-device")
            .arg("pc-dimm,memdev=b");
        let odd = odd.start().unwrap();
        let words = [
            ("ram", "a is a memory-backend-ram"),
            ("ram", "b is a memory-backend-file without share=on"),
        ];
        has_problems(&odd, &migrate(&odd), &words);
        refuses_qemu(&migrate(&odd), &[remedy]);
    }
}

/// Every kind of device that is refused and can be had here, all in one QEMU and told together. A
/// vhost-user device cannot: QEMU waits for its back end before it answers anybody.
#[test]
fn devices_that_cannot_be_moved() {
    let _turn = Turn::take().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::create(DiskFormat::Raw, 4).unwrap();
    let shared = folder.path().display();
    for version in QemuVersion::ALL {
        let extra = |id: &str| {
            format!(
                "memory-backend-file,id={id},size=128M,share=on,mem-path={shared}/{id}-{version}"
            )
        };
        let cached = format!(
            "driver=raw,node-name=direct0,cache.direct=on,file.driver=file,\
             file.filename={},file.locking=off",
            disk.path().display()
        );
        let arguments: [(&str, String); 14] = [
            ("-m", "64M,slots=4,maxmem=2G".into()),
            ("-machine", "nvdimm=on".into()),
            ("-object", extra("ivshmem")),
            ("-device", "ivshmem-plain,id=odd0,memdev=ivshmem".into()),
            ("-object", extra("nvdimm")),
            ("-device", "nvdimm,id=odd1,memdev=nvdimm".into()),
            ("-object", extra("pmem")),
            ("-device", "virtio-pmem-pci,id=odd2,memdev=pmem".into()),
            ("-object", extra("mem")),
            ("-device", "virtio-mem-pci,id=odd3,memdev=mem".into()),
            (
                "-fsdev",
                format!("local,id=fs0,path={shared},security_model=none"),
            ),
            (
                "-device",
                "virtio-9p-pci,id=odd4,fsdev=fs0,mount_tag=t".into(),
            ),
            ("-blockdev", cached),
            ("-device", "virtio-blk-pci,drive=direct0".into()),
        ];
        let mut machine = Machine::new(version, 64);
        for (option, value) in arguments {
            machine = machine.arg(option).arg(value);
        }
        let qemu = machine.start().unwrap();
        let found = [
            ("device", "odd0 is a ivshmem-plain"),
            ("device", "odd1 is a nvdimm"),
            ("device", "odd2 is a virtio-pmem-pci"),
            ("device", "odd3 is a virtio-mem-pci"),
            ("device", "odd4 is a virtio-9p-pci"),
            ("disk", "uses O_DIRECT"),
        ];
        has_problems(&qemu, &migrate(&qemu), &found);
        drop(qemu);
        for name in ["ivshmem", "nvdimm", "pmem", "mem"] {
            std::fs::remove_file(folder.path().join(format!("{name}-{version}"))).unwrap();
        }
    }
}

/// What only the two together can tell: they do not fit.
#[test]
fn pairs_that_do_not_fit() {
    let _turn = Turn::take().unwrap();
    let source = machine().node(32).start().unwrap();
    let before = state(&source);
    let two_nodes = || Machine::new(QemuVersion::V10_0, 64).tiny();
    let cases: [(Machine, &[&str]); 5] = [
        // All that differs is told together.
        (
            two_nodes().node(64).kind("pc-i440fx-7.2"),
            &["pc-i440fx-7.2", "ram1", "33554432", "67108864"],
        ),
        (
            two_nodes().node(32).kind("pc-i440fx-7.2"),
            &[
                "pc-q35-7.2",
                "pc-i440fx-7.2",
                "start the target with the same machine type",
            ],
        ),
        (two_nodes().node(64), &["ram1", "33554432", "67108864"]),
        (two_nodes(), &["ram1"]),
        (two_nodes().node(32).node(16), &["ram2"]),
    ];
    for (target, words) in cases {
        let target = target.incoming().start().unwrap();
        let (receive, uri) = Ferry::receive(&target, &["--json"]).unwrap();
        let migrate = Ferry::migrate(&source, &uri, &["--live"]).unwrap();
        for ended in [migrate.wait(BOUND).unwrap(), receive.wait(BOUND).unwrap()] {
            assert_eq!(ended.code(), 2, "{ended:?}");
            assert_eq!(ended.json()["guest"], "untouched", "{ended:?}");
            for words in words {
                assert!(
                    ended.stderr.contains(words),
                    "{words:?} is not in {ended:?}"
                );
            }
        }
        assert_eq!(state(&source), before);
        // It was not touched either, and may be given a source that fits.
        assert_eq!(target.run_state().unwrap(), "inmigrate");
    }
}
