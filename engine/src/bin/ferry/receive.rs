//! `ferry receive`.

use std::io::Write as _;
use std::process::ExitCode;

use ferry_engine::link::TcpAcceptor;
use ferry_engine::qemu::Side;
use ferry_engine::{Finished, Migration, TargetJob};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::Receive;
use crate::ending::{Refusal, Teller};
use crate::{host, migrate};

pub(crate) async fn run(args: &Receive) -> ExitCode {
    let teller = Teller {
        json: args.common.json,
        figures: false,
    };
    match start(args).await {
        Ok(job) => teller.finished(&see_through(job).await),
        Err(refusal) => teller.refused(refusal),
    }
}

async fn start(args: &Receive) -> Result<TargetJob, Refusal> {
    let address = host::resolve(&args.listen, &args.common).await?;
    let qemu = host::attach(&args.qmp, Side::Target).await?;
    let vm = qemu.vm(Side::Target).map_err(|error| Refusal::of(&error))?;
    let listening = |error| Refusal::because(format!("cannot listen on {address}: {error}"));
    let acceptor = TcpAcceptor::bind(&address.to_string())
        .await
        .map_err(listening)?;
    let address = acceptor.local_addr().map_err(listening)?;
    let journal = host::journal(qemu.process(), &args.common);
    let job = Migration::target(vm, Box::new(acceptor), journal)
        .start()
        .await;
    let job = job.map_err(|error| Refusal::of(&error))?;
    // Whoever started this command waits for the line; on a pipe it would stay in a buffer.
    println!("Listening on ferry://{address}");
    _ = std::io::stdout().flush();
    Ok(job)
}

async fn see_through(mut job: TargetJob) -> Finished {
    loop {
        tokio::select! {
            notice = job.notice() => match notice {
                Some(notice) => migrate::tell(&notice),
                None => break,
            },
            true = interrupted() => {
                eprintln!("ferry: giving up");
                job.cancel();
            }
        }
    }
    job.finish().await
}

/// Waits for Ctrl-C, or for a polite kill; false when there is no waiting for them.
pub(crate) async fn interrupted() -> bool {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return false;
    };
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt.is_ok(),
        terminate = terminate.recv() => terminate.is_some(),
    }
}
