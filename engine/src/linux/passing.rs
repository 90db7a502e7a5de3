//! Descriptors that go from process to process over a Unix socket.
//!
//! One with every message: a message of many has limits of its own, and what of it is lost when a
//! process has no descriptor left is hard to tell.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Most descriptors that the kernel lets into one message: a peer that sends more than the one that is
/// due must not leave any of them open here.
const KERNEL_MAX_FDS: usize = 253;

/// Sends all of `bytes`, and `fd` with the first of them. Fails where only some of them fit.
pub fn pass(socket: BorrowedFd<'_>, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Takes a message of exactly `N` bytes and the descriptor that came with it; none at the end of the
/// stream. Anything else is an error, and no descriptor of it stays open.
pub fn take<const N: usize>(socket: BorrowedFd<'_>) -> io::Result<Option<([u8; N], OwnedFd)>> {
    let mut bytes = [0; N];
    let mut space = cmsg_space!([RawFd; KERNEL_MAX_FDS]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(space.as_mut_slice()),
        flags,
    )?;
    let length = message.bytes;
    let mut came = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for us: nobody else knows them.
            came.extend(
                fds.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    match (length, came.pop()) {
        (0, None) => Ok(None),
        (length, Some(fd)) if length == N && came.is_empty() => Ok(Some((bytes, fd))),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_its_bytes() {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        pass(near.as_fd(), b"take", theirs.as_fd()).unwrap();
        drop((near, theirs));
        let (bytes, fd) = take(far.as_fd()).unwrap().unwrap();
        assert_eq!(&bytes, b"take");
        UnixStream::from(fd).write_all(b"here").unwrap();
        let mut heard = String::new();
        ours.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "here");
        assert!(take::<4>(far.as_fd()).unwrap().is_none(), "the end");
    }

    #[test]
    fn what_is_not_one_descriptor_with_its_bytes_is_refused_and_closed() {
        let null = File::open("/dev/null").unwrap();
        let send = |bytes: &[u8], count| {
            let (near, far) = UnixStream::pair().unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut fds = vec![null.as_raw_fd(); count];
            fds.extend([theirs.as_raw_fd()].iter().take(count));
            let rights = [ControlMessage::ScmRights(&fds)];
            let rights = &rights[..count.min(1)];
            let slices = [IoSlice::new(bytes)];
            sendmsg::<()>(near.as_raw_fd(), &slices, rights, MsgFlags::empty(), None).unwrap();
            drop(theirs);
            (far, ours)
        };
        for (bytes, count) in [(&b"take"[..], 0), (b"tak", 1), (b"take", 1), (b"take", 200)] {
            let (far, mut ours) = send(bytes, count);
            let taken = take::<4>(far.as_fd());
            assert!(taken.is_err(), "{bytes:?} with {count}: {taken:?}");
            if count > 0 {
                // Our end would block if the other were open still.
                assert_eq!(ours.read(&mut [0]).unwrap(), 0);
            }
        }
    }
}
