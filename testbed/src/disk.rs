//! Disk images that both QEMUs of a pair can open.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::{QemuVersion, TestbedError};

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// A plain file.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl DiskFormat {
    pub(crate) fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An empty image, removed when dropped.
#[derive(Debug)]
pub struct Disk {
    format: DiskFormat,
    path: PathBuf,
    _folder: TempDir,
}

impl Disk {
    /// Creates an image of `mib` MiB. The Linux guest writes to the first 4 MiB.
    pub fn create(format: DiskFormat, mib: u64) -> Result<Self, TestbedError> {
        let folder = TempDir::with_prefix("ferry-disk-").map_err(TestbedError::io("temp dir"))?;
        let path = folder.path().join("disk");
        match format {
            DiskFormat::Raw => File::create(&path)
                .and_then(|file| file.set_len(mib << 20))
                .map_err(TestbedError::io("create a disk image"))?,
            DiskFormat::Qcow2 => create_qcow2(&path, mib)?,
        }
        Ok(Self {
            format,
            path,
            _folder: folder,
        })
    }

    /// The image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    pub fn format(&self) -> DiskFormat {
        self.format
    }
}

fn create_qcow2(path: &Path, mib: u64) -> Result<(), TestbedError> {
    // The older one: the newer reads what it writes.
    let program = QemuVersion::V7_2.qemu_img()?;
    let output = Command::new(&program)
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(format!("{mib}M"))
        .output()
        .map_err(TestbedError::io("start qemu-img"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(TestbedError::Program {
        program: program.display().to_string(),
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
