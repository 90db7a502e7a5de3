//! The task behind a client: one place that waits, one that changes.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::address::Address;
use crate::client::{Options, Peer};
use crate::error::Error;
use crate::events::EventSink;
use crate::proto::{Greeting, Incoming, Request, Session};

/// Bytes read at once.
const CHUNK: usize = 16 << 10;

/// Between two tries while the server's queue of connections is full.
const RETRY: Duration = Duration::from_millis(10);

/// Where a caller waits for an answer.
pub(crate) struct ReplyTo(pub(crate) oneshot::Sender<Result<Box<RawValue>, Error>>);

impl ReplyTo {
    fn send(self, outcome: Result<Box<RawValue>, Error>) {
        // A caller who has stopped waiting needs no answer.
        let _ = self.0.send(outcome);
    }

    fn is_awaited(&self) -> bool {
        !self.0.is_closed()
    }
}

/// A command on its way to the session.
pub(crate) struct Submission {
    pub(crate) request: Request,
    pub(crate) reply: ReplyTo,
}

/// A connected socket.
struct Socket {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    peer: Option<Peer>,
}

pub(crate) struct Connection {
    socket: Socket,
    /// False when the server takes no more; it may still have something to say.
    writable: bool,
    chunk: Box<[u8]>,
    session: Session<ReplyTo>,
    submissions: mpsc::UnboundedReceiver<Submission>,
    events: EventSink,
    ended: Arc<OnceLock<Error>>,
}

/// What a wait ended with.
enum Step {
    Read(io::Result<usize>),
    Wrote(io::Result<usize>),
    Submitted(Submission),
    /// Every client is gone.
    Abandoned,
}

impl Connection {
    pub(crate) async fn open(
        address: &Address,
        options: &Options,
        submissions: mpsc::UnboundedReceiver<Submission>,
        events: EventSink,
    ) -> Result<Self, Error> {
        let waited = options.greeting_timeout;
        let opened = match (timeout(waited, Socket::open(address)).await, address) {
            (Ok(opened), _) => opened,
            // Only a full queue of connections makes a Unix socket wait.
            (Err(_), Address::Unix(_)) => {
                let address = address.clone();
                return Err(Error::NoGreeting { address, waited });
            }
            (Err(_), Address::Tcp(_)) => Err(io::ErrorKind::TimedOut.into()),
        };
        let socket = opened.map_err(|source| Error::Connect {
            address: address.clone(),
            source: Arc::new(source),
        })?;
        Ok(Self {
            socket,
            writable: true,
            chunk: vec![0; CHUNK].into(),
            session: Session::new(options.max_line),
            submissions,
            events,
            ended: Arc::default(),
        })
    }

    /// Runs until the server takes commands. To be bounded by the caller.
    pub(crate) async fn negotiate(&mut self) -> Result<Greeting, Error> {
        loop {
            if let Some(greeting) = self.session.greeting() {
                return Ok(greeting.clone());
            }
            self.step().await?;
        }
    }

    /// The error that silence up to now is.
    pub(crate) fn silence(&self, address: &Address, waited: Duration) -> Error {
        match self.session.negotiating() {
            None => Error::NoGreeting {
                address: address.clone(),
                waited,
            },
            Some(command) => Error::TimedOut {
                command: command.into(),
                after: waited,
            },
        }
    }

    pub(crate) fn peer(&self) -> Option<Peer> {
        self.socket.peer
    }

    /// Where the reason of the end will be.
    pub(crate) fn ended(&self) -> Arc<OnceLock<Error>> {
        Arc::clone(&self.ended)
    }

    /// Runs until the end, and tells it to every command in flight.
    pub(crate) async fn run(mut self) {
        let error = loop {
            if let Err(error) = self.step().await {
                break error;
            }
        };
        tracing::debug!(%error, "connection ended");
        // Set before any reply's sender is dropped: whoever finds one gone looks for it here.
        self.ended
            .set(error.clone())
            .expect("only this task sets it, and only here");
        for reply in self.session.into_unanswered() {
            reply.send(Err(error.clone()));
        }
    }

    async fn step(&mut self) -> Result<(), Error> {
        let step = self.wait().await;
        self.apply(step)
    }

    async fn wait(&mut self) -> Step {
        let Socket { reader, writer, .. } = &mut self.socket;
        let output = self.session.output();
        tokio::select! {
            wrote = writer.write(output), if self.writable && !output.is_empty() => Step::Wrote(wrote),
            read = reader.read(&mut self.chunk) => Step::Read(read),
            submission = self.submissions.recv() => {
                submission.map_or(Step::Abandoned, Step::Submitted)
            }
        }
    }

    fn apply(&mut self, step: Step) -> Result<(), Error> {
        match step {
            Step::Read(Ok(0)) | Step::Abandoned => Err(self.session.closed()),
            Step::Read(Ok(count)) => self.received(count),
            Step::Read(Err(error)) if is_close(&error) => Err(self.session.closed()),
            Step::Wrote(Ok(count)) => {
                self.session.sent(count);
                Ok(())
            }
            // What it sent before it closed is still to be read: a `quit` is answered like that.
            Step::Wrote(Err(error)) if is_close(&error) => {
                self.writable = false;
                Ok(())
            }
            Step::Read(Err(error)) | Step::Wrote(Err(error)) => Err(Error::Io {
                source: Arc::new(error),
            }),
            Step::Submitted(submission) => {
                self.submit(submission);
                // Whatever else was handed over by now leaves in the same write.
                while let Ok(submission) = self.submissions.try_recv() {
                    self.submit(submission);
                }
                Ok(())
            }
        }
    }

    fn submit(&mut self, Submission { request, reply }: Submission) {
        tracing::trace!(command = %request.name(), "command");
        if let Err((error, reply)) = self.session.submit(request, reply) {
            reply.send(Err(error));
        }
    }

    fn received(&mut self, count: usize) -> Result<(), Error> {
        // Before an answer makes room: a `cont` must not leave after its caller has given it up.
        self.session.retain_waiting(ReplyTo::is_awaited);
        self.session.receive(&self.chunk[..count], Instant::now());
        while let Some(incoming) = self.session.poll()? {
            match incoming {
                Incoming::Reply { token, outcome } => token.send(outcome),
                Incoming::Event(event) => {
                    tracing::trace!(event = event.name, "event");
                    self.events.put(event)?;
                }
            }
        }
        Ok(())
    }
}

impl Socket {
    async fn open(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let stream = loop {
                    match UnixStream::connect(path).await {
                        // A server that serves one client at a time lets few others queue.
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            sleep(RETRY).await;
                        }
                        other => break other?,
                    }
                };
                let credentials = stream.peer_cred()?;
                let peer = Peer {
                    pid: credentials.pid(),
                    uid: credentials.uid(),
                    gid: credentials.gid(),
                };
                let (reader, writer) = stream.into_split();
                Ok(Self {
                    reader: Box::new(reader),
                    writer: Box::new(writer),
                    peer: Some(peer),
                })
            }
            Address::Tcp(host_and_port) => {
                let stream = TcpStream::connect(host_and_port).await?;
                stream.set_nodelay(true)?;
                let (reader, writer) = stream.into_split();
                Ok(Self {
                    reader: Box::new(reader),
                    writer: Box::new(writer),
                    peer: None,
                })
            }
        }
    }
}

/// True for what a socket says when the other end is gone.
fn is_close(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
