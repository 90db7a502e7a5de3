//! `ferry migrate`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ferry_engine::core::message::{Notice, Outcome};
use ferry_engine::core::source::Postcopy;
use ferry_engine::host::control::{Folder, Server, Steered};
use ferry_engine::job::{JournalPlace, Retire};
use ferry_engine::link::TcpConnector;
use ferry_engine::message::Mode;
use ferry_engine::qemu::Side;
use ferry_engine::vmm::RunState;
use ferry_engine::{Bandwidth, Finished, Job, Migration};

use crate::args::Migrate;
use crate::ending::{Refusal, Teller};
use crate::interrupts::Interrupts;
use crate::resume::{Kept, Notes};
use crate::say;
use crate::{host, progress};

/// How long the target may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

pub(crate) async fn run(args: &Migrate) -> ExitCode {
    let mut teller = Teller {
        json: args.common.json,
        figures: true,
        job: None,
    };
    let mut interrupts = match Interrupts::listen() {
        Ok(interrupts) => interrupts,
        Err(error) => return teller.refused(Refusal::of(&error)),
    };
    let started = tokio::select! {
        started = start(args) => started,
        () = interrupts.next() => Err(Refusal::interrupted()),
    };
    match started {
        Ok(started) => {
            teller.job = Some(started.place.name.clone());
            teller.finished(&see_through(started, args, interrupts).await)
        }
        Err(refusal) => teller.refused(refusal),
    }
}

/// A migration that runs.
struct Started {
    job: Job,
    /// Where its journal is, and beside it the control socket of the same name.
    place: JournalPlace,
}

async fn start(args: &Migrate) -> Result<Started, Refusal> {
    let addresses = host::resolve(&args.target.authority, &args.common).await?;
    let throttling = args.throttling();
    let qemu = host::attach(&args.qmp, Side::Source, throttling).await?;
    let vm = qemu.vm(Side::Source).map_err(|error| Refusal::of(&error))?;
    let connector = Arc::new(TcpConnector::to(addresses, CONNECT_LIMIT));
    let place = host::journal(qemu.process(), &args.common)?;
    let mut source = Migration::source(vm, connector, args.target.to_string(), place.clone())
        .with_lanes(args.lanes())
        .with_mode(if args.live { Mode::Live } else { Mode::Paused })
        .with_downtime_limit(args.downtime_limit())
        .with_postcopy(args.postcopy())
        .with_at_timeout(args.at_timeout())
        .with_bandwidth(
            args.bandwidth
                .map_or(Bandwidth::Unlimited, Bandwidth::mib_per_second),
        )
        .with_compression(args.compression.into())
        .with_within_host(args.within_host.into())
        .with_retire(if args.keep_source {
            Retire::LeaveStopped
        } else {
            Retire::Quit
        });
    if args.suspend {
        source = source.with_run_at_target(RunState::Paused);
    }
    if let Some(seconds) = args.timeout {
        source = source.with_timeout(Duration::from_secs(seconds));
    }
    if let Some(throttling) = throttling {
        source = source.with_auto_converge(throttling);
    }
    let job = source.start().await;
    let job = job.map_err(|error| Refusal::of(&error))?;
    Ok(Started { job, place })
}

/// Watches it to its end; an interrupt cancels it.
async fn see_through(started: Started, args: &Migrate, mut interrupts: Interrupts) -> Finished {
    let Started { mut job, place } = started;
    if args.verbose {
        say::tell(format_args!("Job {}", place.name));
    }
    let notes = keep_notes(&place, args);
    let control = match open_control(&job, &place, args) {
        Ok(control) => Some(control),
        // The guest can be moved all the same.
        Err(refusal) => {
            let reason = refusal.reason;
            say::tell(format_args!("ferry: it cannot be steered: {reason}"));
            None
        }
    };
    let shown = args
        .verbose
        .then(|| tokio::spawn(progress::show(job.progress())));
    let steering = job.steering();
    let interrupts = tokio::spawn(async move {
        loop {
            interrupts.next().await;
            say::tell(format_args!("ferry: asked to give up"));
            steering.cancel();
        }
    });
    while let Some(notice) = job.notice().await {
        tell(&notice);
    }
    let finished = job.finish().await;
    if let (Some(notes), Outcome::InDoubt { .. }) = (notes, &finished.outcome) {
        notes.leave();
    }
    if let Some(control) = control {
        control.close().await;
    }
    interrupts.abort();
    if let Some(shown) = shown {
        // Its channel is closed: it ends by itself, after the last line.
        _ = shown.await;
    }
    finished
}

/// Keeps what a later engine needs, where this one may die and leave a guest that waits.
fn keep_notes(place: &JournalPlace, args: &Migrate) -> Option<Kept> {
    if args.postcopy() == Postcopy::Never {
        return None;
    }
    let notes = Notes::Source {
        qmp: host::socket_path(&args.qmp)?,
        target: args.target.to_string(),
        keep_source: args.keep_source,
    };
    kept(&notes, place)
}

/// Keeps notes; the guest can be moved without them.
pub(crate) fn kept(notes: &Notes, place: &JournalPlace) -> Option<Kept> {
    match notes.keep(place) {
        Ok(kept) => Some(kept),
        Err(refusal) => {
            let reason = refusal.reason;
            say::tell(format_args!(
                "ferry: `ferry resume` would not be possible: {reason}"
            ));
            None
        }
    }
}

/// Lets other commands watch and steer it.
fn open_control(job: &Job, place: &JournalPlace, args: &Migrate) -> Result<Server, Refusal> {
    let folder = Folder::make(&place.folder).map_err(|error| Refusal::of(&error))?;
    let steered = Steered {
        name: place.name.parse().map_err(|error| Refusal::of(&error))?,
        qmp: host::socket_path(&args.qmp),
        target: args.target.to_string(),
        steering: job.steering(),
        progress: job.progress(),
    };
    Server::open(folder, steered).map_err(|error| Refusal::of(&error))
}

/// Tells a notice to a person.
pub(crate) fn tell(notice: &Notice) {
    let text = match notice {
        Notice::LimitBelowFloor { limit, floor } => format!(
            "a blackout of {} ms cannot be had, {} ms count",
            limit.as_millis(),
            floor.as_millis()
        ),
        Notice::Throttled(percent) => {
            format!("rounds do not shrink: the guest's CPUs have {percent} % less time now")
        }
        Notice::NotThrottled { what } => {
            format!("the guest cannot be slowed, and the move goes on without: {what}")
        }
        Notice::TimeoutSuspends => "the guest is paused now, to finish the move".to_owned(),
        Notice::GuestStateChanged(RunState::Paused) => {
            "somebody paused the guest: it will be left paused".to_owned()
        }
        Notice::GuestStateChanged(RunState::Running) => {
            "somebody resumed the guest: it will be left running".to_owned()
        }
        Notice::GuestReset => "the guest was reset; the move goes on".to_owned(),
        Notice::TooLateToCancel => "too late to give up: the guest was given away".to_owned(),
        Notice::ResumedAfterGiven => {
            "SOMEBODY RESUMED THE GUEST HERE after it was given away: it was paused again"
                .to_owned()
        }
        Notice::AskingTarget => "the link was lost at the hand-over: asking the target".to_owned(),
        Notice::LaneLost { lane, what } => {
            format!("page {lane} was lost, the others go on: {what}")
        }
        Notice::Mismatch { lane, region, page } => format!(
            "page {} of {region} came on page {lane} as a change of something that the target does \
             not have: it is sent again, and every page as a whole from now on",
            page.0
        ),
        Notice::NoPostcopy => {
            "post-copy cannot be had, `ferry receive` says why: the move goes on without it"
                .to_owned()
        }
        Notice::HandsOverBefore => {
            "copying cannot meet the downtime limit: the guest is handed over now, its pages follow"
                .to_owned()
        }
        Notice::Leftover(text) => text.clone(),
        _ => return,
    };
    say::tell(format_args!("ferry: {text}"));
}
