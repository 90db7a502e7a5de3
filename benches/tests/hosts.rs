//! A move to a host that is reached over ssh, which here is this one, with an sshd and keys of the
//! test's own.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use ferry_benches::figures::Figures;
use ferry_testbed::{ferry_binary, testbed_dir, wait_until};
use tempfile::TempDir;

const BOUND: Duration = Duration::from_secs(10);

/// An sshd, gone when dropped. It lets in whoever runs the test.
struct Sshd {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Sshd {
    /// Starts it, where this machine has one.
    fn start() -> Option<Self> {
        let path = Path::new("/usr/sbin/sshd");
        if !path.exists() {
            assert!(std::env::var_os("CI").is_none(), "CI needs openssh-server");
            eprintln!("NOT TESTED: this machine has no sshd");
            return None;
        }
        // Where sshd locks up the part of itself that speaks to strangers.
        fs::create_dir_all("/run/sshd").unwrap();
        // Not below /tmp, which anybody may write: sshd trusts no keys there.
        let folder =
            TempDir::with_prefix_in("ferry-sshd-", std::env::var_os("HOME").unwrap()).unwrap();
        for name in ["host", "user"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
            assert!(
                keygen
                    .arg(folder.path().join(name))
                    .status()
                    .unwrap()
                    .success()
            );
        }
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = port.local_addr().unwrap().port();
        let at = folder.path().display();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {at}/host\nAuthorizedKeysFile {at}/user.pub\n\
             PidFile none\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        );
        fs::write(folder.path().join("config"), config).unwrap();
        let child = Command::new(path)
            .args(["-D", "-e", "-f"])
            .arg(folder.path().join("config"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let sshd = Self {
            child,
            port,
            folder,
        };
        let listens = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok();
        wait_until("sshd listens", BOUND, listens).unwrap();
        Some(sshd)
    }

    fn ssh(&self) -> String {
        let at = self.folder.path().display();
        format!(
            "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=no \
             -o UserKnownHostsFile={at}/known -o IdentitiesOnly=yes -i {at}/user -p {}",
            self.port
        )
    }

    fn run(&self, args: &[&str]) -> Output {
        let program = env!("CARGO_BIN_EXE_ferry-benches");
        let there = format!(
            "env FERRY_TESTBED_DIR={} FERRY_BIN={} {program}",
            testbed_dir().unwrap().canonicalize().unwrap().display(),
            ferry_binary().unwrap().display()
        );
        let ssh = self.ssh();
        Command::new(program)
            .args([
                "--target-host",
                "127.0.0.1",
                "--ssh",
                &ssh,
                "--target-run",
                &there,
            ])
            .args(args)
            .current_dir(self.folder.path())
            .output()
            .unwrap()
    }

    fn figures(&self, output: &Output) -> Figures {
        let [out, err] = [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
        assert!(output.status.success(), "{out}{err}");
        let text = fs::read(self.folder.path().join("run.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

#[test]
fn a_guest_that_counts_goes_to_another_host() {
    let Some(sshd) = Sshd::start() else {
        return;
    };
    let args = [
        "--quick",
        "--case",
        "writes",
        "--peers",
        // Both hosts are this one: plain ferry would send no page.
        "ferry:2,multifd:2:zstd",
        "--runs",
        "1",
        "--check",
        "--json",
        "run.json",
    ];
    let figures = sshd.figures(&sshd.run(&args));
    assert!(figures.target_host.is_some());
    let case = figures.case("writes").unwrap();
    assert_eq!(case.series.len(), 3);
    for series in &case.series {
        let [run] = &series.moves[..] else {
            panic!("{series:?}");
        };
        // Two processes on one machine have one clock.
        assert!(
            run.clock_error_ms > 0.0 && run.clock_error_ms < 20.0,
            "{run:?}"
        );
        assert!(
            run.total_ms > run.blackout_ms && run.blackout_ms > 0.0,
            "{run:?}"
        );
        assert!(run.wire_bytes >= 64 << 20, "{run:?}");
        let guest = run.guest.as_ref().unwrap();
        assert_eq!(guest.bad, 0);
        assert!(guest.curve.done_s.is_sorted(), "{run:?}");
    }
}

#[test]
fn a_guest_of_ones_own_is_seen_by_the_events_of_qemu() {
    let Some(sshd) = Sshd::start() else {
        return;
    };
    let args = [
        "--qemu-args",
        "-device VGA",
        "--guest-mib",
        "128",
        "--settle",
        "2",
        "--peers",
        "ferry,precopy",
        "--runs",
        "1",
        "--json",
        "run.json",
    ];
    let figures = sshd.figures(&sshd.run(&args));
    let case = figures.case("own").unwrap();
    assert_eq!(case.series.len(), 2);
    for series in &case.series {
        let [run] = &series.moves[..] else {
            panic!("{series:?}");
        };
        assert!(run.guest.is_none());
        assert!(
            run.total_ms > run.blackout_ms && run.blackout_ms > 0.0,
            "{run:?}"
        );
    }
}
