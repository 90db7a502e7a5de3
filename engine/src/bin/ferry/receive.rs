//! `ferry receive`.

use std::process::ExitCode;

use ferry_engine::core::message::Outcome;
use ferry_engine::job::JournalPlace;
use ferry_engine::link::TcpAcceptor;
use ferry_engine::qemu::Side;
use ferry_engine::{Finished, Migration, TargetJob};

use crate::args::Receive;
use crate::ending::{Refusal, Teller};
use crate::interrupts::Interrupts;
use crate::resume::Notes;
use crate::say;
use crate::{host, migrate};

pub(crate) async fn run(args: &Receive) -> ExitCode {
    let mut teller = Teller {
        json: args.common.json,
        figures: false,
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
        Ok(Started { job, place, notes }) => {
            teller.job = Some(place.name.clone());
            let kept = migrate::kept(&notes, &place);
            let finished = see_through(job, &mut interrupts).await;
            if let (Some(kept), Outcome::InDoubt { .. }) = (kept, &finished.outcome) {
                kept.leave();
            }
            teller.finished(&finished)
        }
        Err(refusal) => teller.refused(refusal),
    }
}

/// A target that waits.
struct Started {
    job: TargetJob,
    place: JournalPlace,
    notes: Notes,
}

async fn start(args: &Receive) -> Result<Started, Refusal> {
    let addresses = host::resolve(&args.listen, &args.common).await?;
    let qemu = host::attach(&args.qmp, Side::Target, None).await?;
    let vm = qemu.vm(Side::Target).map_err(|error| Refusal::of(&error))?;
    let listen = &args.listen;
    let listening = |error| Refusal::because(format!("cannot listen on {listen}: {error}"));
    let acceptor = TcpAcceptor::bind(&addresses[..]).await.map_err(listening)?;
    let address = acceptor.local_addr().map_err(listening)?;
    let journal = host::journal(qemu.process(), &args.common)?;
    let notes = Notes::Target {
        listen: address.to_string(),
        ram: qemu.ram_places(),
    };
    let place = journal.clone();
    let job = Migration::target(vm, Box::new(acceptor), journal)
        .start()
        .await;
    let job = job.map_err(|error| Refusal::of(&error))?;
    if args.common.json {
        say::print(serde_json::json!({ "listening": format!("ferry://{address}") }));
    } else {
        say::print(format_args!("Listening on ferry://{address}"));
    }
    Ok(Started { job, place, notes })
}

async fn see_through(mut job: TargetJob, interrupts: &mut Interrupts) -> Finished {
    loop {
        tokio::select! {
            notice = job.notice() => match notice {
                Some(notice) => migrate::tell(&notice),
                None => break,
            },
            () = interrupts.next() => {
                say::tell(format_args!("ferry: asked to give up"));
                job.cancel();
            }
        }
    }
    job.finish().await
}
