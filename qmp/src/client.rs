//! The caller's end of a connection.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::address::Address;
use crate::commands::Command;
use crate::connection::{Connection, ReplyTo, Submission};
use crate::error::Error;
use crate::events::{self, Events};
use crate::proto::{Band, Greeting, Request};

/// Bounds of a connection.
#[derive(Clone, Debug)]
pub struct Options {
    /// For connecting and the negotiation together.
    pub greeting_timeout: Duration,
    /// For a command, from the moment it is handed over to its answer, unless it has a bound of its
    /// own.
    pub command_timeout: Duration,
    /// Longest line that the server may send, in bytes.
    pub max_line: usize,
}

/// Longest line by default, in bytes: the largest replies (`query-qmp-schema`, long backing chains)
/// have some hundred KiB.
const DEFAULT_MAX_LINE: usize = 8 << 20;

impl Default for Options {
    fn default() -> Self {
        Self {
            greeting_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(10),
            max_line: DEFAULT_MAX_LINE,
        }
    }
}

/// Who listens on a Unix socket, as the kernel knows it.
///
/// It is the process that called `listen`. That is QEMU, unless QEMU was given a socket that another
/// process (a management daemon) had opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// Process id, in our pid namespace.
    pub pid: Option<i32>,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// A connection to a QMP server. Cheap to clone; the last one dropped closes the connection.
///
/// Every method that takes a command hands it over **when it is called**, not when its future is
/// first polled, and in the order of the calls. So two commands are pipelined by making both futures
/// before awaiting the first. A future that is dropped, or whose time is over, takes nothing back
/// that was sent: the command is carried out, and its answer ignored. What still waits here because
/// [`IN_BAND_MAX`] others are unanswered is then not sent at all.
///
/// A task on the runtime that [`Client::connect`] was called from reads and writes the socket; the
/// futures can be awaited wherever that runtime is entered.
///
/// [`IN_BAND_MAX`]: crate::proto::IN_BAND_MAX
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    address: Address,
    greeting: Greeting,
    peer: Option<Peer>,
    command_timeout: Duration,
    submissions: mpsc::UnboundedSender<Submission>,
    ended: Arc<OnceLock<Error>>,
}

impl Client {
    /// Connects and negotiates; out-of-band commands are enabled when they are offered.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::NoGreeting`], [`Error::NotQmp`], [`Error::Closed`] and whatever
    /// else can go wrong with a connection, all within [`Options::greeting_timeout`].
    pub async fn connect(address: &Address, options: &Options) -> Result<(Self, Events), Error> {
        let started = Instant::now();
        let (submissions, receiver) = mpsc::unbounded_channel();
        let (sink, events) = events::queue();
        let mut connection = Connection::open(address, options, receiver, sink).await?;
        let left = options.greeting_timeout.saturating_sub(started.elapsed());
        let greeting = match timeout(left, connection.negotiate()).await {
            Ok(negotiated) => negotiated?,
            Err(_) => return Err(connection.silence(address, options.greeting_timeout)),
        };
        tracing::debug!(%address, version = %greeting.version, oob = greeting.oob, "connected");
        let shared = Shared {
            address: address.clone(),
            greeting,
            peer: connection.peer(),
            command_timeout: options.command_timeout,
            submissions,
            ended: connection.ended(),
        };
        tokio::spawn(connection.run());
        let shared = Arc::new(shared);
        Ok((Self { shared }, events))
    }

    /// Carries out a command.
    ///
    /// # Errors
    /// [`Error::Class`] when the server refuses, [`Error::TimedOut`], [`Error::Reply`], or the
    /// connection's end.
    pub fn execute<C: Command>(
        &self,
        command: C,
    ) -> impl Future<Output = Result<C::Reply, Error>> + Send + use<C> {
        self.execute_within(command, self.shared.command_timeout)
    }

    /// Carries out a command that must be answered `within` a bound of its own.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn execute_within<C: Command>(
        &self,
        command: C,
        within: Duration,
    ) -> impl Future<Output = Result<C::Reply, Error>> + Send + use<C> {
        let request = Request::new(C::NAME, &command, Band::In);
        let answer = self.submit(request, within);
        async move { decode::<C::Reply>(C::NAME.into(), &answer.await?) }
    }

    /// Carries out a command out of band: at once, also while another one runs. QEMU allows it for
    /// few commands.
    ///
    /// # Errors
    /// As [`Client::execute`]; [`Error::NoOutOfBand`] when the server did not offer it.
    pub fn execute_oob<C: Command>(
        &self,
        command: C,
    ) -> impl Future<Output = Result<C::Reply, Error>> + Send + use<C> {
        let within = self.shared.command_timeout;
        let request = Request::new(C::NAME, &command, Band::Out);
        let answer = self.submit(request, within);
        async move { decode::<C::Reply>(C::NAME.into(), &answer.await?) }
    }

    /// Carries out a command by name. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn execute_raw<N: Into<Cow<'static, str>>>(
        &self,
        name: N,
        arguments: Value,
    ) -> impl Future<Output = Result<Value, Error>> + Send + use<N> {
        self.execute_raw_within(name, arguments, self.shared.command_timeout)
    }

    /// Carries out a command by name that must be answered `within` a bound of its own.
    ///
    /// # Errors
    /// As [`Client::execute`].
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers make the arguments on the spot, with json!"
    )]
    pub fn execute_raw_within<N: Into<Cow<'static, str>>>(
        &self,
        name: N,
        arguments: Value,
        within: Duration,
    ) -> impl Future<Output = Result<Value, Error>> + Send + use<N> {
        let name = name.into();
        let request = Request::new(name.clone(), &arguments, Band::In);
        let answer = self.submit(request, within);
        async move { decode::<Value>(name, &answer.await?) }
    }

    /// How the server introduced itself.
    pub fn greeting(&self) -> &Greeting {
        &self.shared.greeting
    }

    /// Who listens on the socket; nothing over TCP.
    pub fn peer(&self) -> Option<Peer> {
        self.shared.peer
    }

    /// Where the server is.
    pub fn address(&self) -> &Address {
        &self.shared.address
    }

    /// Why the connection has ended; nothing while it goes on.
    pub fn ended(&self) -> Option<&Error> {
        self.shared.ended.get()
    }

    /// Hands a command over now; the future waits for its answer and keeps the connection.
    fn submit(
        &self,
        request: Result<Request, Error>,
        within: Duration,
    ) -> impl Future<Output = Result<Box<RawValue>, Error>> + Send + use<> {
        let started = Instant::now();
        let handed_over = request.map(|request| {
            let command = request.name().clone();
            let (reply, answer) = oneshot::channel();
            let reply = ReplyTo(reply);
            // It fails when the connection has ended. The reply's sender is gone then too, which
            // the future below sees.
            let _ = self.shared.submissions.send(Submission { request, reply });
            (command, answer)
        });
        let shared = Arc::clone(&self.shared);
        async move {
            let (command, answer) = handed_over?;
            let left = within.saturating_sub(started.elapsed());
            match timeout(left, answer).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Err(shared.end()),
                Err(_) => Err(Error::TimedOut {
                    command,
                    after: within,
                }),
            }
        }
    }
}

impl Shared {
    fn end(&self) -> Error {
        // Nothing is set when the runtime was shut down under the connection.
        let in_flight = Vec::new();
        self.ended
            .get()
            .cloned()
            .unwrap_or(Error::Closed { in_flight })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("address", &self.shared.address)
            .field("greeting", &self.shared.greeting)
            .field("ended", &self.shared.ended)
            .finish_non_exhaustive()
    }
}

fn decode<T: serde::de::DeserializeOwned>(
    command: Cow<'static, str>,
    reply: &RawValue,
) -> Result<T, Error> {
    serde_json::from_str(reply.get()).map_err(|source| Error::Reply {
        command,
        source: Arc::new(source),
    })
}

// A client is shared by tasks and threads.
const _: () = {
    const fn is_shared<T: Clone + Send + Sync + 'static>() {}
    is_shared::<Client>();
};
