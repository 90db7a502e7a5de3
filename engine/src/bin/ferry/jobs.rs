//! Watching and steering migrations that run: `ferry jobs` and what is done to one of them.

use std::fmt::Display;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ferry_engine::core::outcome::in_full;
use ferry_engine::host::control::{
    Answer, Client, ClientError, Command, Folder, JobInfo, JobName, RefusalCode,
};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::args::{
    Jobabort, Jobinfo, Jobs, PostcopyNow, Setmaxdowntime, Setspeed, StateDir, Which,
};
use crate::ending::{FAILED, REFUSED, Refusal, bytes};
use crate::progress::{lanes, line, packing, seconds};
use crate::{host, say};

/// How long an engine may take to say how far it is.
const LOOK_LIMIT: Duration = Duration::from_secs(3);

/// How long an engine may take to obey: longer than it gives itself.
const ORDER_LIMIT: Duration = Duration::from_secs(10);

/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Why a command did not do what was wanted.
struct Trouble {
    reason: String,
    code: u8,
}

impl Trouble {
    /// Nothing was asked of any migration.
    fn refused(reason: impl Display) -> Self {
        Self {
            reason: reason.to_string(),
            code: REFUSED,
        }
    }

    /// A migration was asked, and it is not done.
    fn failed(name: &JobName, reason: impl Display) -> Self {
        Self {
            reason: format!("job {name}: {reason}"),
            code: FAILED,
        }
    }
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        Self::refused(refusal.reason)
    }
}

/// What `--json` prints when there is nothing to print.
#[derive(Serialize)]
struct JsonTrouble<'a> {
    error: &'a str,
}

/// What `ferry jobs --json` prints.
#[derive(Serialize)]
struct JsonJobs<'a> {
    jobs: Vec<&'a JobInfo>,
    /// Those whose engines do not answer.
    silent: Vec<String>,
}

fn ended(result: Result<(), Trouble>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Trouble { reason, code }) => {
            say::tell(format_args!("ferry: {reason}"));
            ExitCode::from(code)
        }
    }
}

fn ended_in_json(result: Result<(), Trouble>) -> ExitCode {
    if let Err(trouble) = &result {
        let error = &trouble.reason;
        _ = print_json(&JsonTrouble { error });
    }
    ended(result)
}

/// `ferry jobs`.
pub(crate) async fn list(args: &Jobs) -> ExitCode {
    if args.json {
        ended_in_json(try_list(args).await)
    } else {
        ended(try_list(args).await)
    }
}

async fn try_list(args: &Jobs) -> Result<(), Trouble> {
    let running = running(&args.state).await?;
    if args.json {
        return print_json(&JsonJobs {
            jobs: running.iter().filter_map(|job| job.info().ok()).collect(),
            silent: running
                .iter()
                .filter(|job| job.info().is_err())
                .map(|job| job.name.to_string())
                .collect(),
        });
    }
    if running.is_empty() {
        say::tell("No migration runs here.");
        return Ok(());
    }
    let width = running.iter().map(|job| job.name.to_string().len()).max();
    let width = width.unwrap_or_default();
    say::print(format_args!(
        "{:width$}  {:>5}  {:>12}  {:<28}  TO",
        "JOB", "DONE", "RATE", "STATE"
    ));
    for job in &running {
        match job.info() {
            Ok(JobInfo {
                figures, target, ..
            }) => say::print(format_args!(
                "{:width$}  {:>3} %  {:>12}  {:<28}  {target}",
                job.name,
                figures.percent,
                format!("{}/s", bytes(figures.rate_bytes_per_s)),
                figures.doing,
            )),
            Err(error) => say::print(format_args!("{:width$}  {}", job.name, in_full(error))),
        }
    }
    Ok(())
}

/// A migration with somebody who listens.
struct Running {
    name: JobName,
    folder: Arc<Folder>,
    look: Result<JobInfo, ClientError>,
}

impl Running {
    fn info(&self) -> Result<&JobInfo, &ClientError> {
        self.look.as_ref()
    }

    async fn connect(&self, patience: Duration) -> Result<Client, Trouble> {
        let connected = Client::connect(&self.folder, &self.name, patience).await;
        connected.map_err(|error| Trouble::failed(&self.name, in_full(&error)))
    }
}

/// The migrations that run, by name. All are asked at the same time: one that hangs holds up nobody.
async fn running(state: &StateDir) -> Result<Vec<Running>, Trouble> {
    let refused = |error| Trouble::refused(in_full(&error));
    let state = host::state_folder(state)?;
    let Some(folder) = Folder::open(&state).map_err(refused)? else {
        return Ok(Vec::new());
    };
    let (names, folder) = (folder.names().map_err(refused)?, Arc::new(folder));
    let mut looks = JoinSet::new();
    for name in names {
        let folder = Arc::clone(&folder);
        looks.spawn(async move {
            let look = look_at(&folder, &name).await;
            Running { name, folder, look }
        });
    }
    let mut running = looks.join_all().await;
    running.retain(|job| !matches!(job.look, Err(ClientError::Gone | ClientError::Ended)));
    running.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(running)
}

async fn look_at(folder: &Folder, name: &JobName) -> Result<JobInfo, ClientError> {
    let mut client = Client::connect(folder, name, LOOK_LIMIT).await?;
    match client.ask(&Command::Info).await? {
        Answer::Info { job } => Ok(*job),
        Answer::Refused { reason, .. } => Err(ClientError::Refused { reason }),
        _ => Err(ClientError::Garbled),
    }
}

/// The migration that is meant.
async fn find(which: &Which) -> Result<Running, Trouble> {
    let mut running = running(&which.state).await?;
    let names: Vec<String> = running.iter().map(|job| job.name.to_string()).collect();
    let at = if let Some(name) = &which.job {
        running.iter().position(|job| job.name == *name)
    } else if let Some(address) = &which.qmp {
        let path = host::socket_path(address);
        path.and_then(|path| {
            let path = path.to_string_lossy();
            let is_its = |info: &JobInfo| info.qmp.as_deref() == Some(&*path);
            let is_meant = |job: &Running| job.info().is_ok_and(is_its);
            running.iter().position(is_meant)
        })
    } else {
        match names.len() {
            0 | 1 => (!names.is_empty()).then_some(0),
            count => {
                let names = names.join(", ");
                return Err(Trouble::refused(format_args!(
                    "{count} migrations run here, name one of them: {names}"
                )));
            }
        }
    };
    at.map(|at| running.swap_remove(at))
        .ok_or_else(|| not_found(which, &names))
}

fn not_found(which: &Which, names: &[String]) -> Trouble {
    let running = match names {
        [] => "no migration runs here".to_owned(),
        names => format!("those that run are: {}", names.join(", ")),
    };
    let hint = "with --state-dir at `ferry migrate` say the same here";
    match (&which.job, &which.qmp) {
        (Some(name), _) => {
            Trouble::refused(format_args!("there is no job {name}: {running}; {hint}"))
        }
        (None, Some(qmp)) => Trouble::refused(format_args!(
            "no job moves the guest of {qmp}: {running}; {hint}"
        )),
        (None, None) => Trouble::refused(format_args!("{running}; {hint}")),
    }
}

/// `ferry jobinfo`.
pub(crate) async fn info(args: &Jobinfo) -> ExitCode {
    if args.json {
        ended_in_json(try_info(args).await)
    } else {
        ended(try_info(args).await)
    }
}

async fn try_info(args: &Jobinfo) -> Result<(), Trouble> {
    let job = find(&args.which).await?;
    if args.watch {
        return watch(&job, args).await;
    }
    let failed = |error: &ClientError| Trouble::failed(&job.name, in_full(error));
    let info = job.info().map_err(failed)?;
    if args.json {
        return print_json(info);
    }
    say::print(in_words(info).join("\n"));
    Ok(())
}

/// Tells how far it is until it is over, or nobody reads any more.
async fn watch(job: &Running, args: &Jobinfo) -> Result<(), Trouble> {
    let mut client = job.connect(LOOK_LIMIT).await?;
    let mut ticks = interval(WATCH_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let info = match client.ask(&Command::Info).await {
            Ok(Answer::Info { job }) => job,
            Ok(answer) => return done(&job.name, answer),
            Err(ClientError::Ended) => break,
            Err(error) => return Err(Trouble::failed(&job.name, in_full(&error))),
        };
        if args.json {
            print_json(&info)?;
        } else {
            let figures = &info.figures;
            let printed =
                say::try_print(format_args!("[{:>3} %] {}", figures.percent, line(figures)));
            printed.map_err(|error| unread(&error))?;
        }
    }
    say::tell(format_args!(
        "Job {} is over; its `ferry migrate` tells how it ended.",
        job.name
    ));
    Ok(())
}

fn in_words(info: &JobInfo) -> Vec<String> {
    let JobInfo {
        name,
        target,
        engine_pid,
        figures,
        ..
    } = info;
    let told = |what: &str, value: String| format!("{:18}{value}", format!("{what}:"));
    let limit = info.bandwidth_bytes_per_s;
    let limit = limit.map_or("unlimited".to_owned(), |limit| {
        format!("at most {}/s", bytes(limit.get()))
    });
    let max_downtime = figures.max_downtime_ms;
    let blackout = match figures.predicted_blackout_ms {
        None => "not known before the first round is over".to_owned(),
        Some(ms) => format!("~{ms} ms if the guest were stopped now"),
    };
    let mut lines = vec![told("Job", name.clone())];
    let qmp = info.qmp.as_ref();
    lines.extend(qmp.map(|path| told("QMP socket", path.clone())));
    lines.extend([
        told("Target", target.clone()),
        told("Engine's process", engine_pid.to_string()),
        told("State", figures.doing.clone()),
        told("Done", format!("{} %", figures.percent)),
        told("Elapsed", seconds(figures.elapsed_ms)),
        told("Round", figures.round.to_string()),
        told("  done", bytes(figures.done_bytes)),
        told("  remaining", bytes(figures.remaining_bytes)),
    ]);
    lines.extend(figures.left_ms.map(|ms| told("  time left", seconds(ms))));
    lines.extend([
        told("On the wire", bytes(figures.bytes_wire)),
        told(
            "Rate",
            format!("{}/s of pages", bytes(figures.rate_bytes_per_s)),
        ),
        told("Bandwidth", limit),
        told(
            "Guest dirties",
            format!("{}/s", bytes(figures.dirty_bytes_per_s)),
        ),
        told("Blackout", blackout),
        told("Max. downtime", format!("{max_downtime} ms")),
        told("Connections", lanes(figures)),
    ]);
    let (percent, max) = (figures.throttled_percent, figures.throttled_percent_max);
    let slowed = format!("by {percent} % of its time, at most by {max} %");
    lines.extend((max > 0).then(|| told("Guest slowed", slowed)));
    lines.extend(packing(figures).map(|packing| told("Compression", packing)));
    lines
}

/// `ferry setspeed`.
pub(crate) async fn set_speed(args: &Setspeed) -> ExitCode {
    let limit = args.speed;
    ended(order(&args.which, &Command::SetSpeed { limit }).await)
}

/// `ferry setmaxdowntime`.
pub(crate) async fn set_max_downtime(args: &Setmaxdowntime) -> ExitCode {
    let ms = args.ms;
    ended(order(&args.which, &Command::SetMaxDowntime { ms }).await)
}

/// `ferry postcopy`.
pub(crate) async fn postcopy(args: &PostcopyNow) -> ExitCode {
    ended(order(&args.which, &Command::Postcopy).await)
}

/// `ferry jobabort`.
pub(crate) async fn abort(args: &Jobabort) -> ExitCode {
    ended(order(&args.which, &Command::Abort).await)
}

async fn order(which: &Which, command: &Command) -> Result<(), Trouble> {
    let job = find(which).await?;
    let mut client = job.connect(ORDER_LIMIT).await?;
    match client.ask(command).await {
        Ok(answer) => done(&job.name, answer),
        Err(error) => Err(Trouble::failed(&job.name, in_full(&error))),
    }
}

fn done(name: &JobName, answer: Answer) -> Result<(), Trouble> {
    match answer {
        Answer::Done => Ok(()),
        // The value can be wrong only for an engine of another version.
        Answer::Refused {
            code: RefusalCode::Invalid,
            reason,
        } => Err(Trouble::refused(format_args!("job {name}: {reason}"))),
        Answer::Refused { reason, .. } => Err(Trouble::failed(name, reason)),
        _ => Err(Trouble::failed(name, ClientError::Garbled)),
    }
}

fn print_json(value: &impl Serialize) -> Result<(), Trouble> {
    let text = serde_json::to_string(value).map_err(Trouble::refused)?;
    say::try_print(text).map_err(|error| unread(&error))
}

fn unread(error: &std::io::Error) -> Trouble {
    Trouble {
        reason: format!("nobody reads what is printed: {error}"),
        code: FAILED,
    }
}
