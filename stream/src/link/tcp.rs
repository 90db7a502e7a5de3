//! Links between hosts, over TCP.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use super::socket::SocketLane;
use super::{Acceptor, Connection, Connector, Lane, Pending};

/// Opens TCP connections to one address.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    address: String,
    limit: Duration,
}

impl TcpConnector {
    /// For `HOST:PORT`, a name being looked up at every connect. A connect that takes longer than
    /// `limit`, look-up included, fails with [`io::ErrorKind::TimedOut`].
    pub fn new(address: impl Into<String>, limit: Duration) -> Self {
        Self {
            address: address.into(),
            limit,
        }
    }

    async fn open(&self) -> io::Result<Box<dyn Connection>> {
        let stream = tokio::time::timeout(self.limit, TcpStream::connect(&self.address)).await??;
        connection(stream)
    }
}

impl Connector for TcpConnector {
    fn connect(&self) -> Pending<'_> {
        Pending::new(self.open())
    }
}

/// Listens on one TCP address.
#[derive(Debug)]
pub struct TcpAcceptor {
    listener: TcpListener,
}

impl TcpAcceptor {
    /// Listens on `HOST:PORT`; port 0 picks a free one.
    pub async fn bind(address: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self { listener })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    async fn next(&mut self) -> io::Result<Box<dyn Connection>> {
        let (stream, _) = self.listener.accept().await?;
        connection(stream)
    }
}

impl Acceptor for TcpAcceptor {
    fn accept(&mut self) -> Pending<'_> {
        Pending::new(self.next())
    }
}

fn connection(stream: TcpStream) -> io::Result<Box<dyn Connection>> {
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}

impl Connection for TcpStream {
    fn into_lane(self: Box<Self>) -> io::Result<Box<dyn Lane>> {
        let stream = self.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(Box::new(SocketLane(stream)))
    }

    fn peer(&self) -> String {
        match self.peer_addr() {
            Ok(address) => address.to_string(),
            Err(_) => "a peer that is gone".into(),
        }
    }
}
