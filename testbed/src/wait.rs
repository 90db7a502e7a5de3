//! Waiting for a state, with a bound; and for one's turn.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::TestbedError;

/// Between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Looks at `condition` until it gives a value, at most for `bound`; `what` names it in the error.
pub fn wait_until<T>(
    what: &str,
    bound: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T, TestbedError> {
    let deadline = Instant::now() + bound;
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            return Err(TestbedError::TimedOut {
                what: what.into(),
                bound,
                context: String::new(),
            });
        }
        thread::sleep(POLL_INTERVAL);
    }
}

static IN_THIS_PROCESS: Mutex<()> = Mutex::new(());

/// The right to run QEMUs: held by one test of the workspace at a time, in whatever process.
#[derive(Debug)]
pub struct Turn {
    _in_this_process: MutexGuard<'static, ()>,
    _across_processes: Flock<File>,
}

impl Turn {
    /// Waits for the right. It is given back when the value is dropped, also by a failing test.
    pub fn take() -> Result<Self, TestbedError> {
        // A test that failed while it held the lock has left nothing behind that matters.
        let in_this_process = IN_THIS_PROCESS
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/turn.lock");
        let what = format!("lock {}", path.display());
        let file = File::create(&path).map_err(TestbedError::io(&*what))?;
        let across_processes = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| TestbedError::io(&*what)(errno.into()))?;
        Ok(Self {
            _in_this_process: in_this_process,
            _across_processes: across_processes,
        })
    }
}
