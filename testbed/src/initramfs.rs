//! The guest's first and only file system: a cpio archive in the `newc` format.

use std::fs;
use std::io::Write as _;

use crate::TestbedError;
use crate::dir::{existing, testbed_dir};

/// The static init that `build.rs` has compiled.
const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ferry-guest"));

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Major and minor number of `/dev/console`.
const CONSOLE: (u32, u32) = (5, 1);

/// The archive with the init, the kernel's modules and what the kernel itself looks for.
pub(crate) fn image() -> Result<Vec<u8>, TestbedError> {
    let modules = existing(testbed_dir()?.join("guest/modules"))?;
    let read = |name: &str| {
        let path = modules.join(name);
        fs::read(&path).map_err(TestbedError::io(format!("read {}", path.display())))
    };
    let wanted = read("order")?;
    let wanted = String::from_utf8_lossy(&wanted);
    // A module that the kernel has built in was not there to be unpacked.
    let there: Vec<_> = wanted
        .lines()
        .filter(|name| modules.join(format!("{name}.ko")).exists())
        .collect();
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "modules"] {
        archive.add(folder, FOLDER, (0, 0), &[]);
    }
    // Without it the init would have no standard output before it mounts anything.
    archive.add("dev/console", CHARACTER_DEVICE, CONSOLE, &[]);
    archive.add("init", PROGRAM, (0, 0), INIT);
    archive.add("modules/order", FILE, (0, 0), there.join("\n").as_bytes());
    for name in there {
        let file = format!("{name}.ko");
        archive.add(&format!("modules/{file}"), FILE, (0, 0), &read(&file)?);
    }
    Ok(archive.finish())
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let length = |bytes: usize| u32::try_from(bytes).expect("modules are far below 4 GiB");
        let fields = [
            self.entries, // inode
            mode,
            0, // owner
            0, // group
            1, // links
            0, // time
            length(content.len()),
            0, // device of the archive itself
            0,
            device.0,
            device.1,
            length(name.len() + 1),
            0, // checksum: none in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            write!(self.bytes, "{field:08x}").expect("a Vec takes whatever is written");
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        let aligned = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(aligned, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_the_newc_layout() {
        let mut archive = Archive::default();
        archive.add("a", FILE, (0, 0), b"hello");
        let bytes = archive.finish();
        // 110 bytes of header, the name with its zero, filled up to four; then the content likewise.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..120], b"hello\0\0\0");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(&bytes[230..241], b"TRAILER!!!\0");
    }
}
