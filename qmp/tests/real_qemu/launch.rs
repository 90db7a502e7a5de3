//! QEMUs for tests: found, started, and ended whatever happens.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ferry_qmp::{Address, Client, Error, EventKind, Events, Options};
use tempfile::TempDir;

/// Nothing here takes longer, unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks at whether QEMU listens yet.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

pub(crate) async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("it hangs")
}

/// Reads events up to the one wanted.
pub(crate) async fn wait_for(
    events: &mut Events,
    wanted: impl Fn(&EventKind) -> bool,
) -> EventKind {
    bounded(async {
        loop {
            let event = events.next().await.expect("the connection has ended");
            let kind = event.kind();
            if wanted(&kind) {
                return kind;
            }
        }
    })
    .await
}

/// A running QEMU, with a QMP socket on a Unix path. Killed when dropped.
pub(crate) struct Qemu {
    child: Child,
    folder: TempDir,
}

impl Qemu {
    /// Starts QEMU `version` with the guest paused and `args`, as a shell would split them. Nothing
    /// when it is not installed, which is a failure under CI.
    pub(crate) fn start(version: &str, args: &str) -> Option<Self> {
        let binary = testbed().join(format!("qemu-{version}/run"));
        if !binary.exists() {
            let lack = format!(
                "QEMU {version} is not there ({}): run testbed/setup",
                binary.display()
            );
            assert!(std::env::var_os("CI").is_none(), "{lack}");
            eprintln!("NOT TESTED: {lack}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let socket = format!(
            "unix:{},server=on,wait=off",
            folder.path().join("qmp").display()
        );
        let child = Command::new(binary)
            .args(["-nodefaults", "-display", "none", "-S", "-qmp", &socket])
            .args(args.split_whitespace())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Some(Self { child, folder })
    }

    /// A folder of its own, gone when it is.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.folder().join("qmp"))
    }

    pub(crate) fn pid(&self) -> Option<i32> {
        i32::try_from(self.child.id()).ok()
    }

    /// Connects as soon as QEMU listens.
    pub(crate) async fn connect(&self) -> (Client, Events) {
        let (address, options) = (self.address(), Options::default());
        let started = Instant::now();
        loop {
            match Client::connect(&address, &options).await {
                Err(Error::Connect { source, .. }) if started.elapsed() < PATIENCE => {
                    // The socket's file is there a little before QEMU listens on it.
                    assert!(
                        matches!(
                            source.kind(),
                            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                        ),
                        "{source}"
                    );
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                connected => return connected.unwrap(),
            }
        }
    }

    /// Kills it where it stands.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Fails when it has been waited for already: then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn testbed() -> PathBuf {
    std::env::var_os("FERRY_TESTBED_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testbed"),
        PathBuf::from,
    )
}
