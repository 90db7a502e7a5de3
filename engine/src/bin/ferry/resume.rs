//! `ferry resume`, and what it needs: notes that a command leaves beside its journal while it runs.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ferry_engine::Finished;
use ferry_engine::job::{JournalPlace, ResumedSource, ResumedTarget, Retire};
use ferry_engine::journal::{Journal, JournalError};
use ferry_engine::link::{TcpAcceptor, TcpConnector};
use ferry_engine::linux::{Process, ProcessId, RamFaults, RamPlace};
use ferry_engine::qemu::{Options, Qemu, Side};
use ferry_engine::vmm::VmmError;
use ferry_qmp::Address;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::args::{Common, Resume, TargetUri};
use crate::ending::{Refusal, Teller};
use crate::interrupts::Interrupts;
use crate::{host, say};

/// How long the target may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How long a QEMU may take to answer that may be waiting for a page.
const ATTACH_LIMIT: Duration = Duration::from_secs(20);

/// What a later engine has to know that is in no journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "side", rename_all = "kebab-case")]
pub(crate) enum Notes {
    /// Of `ferry migrate`.
    Source {
        /// The QMP socket.
        qmp: PathBuf,
        /// Where the guest goes.
        target: String,
        /// Whether QEMU is left stopped in the end.
        keep_source: bool,
    },
    /// Of `ferry receive`.
    Target {
        /// Where the source comes.
        listen: String,
        /// Guest RAM.
        ram: Vec<RamPlace>,
    },
}

/// Notes on disk, removed when the command has ended by itself.
#[derive(Debug)]
pub(crate) struct Kept(PathBuf);

impl Kept {
    /// Leaves them where they are, for whoever has to go on.
    pub(crate) fn leave(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        _ = fs::remove_file(&self.0);
    }
}

fn path_of(place: &JournalPlace) -> PathBuf {
    place.folder.join(format!("{}.resume", place.name))
}

impl Notes {
    /// Writes them, to last as long as the value does that is returned.
    pub(crate) fn keep(&self, place: &JournalPlace) -> Result<Kept, Refusal> {
        let path = path_of(place);
        let failed = |error| Refusal::because(format!("{}: {error}", path.display()));
        let text = serde_json::to_vec(self).map_err(|error| Refusal::of(&error))?;
        let temporary = path.with_extension("resume.new");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)?;
        Ok(Kept(path))
    }

    fn read(path: &Path) -> Result<Self, Refusal> {
        let failed = |error: &dyn std::fmt::Display| {
            Refusal::because(format!(
                "{}: {error}: is that the job's name, and the --state-dir of the engine that died?",
                path.display()
            ))
        };
        let text = fs::read(path).map_err(|error| failed(&error))?;
        serde_json::from_slice(&text).map_err(|error| failed(&error))
    }
}

pub(crate) async fn run(args: &Resume) -> ExitCode {
    let mut teller = Teller {
        json: args.common.json,
        figures: true,
        job: Some(args.job.to_string()),
    };
    let mut interrupts = match Interrupts::listen() {
        Ok(interrupts) => interrupts,
        Err(error) => return teller.refused(Refusal::of(&error)),
    };
    let found = find(args);
    let outcome = match found {
        Ok((notes, process, place)) => {
            teller.figures = matches!(notes, Notes::Source { .. });
            let resumed = resume(notes, process, &place, &args.common);
            tokio::pin!(resumed);
            loop {
                tokio::select! {
                    outcome = &mut resumed => break outcome,
                    // The guest needs its pages: only a kill ends this, and it can be resumed again.
                    () = interrupts.next() => say::tell(
                        "ferry: the guest waits for its pages, so this goes on; kill it, and resume it \
                         again, if it has to be",
                    ),
                }
            }
        }
        Err(refusal) => Err(refusal),
    };
    match outcome {
        Ok(finished) => teller.finished(&finished),
        Err(refusal) => teller.refused(refusal),
    }
}

/// What the dead engine has left of a job.
fn find(args: &Resume) -> Result<(Notes, Arc<Process>, JournalPlace), Refusal> {
    let name = args.job.to_string();
    let place = JournalPlace {
        folder: host::state_folder(&args.common.state)?,
        name: name.clone(),
    };
    let notes = Notes::read(&path_of(&place))?;
    let mut numbers = name.strip_prefix("qemu-").unwrap_or_default().split('-');
    let pid = numbers.next().and_then(|pid| pid.parse().ok());
    let start = numbers.next().and_then(|start| start.parse().ok());
    let (Some(pid), Some(start_time_ticks)) = (pid, start) else {
        return Err(Refusal::because(format!("{name} is no job's name")));
    };
    let pid = Pid::from_raw(pid);
    let id = ProcessId {
        pid,
        start_time_ticks,
    };
    let process = Process::reopen(id).map_err(|error| Refusal::of(&error))?;
    Ok((notes, Arc::new(process), place))
}

async fn resume(
    notes: Notes,
    process: Arc<Process>,
    place: &JournalPlace,
    common: &Common,
) -> Result<Finished, Refusal> {
    match notes {
        Notes::Source {
            qmp,
            target,
            keep_source,
        } => resume_source(&qmp, &target, keep_source, place, common).await,
        Notes::Target { listen, ram } => resume_target(&process, &listen, &ram, place).await,
    }
}

async fn resume_source(
    qmp: &Path,
    target: &str,
    keep_source: bool,
    place: &JournalPlace,
    common: &Common,
) -> Result<Finished, Refusal> {
    let uri: TargetUri = target
        .parse()
        .map_err(|error| Refusal::because(str::to_owned(error)))?;
    let addresses = host::resolve(&uri.authority, common).await?;
    let address = Address::Unix(qmp.to_owned());
    let options = Options::default();
    let attaching = Qemu::attach(&address, &options);
    let qemu = tokio::time::timeout(ATTACH_LIMIT, attaching)
        .await
        .map_err(|error| Refusal::of(&error))?
        .map_err(|error| Refusal::of(&error))?;
    let vm = qemu.vm(Side::Source).map_err(|error| Refusal::of(&error))?;
    // The dead engine's, at which nobody listens.
    let steered = place
        .folder
        .join("jobs")
        .join(format!("{}.sock", place.name));
    _ = fs::remove_file(steered);
    say::tell(format_args!(
        "Serving the guest at {target} with its pages."
    ));
    let resumed = ResumedSource {
        ram: vm.ram,
        guest: vm.guest,
        connector: Arc::new(TcpConnector::to(addresses, CONNECT_LIMIT)),
        journal: place.clone(),
        retire: if keep_source {
            Retire::LeaveStopped
        } else {
            Retire::Quit
        },
    };
    let finished = resumed.run(tell_left).await;
    ended(place, finished.map_err(|error| Refusal::of(&error)))
}

async fn resume_target(
    process: &Arc<Process>,
    listen: &str,
    ram: &[RamPlace],
    place: &JournalPlace,
) -> Result<Finished, Refusal> {
    let unusable = |error: &VmmError| Refusal::of(error);
    // Before anything is looked at: pages may be placed by nobody else.
    check_free(place)?;
    let adopted =
        RamFaults::adopt_at(Arc::clone(process), ram).map_err(|error| unusable(&error))?;
    let idle = || {
        let what = "the guest here waits for no pages: look whether it runs, with QMP query-status";
        Refusal::because(what.to_owned())
    };
    let (faults, layout) = adopted.ok_or_else(idle)?;
    let missing = faults
        .without_memory(&layout)
        .map_err(|error| unusable(&error))?;
    let pager = faults.pager().ok_or_else(idle)?;
    let listening = |error| Refusal::because(format!("cannot listen on {listen}: {error}"));
    let acceptor = TcpAcceptor::bind(listen).await.map_err(listening)?;
    say::tell(format_args!(
        "Listening on ferry://{listen} for the rest of the guest's pages."
    ));
    let resumed = ResumedTarget {
        layout,
        faults: Box::new(faults),
        pager,
        missing,
        acceptor: Box::new(acceptor),
        journal: place.clone(),
    };
    let finished = resumed.run(tell_left).await;
    ended(place, finished.map_err(|error| Refusal::of(&error)))
}

/// Refuses where another engine is at work.
fn check_free(place: &JournalPlace) -> Result<(), Refusal> {
    match Journal::reopen(&place.folder, &place.name) {
        Err(error @ JournalError::Busy { .. }) => Err(Refusal::of(&error)),
        _ => Ok(()),
    }
}

fn ended(place: &JournalPlace, finished: Result<Finished, Refusal>) -> Result<Finished, Refusal> {
    if finished.is_ok() {
        _ = fs::remove_file(path_of(place));
    }
    finished
}

fn tell_left(pages: u64) {
    let left = crate::ending::bytes(pages * ferry_engine::core::layout::PAGE_SIZE as u64);
    say::tell(format_args!("{left} left"));
}
