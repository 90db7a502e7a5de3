//! The mappings of a process, from `/proc/PID/maps`.
//!
//! The parser is pure. A VMM's guest RAM is often more than one mapping, since every `madvise` on a
//! part of it splits it: [`runs`] puts the pieces together again.

use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::unistd::{Pid, getpid};

use super::{Error, Process};

/// What the kernel puts behind the name of a file that was unlinked.
const DELETED: &[u8] = b" (deleted)";

/// Fields of a line before the path.
const FIELDS_BEFORE_PATH: usize = 5;

/// What a mapping permits.
#[expect(
    clippy::struct_excessive_bools,
    reason = "four letters, as the kernel writes them"
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permissions {
    /// Reading.
    pub read: bool,
    /// Writing.
    pub write: bool,
    /// Executing.
    pub execute: bool,
    /// Writes reach the file and everyone who maps it; otherwise they make private copies.
    pub shared: bool,
}

/// The device on which a file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
}

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last one.
    pub end: u64,
    /// What it permits.
    pub permissions: Permissions,
    /// Offset in bytes of its first byte within the file.
    pub offset: u64,
    /// The device on which the file lies; zero for anonymous memory.
    pub device: Device,
    /// The file on that device; zero for anonymous memory.
    pub inode: u64,
    /// The file's name when it was opened, or the kernel's word for the mapping in brackets. Only for
    /// people: names are reused, devices and inodes say which file it is.
    pub path: Option<PathBuf>,
    /// The file had been unlinked, or its name ends as if it had.
    pub deleted: bool,
}

impl Mapping {
    /// Its addresses.
    pub fn addresses(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Length in bytes.
    pub fn byte_len(&self) -> u64 {
        self.end - self.start
    }

    /// True when guest RAM in it is shared memory of a file that somebody named, not of a memfd, of
    /// `/dev/zero` or of System V.
    pub fn is_shared_named_file(&self) -> bool {
        let made_by_kernel = self.path.as_deref().is_none_or(|path| {
            let name = path.as_os_str().as_encoded_bytes();
            name.starts_with(b"/memfd:") || name.starts_with(b"/SYSV") || name == b"/dev/zero"
        });
        self.permissions.shared && self.inode != 0 && !made_by_kernel
    }

    /// True when `next` goes on where this mapping ends, both in memory and in the same file.
    fn continues_in(&self, next: &Self) -> bool {
        self.end == next.start
            && self.inode != 0
            && (self.device, self.inode) == (next.device, next.inode)
            && self.permissions.shared == next.permissions.shared
            && self.offset.checked_add(self.byte_len()) == Some(next.offset)
    }
}

/// Reads the mappings that a process has now, ordered by address.
pub fn of_process(process: &Process) -> Result<Vec<Mapping>, Error> {
    parse(&process.read_proc("maps")?)
}

/// Processes that have a writable, shared mapping of a file, as far as this one may look at them; without
/// itself and `but`.
pub fn writers_of(device: Device, inode: u64, but: Pid) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let others = processes.filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?);
        (pid != but && pid != getpid()).then_some(pid)
    });
    others
        .filter(|pid| {
            // One that has ended, or belongs to somebody else.
            let text = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
            parse(&text).unwrap_or_default().iter().any(|mapping| {
                let permissions = mapping.permissions;
                (mapping.device, mapping.inode) == (device, inode)
                    && permissions.write
                    && permissions.shared
            })
        })
        .collect()
}

/// Parses the text of a `maps` file.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, Error> {
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_line(line).ok_or_else(|| Error::Proc {
                file: "maps",
                line: String::from_utf8_lossy(line).into_owned(),
            })
        })
        .collect()
}

/// Joins neighbours that map consecutive parts of one file in the same way. A joined mapping keeps
/// the permissions of its first piece.
pub fn runs(mappings: impl IntoIterator<Item = Mapping>) -> Vec<Mapping> {
    let mut runs: Vec<Mapping> = Vec::new();
    for mapping in mappings {
        match runs.last_mut() {
            Some(last) if last.continues_in(&mapping) => last.end = mapping.end,
            _ => runs.push(mapping),
        }
    }
    runs
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(FIELDS_BEFORE_PATH + 1, |byte| *byte == b' ');
    let (start, end) = split_pair(fields.next()?, '-')?;
    let permissions = parse_permissions(fields.next()?)?;
    let offset = hex(text(fields.next()?)?)?;
    let (major, minor) = split_pair(fields.next()?, ':')?;
    let inode = text(fields.next()?)?.parse().ok()?;
    let name = fields.next().unwrap_or_default().trim_ascii_start();
    let (name, deleted) = match name.strip_suffix(DELETED) {
        Some(rest) => (rest, true),
        None => (name, false),
    };
    (start < end).then(|| Mapping {
        start,
        end,
        permissions,
        offset,
        device: Device { major, minor },
        inode,
        path: (!name.is_empty()).then(|| PathBuf::from(OsString::from_vec(unescape(name)))),
        deleted,
    })
}

fn parse_permissions(field: &[u8]) -> Option<Permissions> {
    let &[read, write, execute, shared] = field else {
        return None;
    };
    let flag = |byte: u8, set: u8| match byte {
        b'-' => Some(false),
        byte if byte == set => Some(true),
        _ => None,
    };
    Some(Permissions {
        read: flag(read, b'r')?,
        write: flag(write, b'w')?,
        execute: flag(execute, b'x')?,
        shared: match shared {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
    })
}

/// The kernel writes a line feed within a name as a backslash with three octal digits, and nothing
/// else: a backslash itself stands as it is.
fn unescape(name: &[u8]) -> Vec<u8> {
    const LINE_FEED: &[u8] = b"\\012";
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some(&byte) = rest.first() {
        if let Some(after) = rest.strip_prefix(LINE_FEED) {
            plain.push(b'\n');
            rest = after;
        } else {
            plain.push(byte);
            rest = &rest[1..];
        }
    }
    plain
}

fn split_pair(field: &[u8], separator: char) -> Option<(u64, u64)> {
    let (left, right) = text(field)?.split_once(separator)?;
    Some((hex(left)?, hex(right)?))
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use proptest::prelude::*;

    use super::*;

    /// Writes a mapping as the kernel does.
    fn kernel_line(mapping: &Mapping) -> Vec<u8> {
        let flag = |set: bool, letter: char| if set { letter } else { '-' };
        let permissions = mapping.permissions;
        let head = format!(
            "{:08x}-{:08x} {}{}{}{} {:08x} {:02x}:{:02x} {} ",
            mapping.start,
            mapping.end,
            flag(permissions.read, 'r'),
            flag(permissions.write, 'w'),
            flag(permissions.execute, 'x'),
            if permissions.shared { 's' } else { 'p' },
            mapping.offset,
            mapping.device.major,
            mapping.device.minor,
            mapping.inode,
        );
        let mut line = format!("{head:<73}").into_bytes();
        for byte in mapping
            .path
            .iter()
            .flat_map(|path| path.as_os_str().as_bytes())
        {
            match byte {
                b'\n' => line.extend(b"\\012"),
                byte => line.push(*byte),
            }
        }
        if mapping.deleted {
            line.extend(DELETED);
        }
        line.push(b'\n');
        line
    }

    fn any_path() -> impl Strategy<Value = Option<PathBuf>> {
        let name = prop::collection::vec(
            any::<u8>().prop_filter("no NUL, and nothing that reads as an escape", |byte| {
                !matches!(byte, 0 | b'\\')
            }),
            0..40,
        );
        prop::option::of(name.prop_map(|mut name| {
            name.insert(0, b'/');
            PathBuf::from(OsString::from_vec(name))
        }))
    }

    fn any_mapping() -> impl Strategy<Value = Mapping> {
        (
            (0..u64::MAX - 1, any::<u64>()),
            any::<[bool; 4]>(),
            (any::<u64>(), any::<u32>(), any::<u32>(), any::<u64>()),
            any_path(),
            any::<bool>(),
        )
            .prop_map(
                |((start, length), [read, write, execute, shared], file, path, deleted)| {
                    let (offset, major, minor, inode) = file;
                    Mapping {
                        start,
                        end: start.saturating_add(length.max(1)),
                        permissions: Permissions {
                            read,
                            write,
                            execute,
                            shared,
                        },
                        offset,
                        device: Device {
                            major: major.into(),
                            minor: minor.into(),
                        },
                        inode,
                        deleted: deleted && path.is_some(),
                        path,
                    }
                },
            )
            .prop_filter("a name that ends like a deleted one", |mapping| {
                let path = mapping.path.as_ref();
                path.is_none_or(|path| !path.as_os_str().as_bytes().ends_with(DELETED))
            })
    }

    proptest! {
        #[test]
        fn reads_back_what_the_kernel_writes(
            mappings in prop::collection::vec(any_mapping(), 0..8),
        ) {
            let text: Vec<u8> = mappings.iter().flat_map(kernel_line).collect();
            prop_assert_eq!(parse(&text).unwrap(), mappings);
        }

        #[test]
        fn never_panics(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }
    }

    #[test]
    fn reads_real_lines() {
        let text = b"7f1c60000000-7f1ce0000000 rw-s 00000000 00:1b 44                         /dev/shm/vm ram (deleted)\n\
            7ffd1d5e1000-7ffd1d602000 rw-p 00000000 00:00 0                          [stack]\n\
            7f1cf0000000-7f1cf0021000 rw-p 00000000 00:00 0 \n";
        let found = parse(text).unwrap();
        assert_eq!(found[0].path.as_deref(), Some("/dev/shm/vm ram".as_ref()));
        assert!(found[0].deleted && found[0].is_shared_named_file());
        assert_eq!(
            found[0].device,
            Device {
                major: 0,
                minor: 0x1b
            }
        );
        assert_eq!(found[1].path.as_deref(), Some("[stack]".as_ref()));
        assert!(!found[1].is_shared_named_file());
        assert_eq!(
            (found[2].path.as_deref(), found[2].byte_len()),
            (None, 0x21000)
        );
    }

    #[test]
    fn memory_without_a_name_is_no_named_file() {
        for name in [
            "/memfd:ram (deleted)",
            "/SYSV00000000 (deleted)",
            "/dev/zero (deleted)",
        ] {
            let line = format!("1000-2000 rw-s 00000000 00:01 7 {name}\n");
            assert!(
                !parse(line.as_bytes()).unwrap()[0].is_shared_named_file(),
                "{name}"
            );
        }
    }

    #[test]
    fn joins_what_a_madvise_has_split() {
        let text = b"1000-2000 rw-s 00000000 00:1b 44 /ram\n\
            2000-5000 rw-s 00001000 00:1b 44 /ram\n\
            5000-6000 rw-s 00009000 00:1b 44 /ram\n\
            6000-7000 rw-p 00000000 00:00 0\n\
            7000-8000 rw-p 00001000 00:00 0\n";
        let joined = runs(parse(text).unwrap());
        let bounds: Vec<_> = joined.iter().map(Mapping::addresses).collect();
        assert_eq!(
            bounds,
            [
                0x1000..0x5000,
                0x5000..0x6000,
                0x6000..0x7000,
                0x7000..0x8000
            ]
        );
    }
}
