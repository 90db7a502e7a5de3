//! The preflight: everything that stands in the way of a move, told together and before anything is
//! changed.
//!
//! The rule behind most of it: all that writes guest RAM must do so through QEMU's page tables, or a
//! write is missed. The kernel's vhost-net and vhost-vsock do: their workers run in QEMU's address
//! space and copy through its page tables (read in the kernel's source, not measured). What pins guest memory (VFIO, vDPA, vhost-scsi,
//! SCSI pass-through, `O_DIRECT`) or maps it into another process (vhost-user) is not.

use std::fmt;

use ferry_qmp::MigrationStatus;
use ferry_qmp::commands::{BlockNode, QomGet, QueryMigrate, QueryNamedBlockNodes, RunState};

use super::attach::{Inner, Qemu};
use super::inventory;
use super::settings::{Settings, Side};
use crate::linux::preflight::{self, Finding};
use crate::vmm::VmmError;

/// What a problem is about. Its text is stable: scripts may match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProblemCode {
    /// QEMU's run state is not one to begin with.
    RunState,
    /// Guest RAM that cannot be migrated.
    Ram,
    /// QEMU itself refuses to migrate.
    Blocked,
    /// A migration is under way already.
    Busy,
    /// QEMU is too old.
    TooOld,
    /// A device that writes guest RAM behind QEMU's back, or that holds memory of its own.
    Device,
    /// A network back end of that kind.
    Netdev,
    /// A disk of that kind.
    Disk,
    /// The guest's memory is encrypted.
    Confidential,
    /// The host's kernel is too old.
    Kernel,
    /// QEMU may not be traced.
    Ptrace,
    /// QEMU may not use userfaultfd.
    Userfaultfd,
    /// The guest cannot be slowed.
    Throttle,
}

impl ProblemCode {
    /// The stable text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RunState => "run-state",
            Self::Ram => "ram",
            Self::Blocked => "blocked",
            Self::Busy => "busy",
            Self::TooOld => "qemu-too-old",
            Self::Device => "device",
            Self::Netdev => "netdev",
            Self::Disk => "disk",
            Self::Confidential => "confidential",
            Self::Kernel => "kernel",
            Self::Ptrace => "ptrace",
            Self::Userfaultfd => "userfaultfd",
            Self::Throttle => "throttle",
        }
    }
}

impl fmt::Display for ProblemCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something that stands in the way of a move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What it is about.
    pub code: ProblemCode,
    /// What was found, by name.
    pub found: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}; {}", self.code, self.found, self.remedy)
    }
}

impl Problem {
    pub(super) fn new(
        code: ProblemCode,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            code,
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

/// Types of devices that are refused, by how their names begin, and why.
const REFUSED_DEVICES: [(&str, &str); 13] = [
    ("vfio", "hardware writes guest RAM unseen"),
    ("vhost-user", "another process writes guest RAM"),
    (
        "vhost-scsi",
        "the kernel writes guest RAM through pinned pages",
    ),
    ("vhost-vdpa", "hardware writes guest RAM unseen"),
    (
        "scsi-generic",
        "the kernel writes guest RAM through pinned pages",
    ),
    (
        "scsi-block",
        "the kernel writes guest RAM through pinned pages",
    ),
    ("virtio-9p", "open files of the host cannot be moved"),
    ("ivshmem", "its memory is shared with other processes"),
    (
        "nvdimm",
        "its memory is not guest RAM that can be moved yet",
    ),
    (
        "virtio-pmem",
        "its memory is not guest RAM that can be moved yet",
    ),
    (
        "virtio-mem",
        "its memory is not guest RAM that can be moved yet",
    ),
    (
        "cxl-type3",
        "its memory is not guest RAM that can be moved yet",
    ),
    ("x-pci-proxy-dev", "another process writes guest RAM"),
];

/// Types of network back ends that are refused, as `info network` names them. `passt` may be
/// vhost-user, and that line does not tell.
const REFUSED_NETDEVS: [&str; 3] = ["vhost-user", "vhost-vdpa", "passt"];

/// Block drivers that hand guest RAM to hardware or to another process.
const REFUSED_DRIVERS: [&str; 5] = [
    "nvme",
    "nvme-io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
];

impl Qemu {
    /// Every reason why this QEMU cannot be the `side` of a move now. Changes nothing.
    ///
    /// # Errors
    /// Only when QEMU or its process cannot be asked.
    pub async fn problems(&self, side: Side) -> Result<Vec<Problem>, VmmError> {
        let qemu = self.inner();
        let mut problems = self.survey().problems.clone();
        problems.extend(run_state(&qemu.status().await?.status, side));
        problems.extend(migration(qemu, side).await?);
        problems.extend(devices(qemu).await?);
        problems.extend(netdevs(&qemu.monitor().human("info network").await?));
        problems.extend(confidential(qemu).await?);
        if side == Side::Target {
            problems.extend(self.survey().shared_with_others(qemu.process()));
        }
        if side == Side::Source {
            let nodes = QueryNamedBlockNodes { flat: Some(true) };
            problems.extend(disks(&qemu.monitor().ask(nodes).await?));
            problems.extend(preflight::check(qemu.process())?.iter().map(host));
        }
        Ok(problems)
    }
}

fn run_state(state: &RunState, side: Side) -> Option<Problem> {
    let remedy = match (side, state) {
        (Side::Source, RunState::Running | RunState::Paused | RunState::Prelaunch)
        | (Side::Target, RunState::Inmigrate) => return None,
        (Side::Target, _) => "start it with -incoming defer, and use it for one move",
        (Side::Source, RunState::Inmigrate) => "it waits for a guest: choose the QEMU that has one",
        (Side::Source, RunState::Postmigrate | RunState::FinishMigrate) => {
            "it was paused by an earlier migration: make sure that the guest runs nowhere else, then \
             let it run with cont"
        }
        (Side::Source, RunState::Suspended) => "the guest sleeps (S3): wake it with system_wakeup",
        (Side::Source, RunState::IoError) => {
            "a disk failed: mend it, then let the guest run with cont"
        }
        (Side::Source, RunState::GuestPanicked | RunState::InternalError | RunState::Shutdown) => {
            "the guest does not run any more: reset it with system_reset and cont, or end it"
        }
        (Side::Source, _) => "let it run with cont, or pause it with stop, and try again",
    };
    Some(Problem::new(
        ProblemCode::RunState,
        format!("QEMU is {state}"),
        remedy,
    ))
}

async fn migration(qemu: &Inner, side: Side) -> Result<Vec<Problem>, VmmError> {
    use MigrationStatus::{Cancelled, Completed, Failed, None};
    let migration = qemu.monitor().ask(QueryMigrate).await?;
    let mut problems: Vec<Problem> = migration
        .blocked_reasons
        .into_iter()
        .map(|reason| {
            Problem::new(
                ProblemCode::Blocked,
                reason,
                "take that device out of the guest",
            )
        })
        .collect();
    if let Some(status) = migration.status
        && !matches!(status, None | Cancelled | Completed | Failed)
    {
        let found = format!("a migration is under way in QEMU already: {status}");
        problems.push(Problem::new(
            ProblemCode::Busy,
            found,
            "let it end, or cancel it",
        ));
    }
    match Settings::read(qemu.monitor(), side).await {
        Err(VmmError::Unfit { what }) => {
            let remedy = "use QEMU 7.2 or newer";
            problems.push(Problem::new(ProblemCode::TooOld, what, remedy));
        }
        other => drop(other?),
    }
    Ok(problems)
}

async fn devices(qemu: &Inner) -> Result<Vec<Problem>, VmmError> {
    let devices = inventory::devices(qemu.monitor()).await?;
    let refused = devices.iter().filter_map(|device| {
        let (_, why) = REFUSED_DEVICES
            .iter()
            .find(|(prefix, _)| device.kind.starts_with(prefix))?;
        let found = format!("device {} is a {}: {why}", device.name, device.kind);
        let remedy = if device.name.contains('[') {
            "start QEMU without it".to_owned()
        } else {
            format!("unplug it before the move (device_del {})", device.name)
        };
        Some(Problem::new(ProblemCode::Device, found, remedy))
    });
    Ok(refused.collect())
}

/// Finds ` \ n0: index=0,type=vhost-user,…` in the text of `info network`.
fn netdevs(text: &str) -> Vec<Problem> {
    let refused = text.lines().filter_map(|line| {
        let (name, properties) = line.split_once(':')?;
        let name = name.trim_start_matches([' ', '\\']);
        let kind = properties
            .split(',')
            .find_map(|word| word.trim().strip_prefix("type="))?;
        REFUSED_NETDEVS.contains(&kind).then(|| {
            let found = format!(
                "network back end {name} is {kind}: another process or hardware may write guest RAM"
            );
            let remedy = "use another network back end, tap with vhost=on for instance";
            Problem::new(ProblemCode::Netdev, found, remedy)
        })
    });
    refused.collect()
}

fn disks(nodes: &[BlockNode]) -> Vec<Problem> {
    let mut problems: Vec<Problem> = Vec::new();
    for node in nodes {
        let (what, remedy) = if REFUSED_DRIVERS.contains(&node.drv.as_str()) {
            (
                "pins or shares guest RAM",
                "attach it with another block driver",
            )
        } else if node.cache.direct {
            // A read in flight across a scan lands in pages that were pinned before it.
            ("uses O_DIRECT", "use cache=writeback (cache.direct=off)")
        } else {
            continue;
        };
        let problem = Problem::new(
            ProblemCode::Disk,
            format!("disk {} {what}", node.file),
            remedy,
        );
        // A disk has several nodes, one above the other.
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
    problems
}

async fn confidential(qemu: &Inner) -> Result<Option<Problem>, VmmError> {
    let property = QomGet::new("/machine", "confidential-guest-support");
    let support = match qemu.monitor().ask(property).await {
        Ok(support) => support,
        // A machine that knows no such thing has none.
        Err(VmmError::Failed { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let object = support.as_str().unwrap_or_default();
    Ok((!object.is_empty()).then(|| {
        let found = format!("the guest's memory is protected by {object}");
        let remedy = "confidential guests cannot be moved; start it without";
        Problem::new(ProblemCode::Confidential, found, remedy)
    }))
}

/// What the host lacks. The finding's own text says what to do.
fn host(finding: &Finding) -> Problem {
    let code = match finding {
        Finding::NotTraceable(_) => ProblemCode::Ptrace,
        Finding::NoUserfaultfd { .. } => ProblemCode::Userfaultfd,
        Finding::HugePages { .. } | Finding::NotTmpfs { .. } => ProblemCode::Ram,
        _ => ProblemCode::Kernel,
    };
    let text = finding.to_string();
    let (found, remedy) = text.rsplit_once(": ").unwrap_or((&text, "see above"));
    Problem::new(code, found, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_network_back_ends_by_name() {
        let text = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n \
                    \\ n0: index=0,type=user,net=10.0.2.0,restrict=off\n\
                    net1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\n \
                    \\ n1: index=0,type=vhost-user,chardev=c1\n";
        let problems = netdevs(text);
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].found.contains("n1 is vhost-user"),
            "{}",
            problems[0]
        );
    }

    #[test]
    fn only_a_guest_that_can_go_on_may_leave() {
        for state in ["running", "paused", "prelaunch"] {
            assert_eq!(run_state(&state.into(), Side::Source), None);
        }
        for state in [
            "inmigrate",
            "postmigrate",
            "finish-migrate",
            "internal-error",
            "io-error",
            "shutdown",
            "guest-panicked",
            "save-vm",
            "suspended",
            "watchdog",
            "debug",
            "something-new",
        ] {
            let problem = run_state(&state.into(), Side::Source).unwrap();
            assert!(problem.found.contains(state), "{problem}");
        }
        assert_eq!(run_state(&"inmigrate".into(), Side::Target), None);
        assert!(run_state(&"running".into(), Side::Target).is_some());
    }
}
