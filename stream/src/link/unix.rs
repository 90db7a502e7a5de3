//! Links within one process or host, over Unix sockets: for tests and embedders.

use std::io;

use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::socket::SocketLane;
use super::{Acceptor, Connection, Connector, Lane, Pending};

/// Most connections that wait to be accepted.
const BACKLOG: usize = 128;

impl Connection for UnixStream {
    fn into_lane(self: Box<Self>) -> io::Result<Box<dyn Lane>> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(Box::new(SocketLane(stream)))
    }

    fn peer(&self) -> String {
        "this host".into()
    }
}

/// The two ends of one connection. Needs a tokio runtime with I/O.
pub fn pair() -> io::Result<(Box<dyn Connection>, Box<dyn Connection>)> {
    let (one, other) = UnixStream::pair()?;
    Ok((Box::new(one), Box::new(other)))
}

/// A target within this process, and the way to reach it.
pub fn local() -> (LocalConnector, LocalAcceptor) {
    let (ends, waiting) = mpsc::channel(BACKLOG);
    (LocalConnector { ends }, LocalAcceptor { waiting })
}

/// Opens connections to the [`LocalAcceptor`] that it was made with.
#[derive(Clone, Debug)]
pub struct LocalConnector {
    ends: mpsc::Sender<Box<dyn Connection>>,
}

impl LocalConnector {
    async fn open(&self) -> io::Result<Box<dyn Connection>> {
        let (ours, theirs) = pair()?;
        let sent = self.ends.send(theirs).await;
        sent.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(ours)
    }
}

impl Connector for LocalConnector {
    fn connect(&self) -> Pending<'_> {
        Pending::new(self.open())
    }
}

/// Takes the connections of its [`LocalConnector`]s.
#[derive(Debug)]
pub struct LocalAcceptor {
    waiting: mpsc::Receiver<Box<dyn Connection>>,
}

impl LocalAcceptor {
    /// An error of kind [`io::ErrorKind::BrokenPipe`] when every connector is gone.
    async fn next(&mut self) -> io::Result<Box<dyn Connection>> {
        let next = self.waiting.recv().await;
        next.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

impl Acceptor for LocalAcceptor {
    fn accept(&mut self) -> Pending<'_> {
        Pending::new(self.next())
    }
}
