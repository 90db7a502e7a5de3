//! What the kernel knows of a socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

nix::ioctl_read_bad!(
    /// Bytes in a socket's send queue: not yet sent, or sent and not yet acknowledged.
    siocoutq,
    libc::TIOCOUTQ,
    libc::c_int
);

// The socket's name for it is not in every libc.
const _: () = assert!(
    libc::TIOCOUTQ == 0x5411,
    "linux/sockios.h has SIOCOUTQ there"
);

/// How many bytes written to `socket` the peer's host has not acknowledged yet.
pub fn queued_bytes(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut queued = 0;
    // SAFETY: the ioctl writes one int, to one that lives on this stack.
    unsafe { siocoutq(socket.as_raw_fd(), &raw mut queued) }?;
    Ok(u64::try_from(queued).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn counts_what_the_peer_has_not_got() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        assert_eq!(queued_bytes(sender.as_fd()).unwrap(), 0);
        sender.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(count) = sender.write(&[1; 1 << 12]) {
            sent += count;
        }
        let queued = queued_bytes(sender.as_fd()).unwrap();
        assert!(queued > 0 && queued <= sent as u64, "{queued} of {sent}");
        let mut rest = (&mut receiver).take(sent as u64);
        std::io::copy(&mut rest, &mut std::io::sink()).unwrap();
        let began = Instant::now();
        while queued_bytes(sender.as_fd()).unwrap() > 0 {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "never acknowledged"
            );
            std::thread::yield_now();
        }
    }
}
