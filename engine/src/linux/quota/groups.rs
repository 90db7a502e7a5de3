//! Where control groups are, and what is written there.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, Pid, access};

use super::WHOLE_CPU;
use crate::linux::error::QuotaRefusal;
use crate::linux::{Error, Process};

/// The controller that shares out time.
const CPU: &str = "cpu";

/// How `cgroup.events` begins of a group with processes in it or below.
const POPULATED: [&str; 2] = ["populated", "1"];

/// A version of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

/// A mounted hierarchy that may have the controller.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// Which of its groups is at the mount point.
    root: PathBuf,
    point: PathBuf,
}

/// The hierarchies that may have the controller.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mounts(Vec<Mount>);

/// A group in which somebody has put a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Home {
    pub(super) version: Version,
    pub(super) dir: PathBuf,
    /// The mount point, above which there is nothing to see.
    top: PathBuf,
}

/// Where a thread is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) home: Home,
    /// The group below its home that an engine made for it.
    pub(super) own: Option<PathBuf>,
}

impl Mounts {
    /// Those of this process, by which groups of `process` are to be found.
    pub(super) fn read(process: &Process) -> Result<Self, Error> {
        let text = fs::read_to_string("/proc/self/mountinfo")
            .map_err(|error| Error::call("reading the list of mounts", error))?;
        let mounts = Self::parse(&text);
        if mounts.0.is_empty() {
            return Err(refused(process.pid(), QuotaRefusal::NoController));
        }
        Ok(mounts)
    }

    fn parse(mountinfo: &str) -> Self {
        Self(mountinfo.lines().filter_map(parse_mount).collect())
    }

    /// Where `thread` is; nothing when it has ended.
    pub(super) fn place(&self, process: &Process, thread: Pid) -> Result<Option<Place>, Error> {
        match process.read_proc(&format!("task/{thread}/cgroup")) {
            Ok(text) => self
                .parse_place(&String::from_utf8_lossy(&text))
                .map(Some)
                .map_err(|why| refused(process.pid(), why)),
            Err(Error::Call { source, .. }) if is_ended(&source) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a `/proc/PID/task/TID/cgroup`.
    fn parse_place(&self, text: &str) -> Result<Place, QuotaRefusal> {
        let (version, group) = parse_groups(text).ok_or(QuotaRefusal::NoController)?;
        let group = Path::new(group);
        let mut mounts = self.0.iter().filter(|mount| mount.version == version);
        let (mount, inside) = mounts
            .find_map(|mount| Some((mount, group.strip_prefix(&mount.root).ok()?)))
            .filter(|(_, inside)| !inside.starts_with(".."))
            .ok_or_else(|| QuotaRefusal::OutOfSight {
                group: group.to_owned(),
            })?;
        let group = mount.point.join(inside);
        let is_ours = group
            .file_name()
            .is_some_and(|name| is_ours(&name.to_string_lossy()));
        let home = |dir: &Path| Home {
            version,
            dir: dir.to_owned(),
            top: mount.point.clone(),
        };
        Ok(match group.parent().filter(|_| is_ours) {
            Some(parent) => Place {
                home: home(parent),
                own: Some(group),
            },
            None => Place {
                home: home(&group),
                own: None,
            },
        })
    }
}

/// `32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu`, with any number of fields
/// before the hyphen.
fn parse_mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    let version = match kind {
        "cgroup2" => Version::Two,
        "cgroup" if options.split(',').any(|option| option == CPU) => Version::One,
        _ => return None,
    };
    Some(Mount {
        version,
        root: unescaped(root),
        point: unescaped(point),
    })
}

/// Spaces and the like are written as `\040`.
fn unescaped(text: &str) -> PathBuf {
    let mut pieces = text.split('\\');
    let mut path = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let code = piece.get(..3);
        let code = code.and_then(|code| u8::from_str_radix(code, 8).ok());
        path.push(code.map_or('\\', char::from));
        path.push_str(code.map_or(piece, |_| &piece[3..]));
    }
    PathBuf::from(path)
}

/// In lines like `1:cpu,cpuacct:/a` and `0::/b`: the group that has the controller. Version 2 has what
/// version 1 has not.
fn parse_groups(text: &str) -> Option<(Version, &str)> {
    let lines = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    });
    let mut lines = lines.collect::<Vec<_>>().into_iter();
    let first = lines
        .clone()
        .find(|(controllers, _)| controllers.split(',').any(|name| name == CPU));
    match first {
        Some((_, group)) => Some((Version::One, group)),
        None => lines
            .find(|(controllers, _)| controllers.is_empty())
            .map(|(_, group)| (Version::Two, group)),
    }
}

/// Whether an engine gave a group this name: `ferry-PID-TID`, by whatever numbers.
fn is_ours(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.strip_prefix("ferry-")
        .and_then(|rest| rest.split_once('-'))
        .is_some_and(|(process, thread)| is_number(process) && is_number(thread))
}

impl Home {
    /// Whether groups with quotas can be made in it, by all that can be told beforehand.
    pub(super) fn check(&self, pid: Pid) -> Result<(), Error> {
        let dir = self.dir.clone();
        let may_write = |path: &Path| access(path, AccessFlags::W_OK);
        let allowed = may_write(&self.dir).and_then(|()| may_write(&self.dir.join(self.members())));
        let why = match allowed {
            Err(Errno::EROFS) => Some(QuotaRefusal::ReadOnly { dir }),
            Err(Errno::EACCES | Errno::EPERM) => Some(QuotaRefusal::NotPermitted { dir }),
            Err(errno) => return Err(Error::call("access to a control group", errno)),
            Ok(()) => self.refuses_threads(),
        };
        why.map_or(Ok(()), |why| Err(refused(pid, why)))
    }

    fn refuses_threads(&self) -> Option<QuotaRefusal> {
        if self.version == Version::One {
            return None;
        }
        let dir = self.dir.clone();
        if !self
            .words("cgroup.controllers")
            .iter()
            .any(|name| name == CPU)
        {
            return Some(QuotaRefusal::NotEnabled { dir });
        }
        // The root of the hierarchy has no type, and may have groups of both kinds below it.
        let is_root = self.words("cgroup.type").is_empty();
        let domain = super::below(&self.dir, "").into_iter().find(|group| {
            words(group, "cgroup.type") == ["domain"]
                && words(group, "cgroup.events").starts_with(&POPULATED.map(str::to_owned))
        });
        domain
            .filter(|_| !is_root)
            .map(|domain| QuotaRefusal::NotThreaded { dir, domain })
    }

    /// Makes `group` below it, for threads. True when the groups below had to be given the controller.
    pub(super) fn make(&self, group: &Path, pid: Pid) -> Result<bool, Error> {
        self.check(pid)?;
        match fs::create_dir(group) {
            // Of an engine that was killed.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            outcome => outcome.map_err(|error| Error::call("making a control group", error))?,
        }
        if self.version == Version::One {
            return Ok(false);
        }
        let has_it = self
            .words("cgroup.subtree_control")
            .iter()
            .any(|name| name == CPU);
        let made = write(group, "cgroup.type", "threaded").and_then(|()| {
            if has_it {
                return Ok(());
            }
            write(&self.dir, "cgroup.subtree_control", "+cpu")
        });
        if made.is_err() {
            // Nobody is in it.
            _ = fs::remove_dir(group);
        }
        made.map(|()| !has_it)
    }

    /// Moves a thread into `group`. One that has ended is no error.
    pub(super) fn move_in(&self, group: &Path, thread: Pid) -> Result<(), Error> {
        match write(group, self.members(), &thread.to_string()) {
            Err(Error::Call { source, .. }) if is_ended(&source) && group.exists() => Ok(()),
            outcome => outcome,
        }
    }

    /// The tightest limit of it and the groups above, in millionth parts of a CPU, as far as they can be
    /// seen.
    pub(super) fn limit(&self) -> Option<u64> {
        let above = self.dir.ancestors();
        let seen = above.take_while(|dir| dir.starts_with(&self.top));
        seen.filter_map(|dir| limit_of(self.version, dir)).min()
    }

    /// The file that lists a group's threads.
    fn members(&self) -> &'static str {
        match self.version {
            Version::One => "tasks",
            Version::Two => "cgroup.threads",
        }
    }

    fn words(&self, file: &str) -> Vec<String> {
        words(&self.dir, file)
    }
}

fn limit_of(version: Version, dir: &Path) -> Option<u64> {
    let (quota, period) = match version {
        Version::One => {
            let one = |file| words(dir, file).into_iter().next();
            (one("cpu.cfs_quota_us")?, one("cpu.cfs_period_us")?)
        }
        Version::Two => {
            let mut both = words(dir, "cpu.max").into_iter();
            (both.next()?, both.next()?)
        }
    };
    // `-1` and `max` are no number: there is no limit.
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
    quota.saturating_mul(WHOLE_CPU).checked_div(period)
}

/// Takes the controller from the groups below `home` again.
pub(super) fn close(home: &Path) -> Result<(), Error> {
    write(home, "cgroup.subtree_control", "-cpu")
}

/// What a file of a group says; nothing when it is not there.
fn words(group: &Path, file: &str) -> Vec<String> {
    let text = fs::read_to_string(group.join(file)).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Tells a group something.
pub(super) fn write(group: &Path, file: &str, text: &str) -> Result<(), Error> {
    fs::write(group.join(file), text)
        .map_err(|error| Error::call("writing to a control group", error))
}

/// How the kernel says that there is no such thread any more.
fn is_ended(error: &io::Error) -> bool {
    let gone = [Errno::ESRCH, Errno::ENOENT].map(|errno| errno as i32);
    error
        .raw_os_error()
        .is_some_and(|errno| gone.contains(&errno))
}

fn refused(pid: Pid, why: QuotaRefusal) -> Error {
    Error::NoQuota { pid, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
41 31 0:38 /pod\\0407 /sys/fs/cgroup/uni\\040fied rw,relatime - cgroup2 cgroup2 rw,nsdelegate
";

    fn place(groups: &str) -> Result<(Version, PathBuf, Option<PathBuf>), QuotaRefusal> {
        let Place { home, own } = Mounts::parse(MOUNTS).parse_place(groups)?;
        Ok((home.version, home.dir, own))
    }

    #[test]
    fn whichever_hierarchy_has_the_controller_is_used() {
        let one = place("9:cpuset:/\n2:cpu,cpuacct:/vms/a\n0::/pod 7/x\n").unwrap();
        let dir = PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/vms/a");
        assert_eq!(one, (Version::One, dir, None));
        let two = place("9:cpuset:/\n0::/pod 7/x\n").unwrap();
        let dir = PathBuf::from("/sys/fs/cgroup/uni fied/x");
        assert_eq!(two, (Version::Two, dir, None));
        assert_eq!(place("9:cpuset:/\n"), Err(QuotaRefusal::NoController));
    }

    #[test]
    fn a_group_that_an_engine_made_is_known_by_its_name() {
        let top = PathBuf::from("/sys/fs/cgroup/cpu,cpuacct");
        for (name, is_ours) in [
            ("ferry-12-34", true),
            ("ferry-12", false),
            ("ferry-a-1", false),
            ("ferry-1-", false),
            ("xferry-1-2", false),
        ] {
            let (_, home, own) = place(&format!("2:cpu:/vms/{name}\n")).unwrap();
            let whole = top.join("vms").join(name);
            let expected = if is_ours {
                (top.join("vms"), Some(whole))
            } else {
                (whole, None)
            };
            assert_eq!((home, own), expected);
        }
        let (_, home, own) = place("2:cpu:/ferry-1-2\n").unwrap();
        assert_eq!((home, own), (top.clone(), Some(top.join("ferry-1-2"))));
    }

    #[test]
    fn a_group_that_is_not_mounted_here_is_out_of_sight() {
        for groups in ["0::/elsewhere\n", "2:cpu:/../above\n"] {
            let found = place(groups);
            assert!(
                matches!(found, Err(QuotaRefusal::OutOfSight { .. })),
                "{found:?}"
            );
        }
    }

    /// A folder that looks like a group. What a kernel makes there by itself is written beforehand.
    fn group(files: &[(&str, &str)]) -> (tempfile::TempDir, Home) {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("vms");
        fs::create_dir(&dir).unwrap();
        for (file, text) in files {
            fs::write(top.path().join(file), text).unwrap();
        }
        let home = Home {
            version: Version::Two,
            dir,
            top: top.path().to_owned(),
        };
        (top, home)
    }

    #[test]
    fn version_two_is_asked_for_groups_of_threads() {
        let mut files = [
            ("vms/cgroup.controllers", "cpuset cpu memory\n"),
            ("vms/cgroup.subtree_control", "pids\n"),
            ("vms/cgroup.type", "domain\n"),
            ("vms/cgroup.threads", ""),
        ];
        let us = Pid::this();
        let (_top, home) = group(&files);
        let made = home.dir.join("ferry-1-2");
        assert!(home.make(&made, us).unwrap(), "the controller was off");
        let said = |path: &Path| fs::read_to_string(path).unwrap();
        assert_eq!(said(&made.join("cgroup.type")), "threaded");
        assert_eq!(said(&home.dir.join("cgroup.subtree_control")), "+cpu");
        home.move_in(&made, Pid::from_raw(17)).unwrap();
        assert_eq!(said(&made.join("cgroup.threads")), "17");
        close(&home.dir).unwrap();
        assert_eq!(said(&home.dir.join("cgroup.subtree_control")), "-cpu");

        files[1].1 = "cpu\n";
        let (_top, home) = group(&files);
        assert!(!home.make(&home.dir.join("ferry-1-2"), us).unwrap());
        for (kind, events, fits) in [
            ("domain\n", "populated 1\nfrozen 0\n", false),
            ("domain\n", "populated 0\nfrozen 0\n", true),
            ("threaded\n", "populated 1\nfrozen 0\n", true),
        ] {
            let other = home.dir.join("other");
            fs::create_dir_all(&other).unwrap();
            fs::write(other.join("cgroup.type"), kind).unwrap();
            fs::write(other.join("cgroup.events"), events).unwrap();
            let found = home.check(us).map_err(|error| error.to_string());
            let is_refused = found.is_err_and(|text| text.contains("vms/other has processes"));
            assert_eq!(is_refused, !fits, "{kind}{events}");
        }

        files[0].1 = "memory\n";
        let (_top, home) = group(&files);
        let found = home.check(us).unwrap_err().to_string();
        assert!(found.contains("write +cpu to"), "{found}");
    }

    #[test]
    fn the_tightest_limit_above_counts() {
        let (_top, home) = group(&[
            ("cpu.max", "50000 100000\n"),
            ("vms/cpu.max", "max 100000\n"),
        ]);
        assert_eq!(home.limit(), Some(WHOLE_CPU / 2));
        let (_top, home) = group(&[("vms/cpu.max", "300000 100000\n")]);
        assert_eq!(home.limit(), Some(3 * WHOLE_CPU));
        let (_top, mut home) = group(&[
            ("vms/cpu.cfs_quota_us", "-1\n"),
            ("vms/cpu.cfs_period_us", "100000\n"),
        ]);
        home.version = Version::One;
        assert_eq!(home.limit(), None);
    }
}
