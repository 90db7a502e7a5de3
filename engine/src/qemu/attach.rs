//! Taking hold of a running QEMU by its QMP socket.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ferry_qmp::commands::{
    QomGet, QueryCpusFast, QueryMigrate, QueryStatus, QueryTarget, QueryVersion, Status,
};
use ferry_qmp::{Address, Client, MigrationStatus, Version};
use nix::unistd::Pid;
use tokio::runtime::Handle;

use super::guest::QemuGuest;
use super::incoming::Incoming;
use super::monitor::Monitor;
use super::outgoing::Outgoing;
use super::ram::{self, Survey};
use super::settings::{Settings, Side};
use super::state::QemuState;
use crate::core::layout::Layout;
use crate::linux::{Access, Process, RamPlace};
use crate::vmm::{Faults, Ram as _, Stopped, Vm, VmmError};

/// How to attach.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bounds of the QMP connection.
    pub qmp: ferry_qmp::Options,
    /// QEMU's process, where the socket does not tell: with a proxy before QEMU, for instance. A
    /// socket that a management daemon has opened and handed to QEMU does tell.
    pub pid: Option<i32>,
    /// A folder, as QEMU sees the file system, in which a private folder for a local socket can be
    /// made.
    pub socket_dir: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            qmp: ferry_qmp::Options::default(),
            pid: None,
            socket_dir: PathBuf::from("/tmp"),
        }
    }
}

/// What is said for a QEMU that does not say why.
const NO_REASON: &str = "QEMU gave no reason; its own log may have one";

/// What does not change while a QEMU lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) arch: String,
    pub(super) machine: String,
    pub(super) vmm: String,
    version: Version,
}

/// How far a migration is, and what it changed.
#[derive(Default)]
pub(super) struct Session {
    pub(super) outgoing: Outgoing,
    pub(super) incoming: Incoming,
    pub(super) settings: Option<Settings>,
    /// A target may have announced the guest's network addresses: announce them again when the
    /// guest goes on here.
    pub(super) announce: bool,
}

/// What the guest and its device state share.
pub(super) struct Inner {
    monitor: Monitor,
    runtime: Handle,
    process: Arc<Process>,
    socket_dir: PathBuf,
    identity: Identity,
    attached_at: Instant,
    layout: Option<Layout>,
    spares: Vec<String>,
    session: Mutex<Session>,
}

/// A QEMU under our hand. Nothing has been changed in it.
pub struct Qemu {
    inner: Arc<Inner>,
    survey: Survey,
}

impl Qemu {
    /// Connects to the QMP server at `address` and finds out what is there. Changes nothing.
    ///
    /// Must be called within a tokio runtime, which has to live as long as the value and the parts
    /// that come of it.
    pub async fn attach(address: &Address, options: &Options) -> Result<Self, VmmError> {
        let (client, events) = Client::connect(address, &options.qmp)
            .await
            .map_err(|error| VmmError::failed("cannot attach to QEMU", error))?;
        let pid = peer_process(&client, options)?;
        let process = Arc::new(Process::open(pid)?);
        let monitor = Monitor::new(client, events);
        check_process(&monitor, &process).await?;
        let identity = identify(&monitor).await?;
        let survey = ram::survey(&monitor, &process).await?;
        let inner = Inner {
            monitor,
            runtime: Handle::current(),
            process,
            socket_dir: options.socket_dir.clone(),
            identity,
            attached_at: Instant::now(),
            layout: survey.layout(),
            spares: survey.spares.clone(),
            session: Mutex::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
            survey,
        })
    }

    /// QEMU's process.
    pub fn process(&self) -> &Arc<Process> {
        &self.inner.process
    }

    /// Name and version: `QEMU 10.0.2`.
    pub fn name(&self) -> &str {
        &self.inner.identity.vmm
    }

    /// The versioned machine type: `pc-q35-10.0`.
    pub fn machine(&self) -> &str {
        &self.inner.identity.machine
    }

    /// The parts that a migration works with, at the `side` that this QEMU is.
    ///
    /// # Errors
    /// [`VmmError::Unfit`] when not all guest RAM can be migrated; [`Qemu::problems`] says the same
    /// with more words.
    pub fn vm(&self, side: Side) -> Result<Vm, VmmError> {
        if let Some(problem) = self.survey.problems.first() {
            return Err(VmmError::Unfit {
                what: problem.to_string(),
            });
        }
        let access = match side {
            Side::Source => Access::Read,
            Side::Target => Access::ReadWrite,
        };
        let (ram, tracker) = self.survey.open(&self.inner.process, access)?;
        let faults: Option<Box<dyn Faults>> = match side {
            Side::Source => None,
            Side::Target => {
                let faults = self.survey.faults(&self.inner.process, ram.layout())?;
                Some(Box::new(faults))
            }
        };
        Ok(Vm {
            ram: Arc::new(ram),
            tracker: Box::new(tracker),
            guest: Box::new(QemuGuest::new(Arc::clone(&self.inner))),
            state: Box::new(QemuState::new(Arc::clone(&self.inner))),
            faults,
        })
    }

    /// Where guest RAM is, for an engine that comes after this one.
    pub fn ram_places(&self) -> Vec<RamPlace> {
        self.survey.places()
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }

    pub(super) fn survey(&self) -> &Survey {
        &self.survey
    }
}

impl Inner {
    pub(super) fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    pub(super) fn process(&self) -> &Arc<Process> {
        &self.process
    }

    pub(super) fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn version(&self) -> &Version {
        &self.identity.version
    }

    /// The RAM as it was found, if all of it can be migrated.
    pub(super) fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// Memory back ends that nothing used when it was attached to.
    pub(super) fn spares(&self) -> &[String] {
        &self.spares
    }

    /// Runs `work` with the session. Only the VM thread does, so nobody ever waits here.
    pub(super) fn with_session<T>(&self, work: impl FnOnce(&mut Session) -> T) -> T {
        work(&mut self.session.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks for the run state.
    pub(super) async fn status(&self) -> Result<Status, VmmError> {
        self.monitor.ask(QueryStatus).await
    }

    /// Whether the vCPUs run; asks QEMU only when no event has told yet.
    pub(super) async fn is_running(&self) -> Result<bool, VmmError> {
        match self.monitor.seen().running {
            Some(running) => Ok(running),
            None => Ok(self.status().await?.running),
        }
    }

    /// Since when the guest stands still, with its disks drained at `drained_at`.
    pub(super) fn stopped(&self, drained_at: Instant) -> Stopped {
        let at = self.monitor.seen().stopped_at.unwrap_or(self.attached_at);
        Stopped { at, drained_at }
    }

    /// Asks for the state of QEMU's own migration.
    pub(super) async fn migration_status(&self) -> Result<MigrationStatus, VmmError> {
        let migration = self.monitor.ask(QueryMigrate).await?;
        Ok(migration.status.unwrap_or(MigrationStatus::None))
    }

    /// The error of QEMU's own migration having failed at `what`, in its own words where it has any.
    pub(super) async fn migration_failure(&self, what: &str) -> VmmError {
        match self.monitor.ask(QueryMigrate).await {
            Ok(migration) => {
                let why = migration.error_desc.unwrap_or_else(|| NO_REASON.to_owned());
                VmmError::failed(what, why)
            }
            // QEMU before 9.1 ends when it cannot load.
            Err(VmmError::Gone { what: how }) => VmmError::Gone {
                what: format!("{what}: {how}; its own log says why"),
            },
            Err(error) => error,
        }
    }
}

/// The process at the other end of the socket.
fn peer_process(client: &Client, options: &Options) -> Result<Pid, VmmError> {
    let peer = client.peer().and_then(|peer| peer.pid);
    match options.pid.or(peer) {
        Some(pid) => Ok(Pid::from_raw(pid)),
        None => Err(VmmError::Unfit {
            what: format!(
                "{} does not tell which process QEMU is: use its Unix socket (-qmp unix:PATH,server=on,wait=off)",
                client.address()
            ),
        }),
    }
}

/// Makes sure that the process is the QEMU that answers: one of its threads is a vCPU of the guest.
async fn check_process(monitor: &Monitor, process: &Process) -> Result<(), VmmError> {
    let vcpus = monitor.ask(QueryCpusFast).await?;
    let Some(vcpu) = vcpus.first() else {
        return Ok(());
    };
    if has_thread(process, vcpu.thread_id) {
        return Ok(());
    }
    Err(VmmError::Unfit {
        what: format!(
            "process {} has this QMP socket, but is not the QEMU that answers on it: use QEMU's own \
             socket, or name QEMU's process",
            process.pid()
        ),
    })
}

/// Whether a thread of the process has the number `thread` in its own pid namespace.
fn has_thread(process: &Process, thread: i32) -> bool {
    let threads = process.threads().unwrap_or_default();
    let own = |ours: Pid| own_number(process.pid(), ours);
    threads.into_iter().any(|ours| own(ours) == Some(thread))
}

/// The number that a thread of process `pid` has in its own pid namespace.
pub(super) fn own_number(pid: Pid, thread: Pid) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?;
    let numbers = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_whitespace().next_back()?.parse().ok()
}

async fn identify(monitor: &Monitor) -> Result<Identity, VmmError> {
    let (version, target, machine) = tokio::try_join!(
        monitor.ask(QueryVersion),
        monitor.ask(QueryTarget),
        monitor.ask(QomGet::machine_type()),
    )?;
    let machine = machine.as_str().unwrap_or_default();
    Ok(Identity {
        arch: target.arch,
        machine: machine
            .strip_suffix("-machine")
            .unwrap_or(machine)
            .to_owned(),
        vmm: format!("QEMU {version}"),
        version,
    })
}
