//! Whether a process can be tracked, or its faults be served, asked before anything is touched.

use super::pagemap::Pagemap;
use super::uffd::{Features, Uffd};
use super::{Error, Process, RamFile, inject};
use crate::vmm::Rearm;

/// The capability that permits userfaultfds for faults in the kernel: its bit in `CapEff`.
const CAP_SYS_PTRACE: u32 = 19;

/// Where an administrator permits userfaultfds to everyone.
const UNPRIVILEGED: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// Something that stands in the way of tracking, or of post-copy. The text says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// The kernel cannot tell which pages were written.
    #[error(
        "this kernel lacks PAGEMAP_SCAN: run Linux 6.7 or newer, built with CONFIG_PROC_PAGE_MONITOR"
    )]
    NoPagemapScan {
        /// How it failed.
        source: Error,
    },
    /// The kernel cannot write-protect guest RAM without help.
    #[error(
        "this kernel's userfaultfd lacks asynchronous write-protection of shared memory: run Linux 6.7 or newer, built with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP"
    )]
    NoAsyncWriteProtect {
        /// How it failed.
        source: Error,
    },
    /// The kernel does not tell of missing pages of shared memory.
    #[error(
        "this kernel's userfaultfd lacks missing pages of shared memory: run Linux 4.14 or newer, built with CONFIG_USERFAULTFD"
    )]
    NoMissingPages {
        /// How it failed.
        source: Error,
    },
    /// Guest RAM of which single pages cannot be missing.
    #[error(
        "guest RAM {name:?} is made of pages of {page_bytes} bytes, and post-copy places pages of 4096: give it a file on tmpfs instead of hugetlbfs, or move it without post-copy"
    )]
    HugePages {
        /// The region.
        name: String,
        /// Bytes in a page of the memory behind it.
        page_bytes: u32,
    },
    /// Guest RAM on a file system whose pages the kernel does not let us place.
    #[error(
        "guest RAM {name:?} is a file that does not lie on tmpfs: give it one below /dev/shm, or move it without post-copy"
    )]
    NotTmpfs {
        /// The region.
        name: String,
    },
    /// The process may not be traced.
    #[error("{0}")]
    NotTraceable(Error),
    /// The process may not make a userfaultfd that sees faults in the kernel.
    #[error(
        "process {pid} may not use userfaultfd: set vm.unprivileged_userfaultfd=1 with sysctl, or run it as root"
    )]
    NoUserfaultfd {
        /// The process.
        pid: nix::unistd::Pid,
    },
}

/// Tells everything that stands in the way of tracking `process`, all at once. Changes nothing in it.
///
/// Fails only when the process cannot be looked at, with [`Error::Gone`] for one that has ended.
pub fn check(process: &Process) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    findings.extend(
        try_pagemap_scan()
            .err()
            .map(|source| Finding::NoPagemapScan { source }),
    );
    let features = try_features(Features::TRACK_WRITES);
    findings.extend(
        features
            .err()
            .map(|source| Finding::NoAsyncWriteProtect { source }),
    );
    findings.extend(check_injection(process)?);
    Ok(findings)
}

/// Tells everything that stands in the way of post-copy to `process`, whose guest has the RAM `ram`, by
/// name. Changes nothing in it.
///
/// Fails only when the process cannot be looked at, with [`Error::Gone`] for one that has ended.
pub fn check_post_copy<'a>(
    process: &Process,
    ram: impl IntoIterator<Item = (&'a str, &'a RamFile)>,
) -> Result<Vec<Finding>, Error> {
    let mut findings: Vec<_> = ram.into_iter().filter_map(check_ram).collect();
    let features = try_features(Features::SERVE_FAULTS);
    findings.extend(
        features
            .err()
            .map(|source| Finding::NoMissingPages { source }),
    );
    findings.extend(check_injection(process)?);
    Ok(findings)
}

fn check_ram((name, file): (&str, &RamFile)) -> Option<Finding> {
    let name = name.to_owned();
    if file.is_hugetlb() {
        let page_bytes = file.backing_page_bytes();
        return Some(Finding::HugePages { name, page_bytes });
    }
    (!file.is_tmpfs()).then_some(Finding::NotTmpfs { name })
}

/// What keeps the process from making a userfaultfd for us.
fn check_injection(process: &Process) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    match inject::check_permitted(process) {
        Ok(()) => {}
        Err(error @ Error::Gone { .. }) => return Err(error),
        Err(error) => findings.push(Finding::NotTraceable(error)),
    }
    if !may_use_userfaultfd(process)? {
        findings.push(Finding::NoUserfaultfd { pid: process.pid() });
    }
    Ok(findings)
}

/// Scans a page of our own, which is not tracked: a kernel that knows the call says so by refusing.
fn try_pagemap_scan() -> Result<(), Error> {
    let us = Process::open(nix::unistd::Pid::this())?;
    let here = std::ptr::from_ref(&us).addr() as u64;
    let page = crate::core::layout::PAGE_SIZE as u64;
    let start = here - here % page;
    match Pagemap::open(&us)?.scan(&(start..start + page), Rearm::No, &mut |_| {}) {
        Ok(()) | Err(Error::Unwatched { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Asks a userfaultfd of our own, of the kind that is permitted to everyone.
fn try_features(wanted: Features) -> Result<(), Error> {
    Uffd::new_for_user_mode()?.api(wanted).map(drop)
}

/// The kernel permits it to a process that has the capability, and to all when the setting is 1.
fn may_use_userfaultfd(process: &Process) -> Result<bool, Error> {
    let setting = std::fs::read_to_string(UNPRIVILEGED);
    if setting.is_ok_and(|text| text.trim() == "1") {
        return Ok(true);
    }
    let status = process.read_proc("status")?;
    let status = String::from_utf8_lossy(&status);
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let Some(effective) = effective else {
        return Err(Error::Proc {
            file: "status",
            line: "CapEff".into(),
        });
    };
    Ok(effective & (1 << CAP_SYS_PTRACE) != 0)
}
