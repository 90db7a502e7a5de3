//! A process to be tracked: the test's own binary, run again as a child.
//!
//! The child maps a file as guest RAM and does what it is told, line by line, on its main thread, and
//! answers with one line each. All unsafe code of these tests is in
//! [`guest`] and [`patience`].

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod guest;
pub(crate) mod patience;

use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd as _, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use ferry_engine::linux::maps::{self, Mapping};
use ferry_engine::linux::{Process, RemoteFd};
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

/// Every line of the child begins with it: the test harness writes lines of its own in between.
pub(crate) const MARK: &str = "@child ";

/// Set in the child's environment to the file that it maps.
pub(crate) const RAM_VARIABLE: &str = "FERRY_TEST_RAM";

/// The child, killed when dropped.
pub(crate) struct Tracked {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    pub(crate) process: Arc<Process>,
}

impl Tracked {
    /// Starts the child with `ram` mapped and waits until it is ready.
    pub(crate) fn start(ram: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(RAM_VARIABLE, ram)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut tracked = Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().unwrap()),
            process: Arc::new(Process::open(pid).unwrap()),
            child,
        };
        assert_eq!(tracked.answer(), "ready");
        tracked
    }

    pub(crate) fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Gives an order without waiting for its answer.
    pub(crate) fn order(&mut self, order: impl Display) {
        let input = self.input.as_mut().unwrap();
        writeln!(input, "{order}").unwrap();
        input.flush().unwrap();
    }

    /// The next answer.
    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let length = self.output.read_line(&mut line).unwrap();
            assert!(length > 0, "the child has ended");
            if let Some((_, answer)) = line.split_once(MARK) {
                return answer.trim_end().to_owned();
            }
        }
    }

    /// True when an answer has come that was not taken.
    pub(crate) fn has_answer(&self) -> bool {
        let mut fds = [PollFd::new(
            self.output.get_ref().as_fd(),
            PollFlags::POLLIN,
        )];
        !self.output.buffer().is_empty() || poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    pub(crate) fn ask(&mut self, order: impl Display) -> String {
        self.order(order);
        self.answer()
    }

    /// Where the child has mapped its RAM.
    pub(crate) fn ram(&self) -> Mapping {
        let path = self.process.fds().unwrap().into_iter().find_map(|fd| {
            let link = self.process.fd_link(fd).ok()?;
            let name = link.to_str()?.trim_end_matches(" (deleted)").to_owned();
            name.contains("ferry-ram").then(|| PathBuf::from(name))
        });
        let path = path.unwrap();
        let mappings = maps::runs(maps::of_process(&self.process).unwrap());
        mappings
            .into_iter()
            .find(|mapping| mapping.path.as_ref() == Some(&path))
            .unwrap()
    }

    /// Its descriptors, each with what it leads to.
    pub(crate) fn descriptors(&self) -> Vec<(RemoteFd, String)> {
        let fds = self.process.fds().unwrap();
        fds.into_iter()
            .map(|fd| (fd, self.process.fd_link(fd).unwrap().into_string().unwrap()))
            .collect()
    }

    /// Its state as `ps` shows it.
    pub(crate) fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    }

    /// What its page tables take, in KiB.
    pub(crate) fn page_table_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
        let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
        kib.parse().unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        // Closing its input ends it by itself; killing it ends it in any case.
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A RAM file of one kind, removed when dropped.
pub(crate) struct Ram {
    pub(crate) file: File,
    path: PathBuf,
    _mount: Option<Mount>,
    _pages: Option<HugePages>,
}

impl Ram {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn memfd(bytes: u64) -> Self {
        let fd = memfd_create("ferry-ram", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(bytes).unwrap();
        Self {
            path: format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into(),
            file,
            _mount: None,
            _pages: None,
        }
    }

    /// A file on a tmpfs of its own, mounted with `options`.
    pub(crate) fn tmpfs(bytes: u64, options: &str) -> Self {
        let mount = Mount::new("tmpfs", options);
        Self::on(mount, None, bytes)
    }

    /// A file of a file system that keeps it in memory and is not tmpfs.
    pub(crate) fn ramfs(bytes: u64) -> Self {
        Self::on(Mount::new("ramfs", ""), None, bytes)
    }

    /// A file on a hugetlbfs of its own, with as many huge pages as it takes.
    pub(crate) fn hugetlb(bytes: u64) -> Self {
        let pages = HugePages::more(bytes.div_ceil(HUGE_PAGE));
        let mount = Mount::new("hugetlbfs", "pagesize=2M");
        Self::on(mount, Some(pages), bytes)
    }

    fn on(mount: Mount, pages: Option<HugePages>, bytes: u64) -> Self {
        let path = mount.folder.path().join("ferry-ram");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(bytes).unwrap();
        Self {
            file,
            path,
            _mount: Some(mount),
            _pages: pages,
        }
    }

    pub(crate) fn punch(&self, offset: u64, length: u64) {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(
            &self.file,
            flags,
            offset.cast_signed(),
            length.cast_signed(),
        )
        .unwrap();
    }

    /// Bytes that the file takes in memory.
    pub(crate) fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().unwrap().blocks() * 512
    }
}

pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// A file system of the test's own, taken down when dropped.
pub(crate) struct Mount {
    pub(crate) folder: tempfile::TempDir,
}

impl Mount {
    pub(crate) fn new(kind: &str, options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mounted = nix::mount::mount(
            Some(kind),
            folder.path(),
            Some(kind),
            nix::mount::MsFlags::empty(),
            Some(options),
        );
        assert!(
            mounted.is_ok(),
            "this test mounts a {kind}, which takes root: {mounted:?}"
        );
        Self { folder }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.folder.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// More huge pages in the machine's pool, given back when dropped.
struct HugePages {
    count: u64,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn more(count: u64) -> Self {
        let pages = Self { count };
        let before = Self::change(|pool| pool + count);
        let now = pool();
        assert!(
            now >= before + count,
            "this test takes {count} huge pages of 2 MiB, and the machine had no room for them"
        );
        pages
    }

    /// Changes the pool under a lock: tests in other processes change it too.
    fn change(to: impl FnOnce(u64) -> u64) -> u64 {
        let file = File::open(POOL).unwrap();
        let _lock = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        let before = pool();
        std::fs::write(POOL, to(before).to_string()).unwrap();
        before
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        Self::change(|pool| pool.saturating_sub(self.count));
    }
}

fn pool() -> u64 {
    std::fs::read_to_string(POOL)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}
