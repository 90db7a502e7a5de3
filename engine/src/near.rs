//! Two engines on one host: the target reads guest RAM from the source's own files, and no page
//! travels.
//!
//! Over loopback a page is copied three times: by the source into a frame, into the socket, and out of
//! it; here once. How the two find out is in the wire's documentation (`ferry_stream`): the source
//! [lends](lender::Lender), the target [borrows](borrower::borrow).
//!
//! The order of things is the same as with bytes. The source protects pages before it tells of them,
//! and the target reads them after it is told: what the guest writes in between or later is reported
//! as dirty and told again. A frame counts once its pages are copied, so that a round that is done is
//! in place, and every lane has ended before the guest is loaded: nothing is read after Go.
//!
//! What is otherwise the source's to find is not found: it reads no page, so zero pages are the target's
//! to see (it allocates nothing for them, though room may have been made ahead where the source's file has
//! data), they count as told, and nothing is packed. Lanes do not grow
//! in number either, since hardly a byte is on them: those that a move begins with are copying threads.

pub(crate) mod borrower;
pub(crate) mod lender;
#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

use ferry_stream::message::SessionId;
use nix::unistd::geteuid;
use tokio::net::UnixStream;

/// How long the files may take to change hands. Nothing here leaves the host, and somebody waits for a
/// welcome meanwhile.
pub(crate) const LIMIT: Duration = Duration::from_secs(1);

/// What a message of the back door that carries a lane says.
const LANE: u8 = 1;

/// Bytes in the message that carries a file: where its region begins in it, and how long it is.
const WINDOW_BYTES: usize = 16;

/// What becomes of pages when both engines are on one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WithinHost {
    /// The target takes them from the source's RAM files where it can reach them. It must be the same
    /// user's or root's, and in the same network namespace.
    #[default]
    Auto,
    /// They travel like those of any other move.
    Never,
}

/// The socket's abstract name, as a path. Whoever reads the list of sockets learns half of the session
/// from it, and not the half that is asked for.
fn door_of(session: SessionId) -> String {
    let whole = session.to_string();
    format!("\0ferry-near-{}", &whole[..whole.len() / 2])
}

/// Refuses a process that could not look into ours anyway.
fn check_peer(door: &UnixStream) -> io::Result<()> {
    let uid = door.peer_cred()?.uid();
    if uid == 0 || uid == geteuid().as_raw() {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}
