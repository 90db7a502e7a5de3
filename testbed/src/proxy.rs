//! A proxy between two engines that knows frames: it watches them, holds them, damages them, and cuts
//! the link at any of them.
//!
//! Control lane, page lanes and questions are connections of their own, numbered as they come: the
//! source opens the control lane first, then the page lanes.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use ferry_stream::frame::{HEADER_BYTES, Kind};

use crate::TestbedError;

/// The connection that is the control lane.
pub const CONTROL: usize = 0;

/// The connection that is the first page lane.
pub const PAGES: usize = 1;

/// Where a frame's header has its kind and the length of its payload.
const KIND_AT: usize = 6;
const LENGTH_AT: usize = 20;

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// From the source.
    ToTarget,
    /// From the target.
    ToSource,
}

/// Which frame: the `nth`, from 1, of its kind that goes this way on this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameName {
    /// The number of the connection: [`CONTROL`], [`PAGES`], ….
    pub connection: usize,
    /// Which way it goes.
    pub way: Way,
    /// What it is.
    pub kind: Kind,
    /// Counted from 1.
    pub nth: usize,
}

/// What becomes of a frame. Its bytes may have been changed before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// It goes on.
    Pass,
    /// It waits, and what follows it, until [`Proxy::release`] or a cut.
    Hold,
    /// So many of its bytes go on; then every connection ends.
    Cut {
        /// How many: 0, or more than it has, to cut between two frames.
        after_bytes: usize,
        /// Whether new connections are taken after that.
        then: Reach,
    },
    /// So many of its bytes go on; then its connection ends, and no other.
    Kill {
        /// How many.
        after_bytes: usize,
    },
    /// It is lost, and nobody is told.
    Swallow,
}

/// Whether the target can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Yes: the link is back at once.
    Back,
    /// No, never again.
    Gone,
}

/// Decides about each frame.
trait Rule: FnMut(FrameName, &mut Vec<u8>) -> Deed + Send {}

impl<F: FnMut(FrameName, &mut Vec<u8>) -> Deed + Send> Rule for F {}

/// The proxy: gone, with all its connections, when dropped.
pub struct Proxy {
    shared: Arc<Shared>,
}

struct Shared {
    address: SocketAddr,
    target: SocketAddr,
    rule: Mutex<Box<dyn Rule>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    open: Vec<TcpStream>,
    connections: usize,
    /// Rises with every cut.
    cuts: usize,
    passed: Vec<FrameName>,
    held: usize,
    released: bool,
    gone: bool,
}

impl Proxy {
    /// Stands before the target at `uri` and asks `rule` about every frame.
    pub fn start(
        uri: &str,
        rule: impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static,
    ) -> Result<Self, TestbedError> {
        let target = uri.strip_prefix("ferry://").unwrap_or(uri).parse();
        let target = target.map_err(|error| {
            TestbedError::io(format!("read the address {uri}"))(io::Error::other(error))
        })?;
        let listening = || TestbedError::io("listen for a proxy");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(listening())?;
        let address = listener.local_addr().map_err(listening())?;
        let shared = Arc::new(Shared {
            address,
            target,
            rule: Mutex::new(Box::new(rule)),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accepting.accept(&listener));
        Ok(Self { shared })
    }

    /// Where the source has to go.
    pub fn uri(&self) -> String {
        format!("ferry://{}", self.shared.address)
    }

    /// The frames that went through whole, in order.
    pub fn passed(&self) -> Vec<FrameName> {
        self.shared.state().passed.clone()
    }

    /// Waits until a frame is held.
    pub fn wait_held(&self, bound: Duration) -> Result<(), TestbedError> {
        let state = self.shared.state();
        let waiting = |state: &mut State| state.held == 0;
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, bound, waiting);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.held > 0 {
            return Ok(());
        }
        Err(TestbedError::TimedOut {
            what: "a frame is held".into(),
            bound,
            context: format!("; passed: {:?}", state.passed),
        })
    }

    /// Lets every held frame go on, and those that would be held later.
    pub fn release(&self) {
        self.shared.state().released = true;
        self.shared.changed.notify_all();
    }

    /// Ends every connection.
    pub fn cut(&self, then: Reach) {
        self.shared.cut(then);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut(Reach::Gone);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn decide(&self, name: FrameName, frame: &mut Vec<u8>) -> Deed {
        let rule = self.rule.lock();
        rule.unwrap_or_else(PoisonError::into_inner)(name, frame)
    }

    fn cut(&self, then: Reach) {
        let mut state = self.state();
        state.cuts += 1;
        for stream in state.open.drain(..) {
            // Fails where the peer was first.
            _ = stream.shutdown(Shutdown::Both);
        }
        let ends = then == Reach::Gone && !std::mem::replace(&mut state.gone, true);
        drop(state);
        self.changed.notify_all();
        if ends {
            // Wakes the listener, which closes its socket.
            _ = TcpStream::connect(self.address);
        }
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        while let Ok((source, _)) = listener.accept() {
            if self.state().gone {
                return;
            }
            // A target that is not there any more is shown by closing.
            if let Ok(target) = TcpStream::connect(self.target) {
                _ = self.join(source, target);
            }
        }
    }

    /// Pumps both ways between the two, each in a thread.
    fn join(self: &Arc<Self>, source: TcpStream, target: TcpStream) -> io::Result<()> {
        let mut state = self.state();
        let connection = state.connections;
        state.connections += 1;
        let cuts = state.cuts;
        for stream in [&source, &target] {
            stream.set_nodelay(true)?;
            state.open.push(stream.try_clone()?);
        }
        drop(state);
        let ways = [
            (Way::ToTarget, source.try_clone()?, target.try_clone()?),
            (Way::ToSource, target, source),
        ];
        for (way, from, to) in ways {
            let mut pump = Pump {
                shared: Arc::clone(self),
                connection,
                way,
                cuts,
                counts: HashMap::new(),
            };
            thread::spawn(move || {
                // However it ends, the other side sees the end of the stream.
                _ = pump.run(&from, &to);
                _ = to.shutdown(Shutdown::Write);
            });
        }
        Ok(())
    }
}

/// One direction of one connection.
struct Pump {
    shared: Arc<Shared>,
    connection: usize,
    way: Way,
    cuts: usize,
    counts: HashMap<Kind, usize>,
}

impl Pump {
    fn run(&mut self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        loop {
            let mut frame = vec![0; HEADER_BYTES];
            from.read_exact(&mut frame)?;
            let length = frame[LENGTH_AT..LENGTH_AT + 4].try_into();
            let length = u32::from_le_bytes(length.expect("four bytes are four bytes"));
            frame.resize(HEADER_BYTES + length as usize, 0);
            from.read_exact(&mut frame[HEADER_BYTES..])?;
            let Some(name) = self.name(frame[KIND_AT]) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            match self.shared.decide(name, &mut frame) {
                Deed::Pass => {}
                Deed::Hold => self.hold()?,
                Deed::Cut { after_bytes, then } => {
                    to.write_all(&frame[..after_bytes.min(frame.len())])?;
                    self.shared.cut(then);
                    return Ok(());
                }
                Deed::Kill { after_bytes } => {
                    to.write_all(&frame[..after_bytes.min(frame.len())])?;
                    // Fails where a peer was first.
                    _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                    return Ok(());
                }
                Deed::Swallow => continue,
            }
            to.write_all(&frame)?;
            self.shared.state().passed.push(name);
        }
    }

    fn name(&mut self, kind: u8) -> Option<FrameName> {
        let kind = Kind::ALL.into_iter().find(|known| *known as u8 == kind)?;
        let nth = self.counts.entry(kind).or_default();
        *nth += 1;
        Some(FrameName {
            connection: self.connection,
            way: self.way,
            kind,
            nth: *nth,
        })
    }

    /// Waits to be released; an error when the link was cut meanwhile.
    fn hold(&self) -> io::Result<()> {
        let mut state = self.shared.state();
        state.held += 1;
        self.shared.changed.notify_all();
        let waiting = |state: &mut State| !state.released && state.cuts == self.cuts;
        let waited = self.shared.changed.wait_while(state, waiting);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.cuts == self.cuts {
            Ok(())
        } else {
            Err(io::ErrorKind::ConnectionAborted.into())
        }
    }
}
