//! Links between hosts, over TCP.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};

use super::socket::SocketLane;
use super::{Acceptor, Connection, Connector, Lane, Pending};

/// The congestion control for connections within a host: the only one that every kernel has and lets
/// anyone choose.
const WITHIN_HOST: &str = "reno";

/// Opens TCP connections to one place.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    place: Place,
    limit: Duration,
}

#[derive(Clone, Debug)]
enum Place {
    /// A name, which may come to mean another address.
    Named(String),
    /// What a name meant when it was looked up.
    At(Vec<SocketAddr>),
}

impl TcpConnector {
    /// For `HOST:PORT`, a name being looked up at every connect. A connect that takes longer than
    /// `limit`, look-up included, fails with [`io::ErrorKind::TimedOut`].
    pub fn new(address: impl Into<String>, limit: Duration) -> Self {
        let place = Place::Named(address.into());
        Self { place, limit }
    }

    /// For the first of `addresses` that answers: those of one host, as a look-up gives them. A connect
    /// that takes longer than `limit`, all of them together, fails with [`io::ErrorKind::TimedOut`].
    pub fn to(addresses: Vec<SocketAddr>, limit: Duration) -> Self {
        let place = Place::At(addresses);
        Self { place, limit }
    }

    async fn open(&self) -> io::Result<Box<dyn Connection>> {
        let connecting = async {
            match &self.place {
                Place::Named(name) => TcpStream::connect(name).await,
                Place::At(addresses) => TcpStream::connect(&addresses[..]).await,
            }
        };
        connection(tokio::time::timeout(self.limit, connecting).await??)
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
    /// Listens on `HOST:PORT`, or on the first of several addresses that can be listened on; port 0 picks
    /// a free one.
    pub async fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
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
    if stays_within_host(&stream)? {
        spare_pacing(&stream);
    }
    Ok(Box::new(stream))
}

/// Whether no network lies in between: no address but the own one leads back to where it came from.
fn stays_within_host(stream: &TcpStream) -> io::Result<bool> {
    let (here, there) = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
    Ok(here == there || there.is_loopback())
}

/// Takes the connection off a host-wide choice like BBR, which spreads what it sends over time by
/// timers. Within a host nothing can congest, and the timers cost more than the copying: 0.41 s of CPU
/// for a GiB, both ends, against 0.25 s. Across a network the choice is the administrator's.
fn spare_pacing(stream: &TcpStream) {
    // Without it everything works, only slower.
    _ = setsockopt(stream, sockopt::TcpCongestion, &OsString::from(WITHIN_HOST));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_paced_within_a_host() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        for stream in [near.unwrap(), far.unwrap().0] {
            assert!(stays_within_host(&stream).unwrap());
            spare_pacing(&stream);
            let chosen = nix::sys::socket::getsockopt(&stream, sockopt::TcpCongestion).unwrap();
            let chosen = chosen.to_string_lossy();
            assert_eq!(chosen.trim_end_matches('\0'), WITHIN_HOST);
        }
    }
}
