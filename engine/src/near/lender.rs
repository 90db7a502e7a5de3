//! The source's side: waits for the target to come, gives it the files of guest RAM, then lanes.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, OnceLock};

use ferry_stream::message::SessionId;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use super::{LANE, LIMIT, WINDOW_BYTES, WithinHost, check_peer, door_of};
use crate::control::BoxedConnection;
use crate::linux::passing;
use crate::vmm::{Ram, RamWindow};

/// Most visitors that may be silent at one time. One more is turned away: the real one would then
/// have to do without, and so would the move, which goes on as between two hosts.
const MAX_VISITORS: usize = 8;

/// Lends guest RAM to one target.
#[derive(Debug)]
pub(crate) struct Lender {
    /// The connection of whoever has been let in.
    door: Arc<OnceLock<UnixStream>>,
    listening: AbortHandle,
}

impl Lender {
    /// Lets the target of `session` come and take what `ram` can share; none where it shares nothing,
    /// or no socket can be had.
    pub(crate) fn open(how: WithinHost, ram: &dyn Ram, session: SessionId) -> Option<Self> {
        if how == WithinHost::Never {
            return None;
        }
        let windows = ram.windows()?;
        if windows.len() != ram.layout().iter().count() {
            tracing::warn!(
                windows = windows.len(),
                "not one for each region of guest RAM"
            );
            return None;
        }
        match UnixListener::bind(door_of(session)) {
            Ok(listener) => Some(Self::serve(listener, session, windows)),
            Err(error) => {
                tracing::debug!(%error, "guest RAM cannot be shared within this host");
                None
            }
        }
    }

    fn serve(listener: UnixListener, session: SessionId, windows: Vec<RamWindow>) -> Self {
        let door = Arc::default();
        let listening = tokio::spawn(lend(listener, session, windows, Arc::clone(&door)));
        Self {
            door,
            listening: listening.abort_handle(),
        }
    }

    /// Whether somebody has come for the files. A target that says so without is no reason to believe
    /// it.
    pub(crate) fn has_lent(&self) -> bool {
        self.door.get().is_some()
    }

    /// A page lane to the target.
    ///
    /// Its send buffer is the smallest that there is. A frame of shared pages has no bytes to speak of:
    /// thousands would fit into a usual one, with the target still copying the first, and neither would
    /// the lanes share the work evenly nor would what was sent say anything of what has arrived.
    pub(crate) async fn lane(&self) -> io::Result<BoxedConnection> {
        let door = self.door.get().ok_or(io::ErrorKind::NotConnected)?;
        let (ours, theirs) = StdUnixStream::pair()?;
        setsockopt(&ours, sockopt::SndBuf, &0)?;
        pass(door, &[LANE], theirs.as_fd()).await?;
        ours.set_nonblocking(true)?;
        Ok(Box::new(UnixStream::from_std(ours)?))
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// Takes visitors until one knows the session, and gives the files to that one alone.
async fn lend(
    listener: UnixListener,
    session: SessionId,
    windows: Vec<RamWindow>,
    door: Arc<OnceLock<UnixStream>>,
) {
    let mut visitors = JoinSet::new();
    let known = loop {
        tokio::select! {
            came = listener.accept() => match came {
                Ok((visitor, _)) if visitors.len() < MAX_VISITORS => {
                    visitors.spawn(timeout(LIMIT, know(visitor, session)));
                }
                Ok(_) => {}
                // Out of descriptors, most likely: pages travel as bytes then.
                Err(error) => {
                    tracing::debug!(%error, "nobody can be let in");
                    return;
                }
            },
            Some(heard) = visitors.join_next() => match heard {
                Ok(Ok(Ok(visitor))) => break visitor,
                unknown => tracing::debug!(?unknown, "a visitor is not let in"),
            },
        }
    };
    drop((listener, visitors));
    // Before the last file is given: the target's welcome may come at once.
    let door = door.get_or_init(|| known);
    for RamWindow { file, bytes, .. } in &windows {
        let mut place = [0; WINDOW_BYTES];
        place[..8].copy_from_slice(&bytes.start.to_le_bytes());
        place[8..].copy_from_slice(&(bytes.end - bytes.start).to_le_bytes());
        if let Err(error) = pass(door, &place, file.as_fd()).await {
            // The target, which has not got all of them, will not ask for any page.
            tracing::debug!(%error, "the files of guest RAM cannot be passed");
            return;
        }
    }
}

/// Gives the visitor back when it is one to be let in.
async fn know(mut visitor: UnixStream, session: SessionId) -> io::Result<UnixStream> {
    check_peer(&visitor)?;
    let mut said = [0; size_of::<SessionId>()];
    visitor.read_exact(&mut said).await?;
    if SessionId(said) == session {
        Ok(visitor)
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

async fn pass(door: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let passing = || passing::pass(door.as_fd(), bytes, fd);
    door.async_io(Interest::WRITABLE, passing).await
}
