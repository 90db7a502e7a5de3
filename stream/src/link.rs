//! Connections, for the engine to speak over and for an embedder to bring its own.
//!
//! A connection begins asynchronous, for its greeting. The control lane stays so; a page lane turns
//! into a blocking [`Lane`] with a thread of its own. `tcp` has the links between hosts; [`local`]
//! has those within one process or host.

mod socket;
#[cfg(feature = "tcp")]
mod tcp;
mod unix;

use std::fmt;
use std::future::Future;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};

#[cfg(feature = "tcp")]
pub use tcp::{TcpAcceptor, TcpConnector};
pub use unix::{LocalAcceptor, LocalConnector, local, pair};

/// A connection to the other engine: ordered bytes both ways.
///
/// What is written must leave without waiting for more (no Nagle): messages are small and awaited.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug {
    /// The same connection, for a thread that blocks. No byte is lost.
    fn into_lane(self: Box<Self>) -> io::Result<Box<dyn Lane>>;

    /// Who is at the other end, for people.
    fn peer(&self) -> String;
}

/// A connection whose reads and writes block.
///
/// Vectored writes should reach the socket as such: a page frame is two slices and one write.
pub trait Lane: Read + Write + Send + fmt::Debug {
    /// The same connection once more, for another thread: one reads, the other writes.
    fn duplicate(&self) -> io::Result<Box<dyn Lane>>;

    /// A handle that ends the connection from another thread.
    fn closer(&self) -> io::Result<Box<dyn Closer>>;

    /// The socket behind it, for what the kernel knows of it: how much waits to be sent.
    fn socket(&self) -> Option<BorrowedFd<'_>>;
}

/// Ends a connection from any thread.
pub trait Closer: Send + Sync + fmt::Debug {
    /// Ends both directions: reads and writes that block return at once, with an end of stream or
    /// an error. May be called again.
    fn close(&self) -> io::Result<()>;
}

/// A connection that is still to come.
#[allow(clippy::type_complexity)] // spelled out once, here
pub struct Pending<'a>(Pin<Box<dyn Future<Output = io::Result<Box<dyn Connection>>> + Send + 'a>>);

impl<'a> Pending<'a> {
    /// What `work` will come to.
    pub fn new(work: impl Future<Output = io::Result<Box<dyn Connection>>> + Send + 'a) -> Self {
        Self(Box::pin(work))
    }
}

impl Future for Pending<'_> {
    type Output = io::Result<Box<dyn Connection>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(context)
    }
}

impl fmt::Debug for Pending<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pending")
    }
}

/// Opens connections to one target.
pub trait Connector: Send + Sync {
    /// Opens another. May be dropped at any await.
    fn connect(&self) -> Pending<'_>;
}

/// Takes the connections that sources open.
pub trait Acceptor: Send {
    /// The next one. May be dropped at any await: no connection is lost.
    fn accept(&mut self) -> Pending<'_>;
}
