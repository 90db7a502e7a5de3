//! What TCP and Unix sockets share once they block.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};

use super::{Closer, Lane};

/// A socket of the standard library.
pub(super) trait Socket:
    Read + Write + AsFd + Send + Sync + Sized + std::fmt::Debug + 'static
{
    fn duplicate(&self) -> io::Result<Self>;
    fn end(&self) -> io::Result<()>;
}

impl Socket for std::os::unix::net::UnixStream {
    fn duplicate(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

#[cfg(feature = "tcp")]
impl Socket for std::net::TcpStream {
    fn duplicate(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

/// A socket in blocking mode.
#[derive(Debug)]
pub(super) struct SocketLane<S>(pub(super) S);

impl<S: Socket> Read for SocketLane<S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl<S: Socket> Write for SocketLane<S> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<S: Socket> Lane for SocketLane<S> {
    fn duplicate(&self) -> io::Result<Box<dyn Lane>> {
        Ok(Box::new(Self(self.0.duplicate()?)))
    }

    fn closer(&self) -> io::Result<Box<dyn Closer>> {
        Ok(Box::new(SocketCloser(self.0.duplicate()?)))
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

#[derive(Debug)]
struct SocketCloser<S>(S);

impl<S: Socket> Closer for SocketCloser<S> {
    fn close(&self) -> io::Result<()> {
        match self.0.end() {
            // The peer, or an earlier call, was first.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            ended => ended,
        }
    }
}
