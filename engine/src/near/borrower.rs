//! The target's side: goes to the source for the files of guest RAM, and takes the lanes that it
//! passes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use ferry_stream::message::{Features, Hello, RegionInfo, SessionId};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{LANE, LIMIT, WINDOW_BYTES, check_peer, door_of};
use crate::control::BoxedConnection;
use crate::linux::passing;
use crate::vmm::RamWindow;

/// What a source on this host has lent.
#[derive(Debug)]
pub(crate) struct Borrowed {
    /// Its guest RAM, in the order of its offer.
    pub(crate) windows: Arc<[RamWindow]>,
    door: UnixStream,
}

/// Borrows what `hello` says can be lent. Where that cannot be had the hello says no such thing any
/// more, and all goes on without.
pub(crate) async fn borrow(hello: &mut Hello) -> Option<Borrowed> {
    if !hello.features.contains(Features::NEAR) {
        return None;
    }
    // Only who offers a guest has anything to lend.
    let Some(offer) = hello.offer.as_ref() else {
        hello.features = hello.features.without(Features::NEAR);
        return None;
    };
    let regions = &offer.regions;
    let borrowed = timeout(LIMIT, Borrowed::of(hello.session, regions)).await;
    match borrowed.unwrap_or_else(|elapsed| Err(elapsed.into())) {
        Ok(borrowed) => Some(borrowed),
        Err(error) => {
            tracing::debug!(%error, "guest RAM is not shared within this host");
            hello.features = hello.features.without(Features::NEAR);
            None
        }
    }
}

impl Borrowed {
    async fn of(session: SessionId, regions: &[RegionInfo]) -> io::Result<Self> {
        let mut door = UnixStream::connect(door_of(session)).await?;
        check_peer(&door)?;
        door.write_all(&session.0).await?;
        let mut windows = Vec::new();
        for region in regions {
            let message = take(&door).await?;
            let (place, fd) = message.ok_or(io::ErrorKind::UnexpectedEof)?;
            windows.push(window(place, fd, region.bytes)?);
        }
        Ok(Self {
            windows: windows.into(),
            door,
        })
    }

    /// Takes the lanes that the source passes, as long as it does, and hands them on like connections
    /// that were accepted.
    pub(crate) async fn lanes(self, passed: mpsc::Sender<BoxedConnection>) {
        drop(self.windows);
        loop {
            match next_lane(&self.door).await {
                Ok(Some(lane)) => {
                    if passed.send(lane).await.is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                // The source, which cannot pass any more, connects like others.
                Err(error) => {
                    tracing::debug!(%error, "no page lane can be taken from the source");
                    return;
                }
            }
        }
    }
}

/// The next lane; none when the source has gone.
async fn next_lane(door: &UnixStream) -> io::Result<Option<BoxedConnection>> {
    let Some(([kind], fd)) = take(door).await? else {
        return Ok(None);
    };
    if kind != LANE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let lane = StdUnixStream::from(fd);
    lane.set_nonblocking(true)?;
    Ok(Some(Box::new(UnixStream::from_std(lane)?)))
}

async fn take<const N: usize>(door: &UnixStream) -> io::Result<Option<([u8; N], OwnedFd)>> {
    let taking = || passing::take(door.as_fd());
    door.async_io(Interest::READABLE, taking).await
}

/// A region of `region_bytes` bytes, as the source says where it lies.
fn window(place: [u8; WINDOW_BYTES], fd: OwnedFd, region_bytes: u64) -> io::Result<RamWindow> {
    let [start, length] = [0, 8].map(|at| {
        let bytes = place[at..at + 8].try_into();
        u64::from_le_bytes(bytes.expect("a window is told in two numbers of eight bytes"))
    });
    let file = File::from(fd);
    let metadata = file.metadata()?;
    let end = start.checked_add(length);
    let end = end.filter(|end| length == region_bytes && *end <= metadata.len());
    match end {
        // Reading anything else may have effects, or never end.
        Some(end) if metadata.is_file() => Ok(RamWindow::new(file, start..end)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
