//! The target's half of the device state: QEMU's own incoming migration, from a socket of ours.
//!
//! ```text
//!  Idle ──prepare──► Prepared ──load──► Idle, the guest complete and paused
//! ```
//!
//! `stop` while QEMU is in `inmigrate` clears its wish to start by itself, with or without `-S`:
//! without it the guest would run at the end of the load. `cont` there would set it again.

use std::io::{self, Read, Write};
use std::mem;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use ferry_qmp::MigrationStatus;
use ferry_qmp::commands::{MigrateIncoming, RunState, Stop};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::attach::Inner;
use super::limits;
use super::socket::PrivateSocket;
use crate::vmm::VmmError;

/// Bytes that are handed to QEMU at once.
const LOAD_BUFFER: usize = 256 << 10;

/// The first QEMU that can be told to outlive a failed load.
const KNOWS_EXIT_ON_ERROR: (u32, u32) = (9, 1);

/// How far loading a device state is.
#[derive(Default)]
pub(super) enum Incoming {
    /// Not begun, or over.
    #[default]
    Idle,
    /// QEMU waits for the stream.
    Prepared(PrivateSocket),
}

impl Incoming {
    /// Makes QEMU wait for the stream, and sure that the guest will not start by itself.
    pub(super) async fn prepare(&mut self, qemu: &Inner) -> Result<(), VmmError> {
        let status = qemu.status().await?;
        if status.status != RunState::Inmigrate {
            return Err(VmmError::Unfit {
                what: format!(
                    "the target's QEMU is {}, not waiting for a guest: start it with -incoming defer",
                    status.status
                ),
            });
        }
        qemu.monitor().run(Stop, limits::STOP).await?;
        qemu.monitor().forget_migration();
        let socket = PrivateSocket::create(qemu.process().pid(), qemu.socket_dir())?;
        let (major, minor) = KNOWS_EXIT_ON_ERROR;
        let incoming = MigrateIncoming {
            uri: socket.uri(),
            exit_on_error: qemu.version().at_least(major, minor).then_some(false),
        };
        qemu.monitor().ask(incoming).await?;
        *self = Self::Prepared(socket);
        Ok(())
    }

    /// Hands `from` to QEMU, and waits until it has loaded it.
    pub(super) fn load(&mut self, qemu: &Inner, from: &mut dyn Read) -> Result<(), VmmError> {
        let Self::Prepared(socket) = mem::take(self) else {
            return Err(VmmError::Unfit {
                what: "the device state was loaded unprepared: a defect of the engine".into(),
            });
        };
        let stream = connect(qemu, &socket)?;
        match feed(&stream, from) {
            Ok(()) => {}
            Err(Fed::Source(error)) => {
                return Err(VmmError::io("the device state did not arrive whole", error));
            }
            // QEMU stops reading when it cannot load: its own words follow.
            Err(Fed::Qemu(error)) => tracing::debug!(%error, "QEMU stopped reading its state"),
        }
        qemu.runtime().block_on(loaded(qemu))
    }
}

/// Which end of the copy failed.
enum Fed {
    Source(io::Error),
    Qemu(io::Error),
}

fn connect(qemu: &Inner, socket: &PrivateSocket) -> Result<UnixStream, VmmError> {
    let failed = |source| VmmError::io("cannot connect to QEMU's incoming socket", source);
    let stream = UnixStream::connect(socket.ours()).map_err(failed)?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(|error| failed(error.into()))?;
    if peer.pid() != qemu.process().pid().as_raw() {
        return Err(failed(io::Error::other("another process listens there")));
    }
    stream
        .set_write_timeout(Some(limits::LOAD_STALL))
        .map_err(failed)?;
    Ok(stream)
}

fn feed(mut stream: &UnixStream, from: &mut dyn Read) -> Result<(), Fed> {
    let mut buffer = vec![0; LOAD_BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => stream.write_all(&buffer[..count]).map_err(Fed::Qemu)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Fed::Source(error)),
        }
    }
    stream.shutdown(Shutdown::Write).map_err(Fed::Qemu)
}

async fn loaded(qemu: &Inner) -> Result<(), VmmError> {
    let outcome =
        qemu.monitor().wait(
            "loading the device state",
            limits::LOAD,
            |seen| match seen.migration {
                Some(MigrationStatus::Completed) => Some(Load::Done {
                    runs: seen.running == Some(true),
                }),
                Some(MigrationStatus::Failed) => Some(Load::Failed),
                _ => None,
            },
        );
    match outcome.await {
        Ok(Load::Done { runs: false }) => Ok(()),
        Ok(Load::Done { runs: true }) => Err(VmmError::Unfit {
            what: "the target's QEMU runs after the load: somebody told it to".into(),
        }),
        Ok(Load::Failed) | Err(VmmError::Gone { .. }) => {
            let what = "the target's QEMU could not load the device state";
            Err(qemu.migration_failure(what).await)
        }
        Err(other) => Err(other),
    }
}

/// How a load ended. Whether the guest runs is known without asking, which would cost a round trip in
/// the blackout: QEMU chooses the run state, and tells `RESUME`, before it tells `completed`.
enum Load {
    Done { runs: bool },
    Failed,
}
