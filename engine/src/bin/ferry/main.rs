//! The `ferry` command: arguments and output. Everything else is the engine's.

mod args;
mod ending;
mod host;
mod interrupts;
mod jobs;
mod migrate;
mod progress;
mod receive;
mod resume;
mod say;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use crate::args::{Args, Command};

/// Threads of the asynchronous part, which only waits: pages have threads of their own.
const RUNTIME_THREADS: usize = 2;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return ending::usage(&error),
    };
    let filter = EnvFilter::try_from_env("FERRY_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would tell of a closed standard error on standard error, and panic.
        .log_internal_errors(false)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            say::tell(format_args!("ferry: the host gives no threads: {error}"));
            return ExitCode::from(ending::REFUSED);
        }
    };
    let code = runtime.block_on(async {
        match &args.command {
            Command::Migrate(migrate) => migrate::run(migrate).await,
            Command::Receive(receive) => receive::run(receive).await,
            Command::Jobs(args) => jobs::list(args).await,
            Command::Jobinfo(args) => jobs::info(args).await,
            Command::Setspeed(args) => jobs::set_speed(args).await,
            Command::Setmaxdowntime(args) => jobs::set_max_downtime(args).await,
            Command::Postcopy(args) => jobs::postcopy(args).await,
            Command::Resume(args) => resume::run(args).await,
            Command::Jobabort(args) => jobs::abort(args).await,
        }
    });
    // A VMM that hangs must not keep the command from ending once its end was told.
    runtime.shutdown_background();
    code
}
