//! The source's half of the device state: QEMU's own `migrate`, into a socket of ours.
//!
//! ```text
//!  Idle ──open──► Open ──switch_over──► UnderWay ──save──► Saved
//!   ▲              │                       │                 │
//!   └───abandon────┴───────abandon─────────┴─────abandon─────┘
//! ```
//!
//! QEMU streams what is not shared RAM, pauses the guest, drains its disks and waits in
//! `pre-switchover`; everything up to there is pumped into the sink as it comes. What follows comes
//! only after `migrate-continue`, that is inside `save`: so no byte that must be held back is in the
//! sink before `save` was called. The stream ends with `completed`, and the pump with the stream.

use std::io::{self, Read, Write};
use std::mem;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use ferry_qmp::MigrationStatus;
use ferry_qmp::commands::{Migrate, MigrateCancel, MigrateContinue, RunState};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::attach::Inner;
use super::limits;
use super::monitor::{Own, Seen, millis};
use super::socket::PrivateSocket;
use crate::vmm::{Stopped, VmmError};

/// Bytes that the pump moves at once.
const PUMP_BUFFER: usize = 256 << 10;

/// How often a run state that has to settle is looked at.
const SETTLE_STEP: Duration = Duration::from_millis(1);

/// Where the device state goes.
type Sink = Box<dyn Write + Send>;

/// How far saving the device state is.
#[derive(Default)]
pub(super) enum Outgoing {
    /// Not begun, or undone.
    #[default]
    Idle,
    /// The socket waits for QEMU.
    Open {
        sink: Sink,
        socket: PrivateSocket,
        listener: UnixListener,
    },
    /// QEMU has been told to migrate.
    UnderWay { pump: Option<Pump> },
    /// The sink has everything.
    Saved,
}

impl Outgoing {
    /// Makes the socket ready.
    pub(super) fn open(&mut self, qemu: &Inner, sink: Sink) -> Result<(), VmmError> {
        if !matches!(self, Self::Idle) {
            return Err(out_of_order("opened twice"));
        }
        let socket = PrivateSocket::create(qemu.process().pid(), qemu.socket_dir())?;
        let _runtime = qemu.runtime().enter();
        let listener = UnixListener::bind(socket.ours())
            .map_err(|source| VmmError::io("cannot listen for QEMU's device state", source))?;
        socket.admit()?;
        *self = Self::Open {
            sink,
            socket,
            listener,
        };
        Ok(())
    }

    /// Has QEMU pause the guest and wait in `pre-switchover`.
    pub(super) async fn switch_over(&mut self, qemu: &Inner) -> Result<Stopped, VmmError> {
        let (sink, socket, listener) = match mem::take(self) {
            Self::Open {
                sink,
                socket,
                listener,
            } => (sink, socket, listener),
            Self::UnderWay { pump } => {
                *self = Self::UnderWay { pump };
                return self.reached_switchover(qemu).await;
            }
            Self::Saved => {
                *self = Self::Saved;
                return Ok(qemu.stopped(Instant::now()));
            }
            Self::Idle => return Err(out_of_order("not opened before the switchover")),
        };
        qemu.monitor().forget_migration();
        if qemu.is_running().await? {
            qemu.monitor().expect(Own::Stop);
            // Until `completed` QEMU lets the guest run again by itself when the stream fails.
            qemu.monitor().expect(Own::Resume);
        }
        *self = Self::UnderWay { pump: None };
        qemu.monitor().ask(Migrate { uri: socket.uri() }).await?;
        let stream = accept(qemu, &listener).await?;
        *self = Self::UnderWay {
            pump: Some(Pump::start(stream, sink)?),
        };
        self.reached_switchover(qemu).await
    }

    async fn reached_switchover(&mut self, qemu: &Inner) -> Result<Stopped, VmmError> {
        let what = "the way to QEMU's pre-switchover";
        let reached = qemu
            .monitor()
            .wait(what, limits::SWITCHOVER, |seen| match seen.migration {
                Some(MigrationStatus::PreSwitchover) => Some(seen.migration_at),
                _ => is_over(seen).then_some(None),
            })
            .await?;
        if let Some(drained_at) = reached {
            return Ok(qemu.stopped(drained_at));
        }
        Err(self
            .failure(qemu, "QEMU did not reach the switchover")
            .await)
    }

    /// Lets QEMU write the rest, and sees it all into the sink.
    pub(super) async fn save(&mut self, qemu: &Inner) -> Result<(), VmmError> {
        let Self::UnderWay { pump: Some(_) } = self else {
            return Err(out_of_order("saved before the switchover"));
        };
        let monitor = qemu.monitor();
        let state = MigrationStatus::PreSwitchover;
        monitor.ask(MigrateContinue { state }).await?;
        let over = |seen: &Seen| is_over(seen).then(|| seen.migration.clone());
        let status = monitor
            .wait("saving the device state", limits::SAVE, over)
            .await?;
        if status != Some(MigrationStatus::Completed) {
            return Err(self
                .failure(qemu, "QEMU did not save its device state")
                .await);
        }
        if let Self::UnderWay { pump: Some(pump) } = self {
            pump.finish().await?;
        }
        // From here on QEMU does not resume by itself: a RESUME is somebody else's.
        monitor.expect_no_more(Own::Resume);
        *self = Self::Saved;
        Ok(())
    }

    /// Undoes it all. Says whether QEMU got so far that a target may have announced itself.
    pub(super) async fn abandon(&mut self, qemu: &Inner) -> Result<bool, VmmError> {
        let saved = match self {
            Self::Idle | Self::Open { .. } => false,
            Self::UnderWay { .. } => call_off(qemu).await?,
            Self::Saved => {
                settle(qemu).await?;
                true
            }
        };
        qemu.monitor().catch_up().await;
        qemu.monitor().expect_no_more(Own::Stop);
        qemu.monitor().expect_no_more(Own::Resume);
        *self = Self::Idle;
        Ok(saved)
    }

    /// Why QEMU failed: when the sink failed first, that is the cause, and QEMU's words only tell of
    /// a broken pipe.
    async fn failure(&mut self, qemu: &Inner, what: &str) -> VmmError {
        if let Self::UnderWay { pump: Some(pump) } = self
            && let Some(error) = pump.error()
        {
            return VmmError::io("cannot pass on QEMU's device state", error);
        }
        qemu.migration_failure(what).await
    }
}

/// Ends QEMU's migration, however far it is. Says whether it had completed.
async fn call_off(qemu: &Inner) -> Result<bool, VmmError> {
    let monitor = qemu.monitor();
    monitor.ask(MigrateCancel).await?;
    // Asked rather than awaited as an event: `migrate` may have been refused, or have failed long ago.
    let status = poll("the end of QEMU's migration", async || {
        let status = qemu.migration_status().await?;
        Ok(ended(&status).then_some(status))
    })
    .await?;
    settle(qemu).await?;
    Ok(status == MigrationStatus::Completed)
}

/// Waits until QEMU has chosen a run state after a migration. Until then it refuses `cont`, and a
/// guest that ran is not running yet.
async fn settle(qemu: &Inner) -> Result<(), VmmError> {
    poll("QEMU's run state after its migration", async || {
        let status = qemu.status().await?;
        Ok((status.status != RunState::FinishMigrate).then_some(()))
    })
    .await
}

async fn poll<T>(
    what: &str,
    look: impl AsyncFn() -> Result<Option<T>, VmmError>,
) -> Result<T, VmmError> {
    let looking = async {
        loop {
            if let Some(found) = look().await? {
                return Ok(found);
            }
            sleep(SETTLE_STEP).await;
        }
    };
    match timeout(limits::SETTLE, looking).await {
        Ok(found) => found,
        Err(_) => Err(VmmError::TimedOut {
            what: what.to_owned(),
            limit_ms: millis(limits::SETTLE),
        }),
    }
}

fn ended(status: &MigrationStatus) -> bool {
    use MigrationStatus::{Cancelled, Completed, Failed, None};
    matches!(status, None | Cancelled | Completed | Failed)
}

fn is_over(seen: &Seen) -> bool {
    seen.migration.as_ref().is_some_and(ended)
}

fn out_of_order(how: &str) -> VmmError {
    VmmError::Unfit {
        what: format!("the device state was {how}: a defect of the engine"),
    }
}

/// Takes QEMU's connection; anybody else's is closed.
async fn accept(qemu: &Inner, listener: &UnixListener) -> Result<UnixStream, VmmError> {
    let broken = |source| VmmError::io("QEMU's device state did not come", source);
    let ours = async {
        loop {
            let (stream, _) = listener.accept().await.map_err(broken)?;
            let peer = stream.peer_cred().map_err(broken)?.pid();
            if peer == Some(qemu.process().pid().as_raw()) {
                let stream = stream.into_std().map_err(broken)?;
                stream.set_nonblocking(false).map_err(broken)?;
                return Ok(stream);
            }
            tracing::warn!(?peer, "a stranger connected to QEMU's state socket");
        }
    };
    let what = "QEMU's connection for its device state";
    let over = qemu
        .monitor()
        .wait(what, limits::SWITCHOVER, |seen| is_over(seen).then_some(()));
    tokio::select! {
        stream = ours => stream,
        ended = over => match ended {
            Ok(()) => Err(qemu.migration_failure("QEMU did not begin its migration").await),
            Err(error) => Err(error),
        }
    }
}

/// The thread that moves bytes from QEMU into the sink: the sink may block, on a slow link for
/// instance, and QMP must go on meanwhile.
pub(super) struct Pump {
    outcome: oneshot::Receiver<io::Result<()>>,
    /// Shut down when the pump is dropped: ends a read of the thread.
    stream: UnixStream,
}

impl Pump {
    fn start(stream: UnixStream, sink: Sink) -> Result<Self, VmmError> {
        let failed = |source| VmmError::io("cannot start a thread for the device state", source);
        let (done, outcome) = oneshot::channel();
        let from = stream.try_clone().map_err(failed)?;
        thread::Builder::new()
            .name("ferry-state".into())
            .spawn(move || {
                // Nobody waits when the pump was dropped.
                let _ = done.send(pump(from, sink));
            })
            .map_err(failed)?;
        Ok(Self { outcome, stream })
    }

    /// Waits until the sink has the last byte and has been dropped. QEMU has written it: it says
    /// `completed` after that, and closes the stream only when its main loop comes round to it, which
    /// nobody has to wait for. What the socket holds is still read.
    async fn finish(&mut self) -> Result<(), VmmError> {
        // It fails when QEMU has closed the stream already.
        let _ = self.stream.shutdown(std::net::Shutdown::Read);
        match timeout(limits::SAVE, &mut self.outcome).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(source))) => Err(VmmError::io("cannot pass on QEMU's device state", source)),
            Ok(Err(_)) => Err(VmmError::Unfit {
                what: "the sink of the device state panicked".into(),
            }),
            Err(_) => Err(VmmError::TimedOut {
                what: "passing on the device state".into(),
                limit_ms: millis(limits::SAVE),
            }),
        }
    }

    /// How the pump failed, if it did and nobody has asked before.
    fn error(&mut self) -> Option<io::Error> {
        self.outcome.try_recv().ok()?.err()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        // It fails when QEMU has closed the stream: then there is nothing to end.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn pump(mut from: UnixStream, mut sink: Sink) -> io::Result<()> {
    let mut buffer = vec![0; PUMP_BUFFER];
    let outcome = loop {
        match from.read(&mut buffer) {
            Ok(0) => break sink.flush(),
            Ok(count) => {
                if let Err(error) = sink.write_all(&buffer[..count]) {
                    break Err(error);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    if outcome.is_err() {
        // QEMU must see the end of it, or it would fill the socket and wait.
        let _ = from.shutdown(std::net::Shutdown::Both);
    }
    outcome
}
