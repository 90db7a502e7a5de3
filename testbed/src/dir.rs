//! Where `testbed/setup` has put things.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::TestbedError;

/// The folder into which `testbed/setup` unpacks: `$FERRY_TESTBED_DIR`, else `target/testbed` of
/// the workspace.
pub fn testbed_dir() -> Result<PathBuf, TestbedError> {
    let dir = env::var_os("FERRY_TESTBED_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testbed"),
        PathBuf::from,
    );
    // Written last, when everything else is there.
    existing(dir.join("stamp")).map(|_| dir)
}

/// `path`, when there is something.
pub(crate) fn existing(path: PathBuf) -> Result<PathBuf, TestbedError> {
    if path.exists() {
        Ok(path)
    } else {
        Err(TestbedError::NotSetUp { path })
    }
}

/// The QEMUs of the testbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QemuVersion {
    /// Debian 12's.
    V7_2,
    /// Debian 13's.
    V10_0,
}

impl QemuVersion {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V7_2, Self::V10_0];

    /// The executable: a wrapper that execs `qemu-system-x86_64` with its libraries and firmware.
    pub fn executable(self) -> Result<PathBuf, TestbedError> {
        existing(testbed_dir()?.join(format!("qemu-{self}/run")))
    }

    /// The `qemu-img` of the same version.
    pub fn qemu_img(self) -> Result<PathBuf, TestbedError> {
        existing(testbed_dir()?.join(format!("qemu-{self}/qemu-img")))
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V7_2 => "7.2",
            Self::V10_0 => "10.0",
        })
    }
}
