//! A link that can go wrong at a chosen byte: a TCP proxy between the two engines.
//!
//! Connections are numbered in the order in which the source opens them: 0 is the control lane, then
//! the page lanes, then whoever asks. What passed is recorded, so that a test can find the
//! boundaries of frames in one run and cut at each of them in others.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferry_stream::frame::{HEADER_BYTES, Header, Kind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// From the source to the target.
    ToTarget,
    /// From the target to the source.
    ToSource,
}

/// What a cut takes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The one connection.
    Connection,
    /// Every connection of the moment; new ones stand.
    Everything,
    /// Every connection, and no other can be opened.
    ForEver,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The connection ends.
    Cut(Scope),
    /// One byte arrives changed.
    Corrupt,
    /// Nothing passes any more in this direction, and nobody is told.
    Stall,
    /// Everything from here on arrives so much later.
    Delay(Duration),
}

/// Where in a stream something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// After so many bytes.
    Byte(usize),
    /// Before the first frame of this kind.
    Frame(Kind),
}

/// Where what goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Number of the connection, from 0.
    pub connection: usize,
    /// Its direction.
    pub way: Way,
    /// Its place.
    pub at: At,
    /// What happens.
    pub what: What,
}

/// What passed through one connection.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// From the source.
    pub to_target: Vec<u8>,
    /// From the target.
    pub to_source: Vec<u8>,
}

/// The proxy. It ends, and every connection with it, when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    rules: Mutex<Vec<Rule>>,
    recorded: Mutex<Vec<Recorded>>,
    /// By connection: told when it shall end.
    ends: Mutex<Vec<watch::Sender<bool>>>,
    /// How many times everything was cut.
    cuts: watch::Sender<u32>,
    closed: watch::Sender<bool>,
}

/// How far one direction of a connection is.
struct Pump {
    shared: Arc<Shared>,
    connection: usize,
    way: Way,
    passed: usize,
    /// Where the next frame begins.
    next_frame: usize,
    delay: Duration,
    /// Told when the connection shall end.
    end: watch::Sender<bool>,
}

impl Proxy {
    /// A proxy in front of `target`.
    pub async fn start(target: SocketAddr, rules: Vec<Rule>) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            rules: Mutex::new(rules),
            recorded: Mutex::default(),
            ends: Mutex::default(),
            cuts: watch::channel(0).0,
            closed: watch::channel(false).0,
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self {
            address,
            shared,
            accepting,
        })
    }

    /// Where a source connects to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What has passed so far, by connection.
    pub fn recorded(&self) -> Vec<Recorded> {
        lock(&self.shared.recorded).clone()
    }

    /// Adds a rule while the migration runs.
    pub fn add(&self, rule: Rule) {
        lock(&self.shared.rules).push(rule);
    }

    /// Ends one connection now, if it stands.
    pub fn kill(&self, connection: usize) {
        if let Some(end) = lock(&self.shared.ends).get(connection) {
            end.send_replace(true);
        }
    }

    /// Cuts every connection now.
    pub fn cut(&self, scope: Scope) {
        self.shared.cut(scope);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.shared.cut(Scope::ForEver);
    }
}

impl Shared {
    fn cut(&self, scope: Scope) {
        if scope == Scope::ForEver {
            self.closed.send_replace(true);
        }
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// The first rule for the bytes `from..to` of a stream, and where in the stream it applies.
    fn rule(&self, connection: usize, way: Way, from: usize, to: usize) -> Option<(usize, What)> {
        let rules = lock(&self.rules);
        let places = rules.iter().filter_map(|rule| match rule.at {
            At::Byte(at) if (rule.connection, rule.way) == (connection, way) => {
                Some((at, rule.what))
            }
            _ => None,
        });
        places
            .filter(|(at, _)| (from..to).contains(at))
            .min_by_key(|(at, _)| *at)
    }

    /// A frame of this kind begins at `at` in a stream: what waits for one has its place.
    fn begins(&self, connection: usize, way: Way, kind: Kind, at: usize) {
        for rule in &mut *lock(&self.rules) {
            let waits = (rule.connection, rule.way, rule.at) == (connection, way, At::Frame(kind));
            if waits {
                rule.at = At::Byte(at);
            }
        }
    }

    fn record(&self, connection: usize, way: Way, bytes: &[u8]) {
        let recorded = &mut lock(&self.recorded)[connection];
        match way {
            Way::ToTarget => recorded.to_target.extend_from_slice(bytes),
            Way::ToSource => recorded.to_source.extend_from_slice(bytes),
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut closed = shared.closed.subscribe();
    loop {
        let source = tokio::select! {
            accepted = listener.accept() => accepted,
            // Dropping the listener refuses whoever comes later.
            _ = closed.wait_for(|closed| *closed) => return,
        };
        let Ok((source, _)) = source else { return };
        let Ok(target) = TcpStream::connect(shared.target).await else {
            continue;
        };
        let connection = {
            let mut recorded = lock(&shared.recorded);
            recorded.push(Recorded::default());
            recorded.len() - 1
        };
        let (end, ended) = watch::channel(false);
        lock(&shared.ends).push(end.clone());
        let ends = (end, ended);
        tokio::spawn(carry(source, target, connection, ends, Arc::clone(&shared)));
    }
}

/// Carries a connection until an end closes it, a rule ends it, or everything is cut.
async fn carry(
    source: TcpStream,
    target: TcpStream,
    connection: usize,
    (end, mut ended): (watch::Sender<bool>, watch::Receiver<bool>),
    shared: Arc<Shared>,
) {
    // A connection that cannot be set up so is slower, and no different otherwise.
    _ = (source.set_nodelay(true), target.set_nodelay(true));
    let mut cuts = shared.cuts.subscribe();
    let (from_source, to_source) = source.into_split();
    let (from_target, to_target) = target.into_split();
    let pump = |way| Pump {
        shared: Arc::clone(&shared),
        connection,
        way,
        passed: 0,
        next_frame: 0,
        delay: Duration::ZERO,
        end: end.clone(),
    };
    let (there, back) = (pump(Way::ToTarget), pump(Way::ToSource));
    let both = async {
        tokio::join!(
            there.run(from_source, to_target),
            back.run(from_target, to_source)
        )
    };
    tokio::select! {
        _ = both => {}
        _ = ended.wait_for(|ended| *ended) => {}
        _ = cuts.changed() => {}
    }
}

impl Pump {
    async fn run(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count) = from.read(&mut buffer).await {
            if count == 0 || self.pass(&mut buffer[..count], &mut to).await.is_err() {
                break;
            }
        }
        // The other direction may have more to say: half a close passes as half a close.
        _ = to.shutdown().await;
    }

    /// Passes `bytes` on, with what the rules have for them.
    async fn pass(&mut self, mut bytes: &mut [u8], to: &mut OwnedWriteHalf) -> io::Result<()> {
        self.find_frames(bytes);
        let end = self.passed + bytes.len();
        while let Some((at, what)) = self
            .shared
            .rule(self.connection, self.way, self.passed, end)
        {
            let (before, rest) = bytes.split_at_mut(at - self.passed);
            self.write(before, to).await?;
            match what {
                What::Cut(scope) => {
                    self.cut(scope);
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                What::Stall => std::future::pending::<()>().await,
                What::Corrupt => rest[0] ^= 0x10,
                What::Delay(span) => self.delay = span,
            }
            let (first, rest) = rest.split_at_mut(1);
            self.write(first, to).await?;
            bytes = rest;
        }
        self.write(bytes, to).await
    }

    /// Follows the frames of the stream. A message leaves its sender in one write, so its header is
    /// in one piece; where it is not, or the peer speaks otherwise, rules for frames do not apply.
    fn find_frames(&mut self, bytes: &[u8]) {
        while let Some(header) = self
            .next_frame
            .checked_sub(self.passed)
            .and_then(|at| bytes.get(at..)?.first_chunk())
        {
            let Ok((header, _)) = Header::parse(header) else {
                return;
            };
            let (connection, way) = (self.connection, self.way);
            self.shared
                .begins(connection, way, header.kind, self.next_frame);
            self.next_frame += HEADER_BYTES + header.length as usize;
        }
    }

    async fn write(&mut self, bytes: &[u8], to: &mut OwnedWriteHalf) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        to.write_all(bytes).await?;
        self.shared.record(self.connection, self.way, bytes);
        self.passed += bytes.len();
        Ok(())
    }

    fn cut(&self, scope: Scope) {
        match scope {
            Scope::Connection => _ = self.end.send_replace(true),
            Scope::Everything | Scope::ForEver => self.shared.cut(scope),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
