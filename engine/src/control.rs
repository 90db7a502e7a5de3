//! The control lane at work: a task that reads, a task that writes, and a heartbeat.
//!
//! Each side says Ping when it has been silent, and takes a peer that says nothing at all for
//! [`Silence::limit`] as lost: a host that died sends no end of stream.

use std::time::Duration;

use ferry_stream::lane::{ControlReader, ControlWriter};
use ferry_stream::link::Connection;
use ferry_stream::message::Message;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::core::message::Input;
use crate::core::outcome::in_full;
use crate::device_state::{Inbox, Permit};
use crate::lanes::LAST_WORD;
use crate::worker::Facts;

pub(crate) type BoxedConnection = Box<dyn Connection>;

/// How silence is broken, and when it is taken for death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// After so long without a message one is sent.
    pub ping: Duration,
    /// After so long without a message from the peer the link is lost.
    pub limit: Duration,
}

impl Default for Silence {
    fn default() -> Self {
        Self {
            ping: Duration::from_secs(1),
            limit: Duration::from_secs(10),
        }
    }
}

/// What the writing task is given.
pub(crate) enum Outgoing {
    /// A message.
    Message(Message),
    /// A piece of device state, whose permit is given back when it has left.
    State(Message, Permit),
    /// Say when everything before this has left.
    Flushed(oneshot::Sender<()>),
    /// End the stream, and say when everything before has left.
    End(oneshot::Sender<()>),
}

/// The control lane of a migration.
#[derive(Debug)]
pub(crate) struct Control {
    outgoing: mpsc::UnboundedSender<Outgoing>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Control {
    /// Starts both tasks. At the target, `inbox` takes the device state.
    pub(crate) fn start(
        reader: ControlReader<ReadHalf<BoxedConnection>>,
        writer: ControlWriter<WriteHalf<BoxedConnection>>,
        inbox: Option<Inbox>,
        silence: Silence,
        facts: &Facts,
    ) -> Self {
        let (outgoing, queue) = mpsc::unbounded_channel();
        let reader = tokio::spawn(read(reader, inbox, silence, facts.clone()));
        let writer = tokio::spawn(write(writer, queue, silence, facts.clone()));
        Self {
            outgoing,
            reader,
            writer,
        }
    }

    /// Sends a message when its turn comes. A link that is lost is told as a fact.
    pub(crate) fn send(&self, message: Message) {
        drop(self.outgoing.send(Outgoing::Message(message)));
    }

    /// Where the device state goes.
    pub(crate) fn outgoing(&self) -> mpsc::UnboundedSender<Outgoing> {
        self.outgoing.clone()
    }

    /// Waits, no longer than `patience`, until what was sent has left. Borrows nothing.
    pub(crate) fn flushed(&self, patience: Duration) -> impl Future<Output = ()> + Send + use<> {
        let (done, flushed) = oneshot::channel();
        drop(self.outgoing.send(Outgoing::Flushed(done)));
        async move { drop(timeout(patience, flushed).await) }
    }

    /// Ends the lane, after what was sent has left or `patience` is over. A socket that is closed with
    /// something unread takes its last words back: so the peer is given a moment to end its side.
    pub(crate) async fn finish(mut self, patience: Duration) {
        let (done, ended) = oneshot::channel();
        drop(self.outgoing.send(Outgoing::End(done)));
        drop(timeout(patience, ended).await);
        drop(timeout(LAST_WORD, &mut self.reader).await);
        self.reader.abort();
        self.writer.abort();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn read(
    mut reader: ControlReader<ReadHalf<BoxedConnection>>,
    inbox: Option<Inbox>,
    silence: Silence,
    facts: Facts,
) {
    let lost = loop {
        let message = match timeout(silence.limit, reader.next()).await {
            Err(_) => break format!("the peer said nothing for {} ms", silence.limit.as_millis()),
            Ok(Err(error)) => break in_full(&error),
            Ok(Ok(None)) => break "the peer closed the connection".to_owned(),
            Ok(Ok(Some(message))) => message,
        };
        match (message, &inbox) {
            (Message::State { offset, bytes }, Some(inbox)) => {
                if let Err(what) = inbox.push(offset, bytes) {
                    break what;
                }
            }
            (Message::Paused, Some(inbox)) => {
                inbox.hold();
                facts.tell(Input::Received(Message::Paused));
            }
            (message, _) => facts.tell(Input::Received(message)),
        }
    };
    facts.tell(Input::LinkLost { what: lost });
}

async fn write(
    mut writer: ControlWriter<WriteHalf<BoxedConnection>>,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    silence: Silence,
    facts: Facts,
) {
    loop {
        let sent = match timeout(silence.ping, queue.recv()).await {
            Err(_) => writer.send(&Message::Ping).await,
            Ok(None) => return,
            Ok(Some(Outgoing::Message(message))) => writer.send(&message).await,
            Ok(Some(Outgoing::State(message, permit))) => {
                let sent = writer.send(&message).await;
                drop(permit);
                sent
            }
            Ok(Some(Outgoing::Flushed(done))) => {
                _ = done.send(());
                Ok(())
            }
            Ok(Some(Outgoing::End(done))) => {
                // Whether the peer still hears it, nobody can tell.
                drop(writer.shutdown().await);
                _ = done.send(());
                return;
            }
        };
        if let Err(error) = sent {
            facts.tell(Input::LinkLost {
                what: in_full(&error),
            });
            return;
        }
    }
}
