//! [`Guest`] of a QEMU: its run state and its life.

use std::sync::Arc;
use std::time::Instant;

use ferry_qmp::commands::{AnnounceSelf, Cont, Quit, Stop};

use super::attach::Inner;
use super::flush::Flusher;
use super::monitor::{Own, millis};
use super::throttle::{self, Throttle};
use super::{inventory, limits};
use crate::vmm::{EventSink, Guest, Inventory, PauseFor, RunState, Stopped, VmmError};

/// The guest in a QEMU.
pub struct QemuGuest {
    qemu: Arc<Inner>,
    throttle: Throttle,
}

impl QemuGuest {
    pub(super) fn new(qemu: Arc<Inner>) -> Self {
        Self {
            qemu,
            throttle: Throttle::default(),
        }
    }
}

impl Guest for QemuGuest {
    fn watch(&mut self, sink: EventSink) -> Result<(), VmmError> {
        self.qemu.monitor().watch(sink);
        throttle::clear_leftovers(self.qemu.process())
    }

    fn inventory(&mut self) -> Result<Inventory, VmmError> {
        self.qemu.runtime().block_on(inventory::read(&self.qemu))
    }

    fn run_state(&mut self) -> Result<RunState, VmmError> {
        let status = self.qemu.runtime().block_on(self.qemu.status())?;
        Ok(if status.running {
            RunState::Running
        } else {
            RunState::Paused
        })
    }

    fn flusher(&mut self) -> Box<dyn FnMut() -> Result<(), VmmError> + Send> {
        let flusher = Flusher::new(Arc::clone(self.qemu.process()));
        Box::new(move || flusher.flush())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmmError> {
        self.throttle.set(&self.qemu, percent)
    }

    fn pause(&mut self, why: PauseFor) -> Result<Stopped, VmmError> {
        let qemu = &self.qemu;
        if qemu.monitor().seen().asleep {
            return Err(VmmError::Unfit {
                what: "the guest sleeps (S3), which does not survive a move: wake it first".into(),
            });
        }
        match why {
            PauseFor::Copy => qemu.runtime().block_on(stop(qemu)),
            PauseFor::Switchover => qemu.with_session(|session| {
                qemu.runtime().block_on(session.outgoing.switch_over(qemu))
            }),
        }
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        let qemu = &self.qemu;
        qemu.runtime().block_on(cont(qemu))?;
        let announce = qemu.with_session(|session| std::mem::take(&mut session.announce));
        if announce {
            qemu.runtime().block_on(announce_self(qemu));
        }
        Ok(())
    }

    fn restore(&mut self) -> Result<(), VmmError> {
        let cleared = self.throttle.clear();
        let qemu = &self.qemu;
        let restored = qemu.with_session(|session| {
            let Some(settings) = &session.settings else {
                return Ok(());
            };
            qemu.runtime().block_on(settings.restore(qemu.monitor()))?;
            session.settings = None;
            Ok(())
        });
        cleared.and(restored)
    }

    fn quit(&mut self) -> Result<(), VmmError> {
        let qemu = &self.qemu;
        let process = qemu.process();
        if !process.is_alive() {
            return Ok(());
        }
        qemu.monitor().expect(Own::End);
        let asked = qemu.monitor().run(Quit, limits::QUIT_ANSWER);
        let answered = match qemu.runtime().block_on(asked) {
            // It may close the connection instead of answering.
            Ok(_) | Err(VmmError::Gone { .. }) => true,
            Err(error) => {
                tracing::warn!(%error, "QEMU did not take quit");
                false
            }
        };
        if answered && process.wait_end(limits::QUIT)? {
            return Ok(());
        }
        // Only a QEMU that owns no guest is ever told to quit: it has nothing to lose.
        tracing::warn!(pid = %process.pid(), "QEMU does not quit; killing it");
        process.kill()?;
        if process.wait_end(limits::KILLED)? {
            return Ok(());
        }
        Err(VmmError::TimedOut {
            what: "the end of QEMU's process".into(),
            limit_ms: millis(limits::KILLED),
        })
    }
}

async fn stop(qemu: &Inner) -> Result<Stopped, VmmError> {
    if !qemu.is_running().await? {
        return Ok(qemu.stopped(Instant::now()));
    }
    let monitor = qemu.monitor();
    monitor.expect(Own::Stop);
    // The answer, not the STOP event, says that the disks are drained.
    monitor.run(Stop, limits::STOP).await?;
    monitor.catch_up().await;
    monitor.expect_no_more(Own::Stop);
    Ok(qemu.stopped(Instant::now()))
}

async fn cont(qemu: &Inner) -> Result<(), VmmError> {
    let monitor = qemu.monitor();
    let runs = || monitor.seen().running == Some(true);
    if runs() {
        return Ok(());
    }
    monitor.expect(Own::Resume);
    let answer = monitor.run(Cont, limits::CONT).await;
    monitor.catch_up().await;
    monitor.expect_no_more(Own::Resume);
    if runs() {
        return Ok(());
    }
    answer?;
    // QEMU takes `cont` in states from which nothing runs, and then tells no event.
    let status = qemu.status().await?;
    if status.running {
        return Ok(());
    }
    Err(VmmError::Unfit {
        what: format!("QEMU took cont, but is {} and does not run", status.status),
    })
}

/// Tells the network where the guest is. Best effort: the guest runs, and its own traffic will tell
/// in the end.
async fn announce_self(qemu: &Inner) {
    let told = qemu.monitor().ask(AnnounceSelf::default()).await;
    if let Err(error) = told {
        tracing::warn!(%error, "cannot announce the guest's network addresses");
    }
}
