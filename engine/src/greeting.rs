//! The connections that come to a target: each is greeted apart, so that a stranger who says nothing
//! keeps nobody out.

use std::collections::VecDeque;
use std::io;

use ferry_stream::lane::ControlLane;
use ferry_stream::link::Acceptor;
use ferry_stream::message::{AbortCode, Hello, Message};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::control::BoxedConnection;
use crate::core::message::Notice;
use crate::core::outcome::in_full;
use crate::near::borrower::{Borrowed, borrow};
use crate::send::{GREETING_LIMIT, PARTING};

/// Most connections that are being greeted at one time: strangers cost no more than that. One more,
/// and the one that has been silent for longest goes, so that they cannot keep a source out.
pub(crate) const MAX_GREETINGS: usize = 32;

/// A connection that has said hello.
pub(crate) struct Arrival {
    pub(crate) lane: ControlLane<BoxedConnection>,
    pub(crate) hello: Hello,
    pub(crate) peer: String,
    /// What a source on this host has lent.
    pub(crate) borrowed: Option<Borrowed>,
}

/// Takes connections, those that were `passed` by a source on this host too, and greets each in a task
/// of its own, until the driver ends.
pub(crate) async fn accept(
    mut acceptor: Box<dyn Acceptor>,
    mut passed: mpsc::Receiver<BoxedConnection>,
    greeted: mpsc::Sender<Arrival>,
    notices: mpsc::UnboundedSender<Notice>,
) {
    let mut greetings = JoinSet::new();
    let mut oldest_first = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept() => accepted,
            Some(lane) = passed.recv() => Ok(lane),
        };
        let connection = match accepted {
            Ok(connection) => connection,
            Err(error) => {
                drop(notices.send(Notice::Leftover(format!("taking a connection: {error}"))));
                // Out of descriptors, most likely: others give theirs back.
                tokio::time::sleep(PARTING).await;
                continue;
            }
        };
        while greetings.try_join_next().is_some() {}
        oldest_first.retain(|greeting: &AbortHandle| !greeting.is_finished());
        if oldest_first.len() >= MAX_GREETINGS
            && let Some(oldest) = oldest_first.pop_front()
        {
            oldest.abort();
        }
        let greeting = greet(connection, greeted.clone(), notices.clone());
        oldest_first.push_back(greetings.spawn(greeting));
    }
}

/// Greets one connection. It has so long to say what it wants.
async fn greet(
    connection: BoxedConnection,
    greeted: mpsc::Sender<Arrival>,
    notices: mpsc::UnboundedSender<Notice>,
) {
    let peer = connection.peer();
    match timeout(GREETING_LIMIT, hello(connection)).await {
        Ok(Ok((lane, mut hello))) => {
            let borrowed = borrow(&mut hello).await;
            let arrival = Arrival {
                lane,
                hello,
                peer,
                borrowed,
            };
            drop(greeted.send(arrival).await);
        }
        Ok(Err(error)) => {
            drop(notices.send(Notice::Leftover(format!("{peer}: {}", in_full(&error)))));
        }
        Err(_) => drop(notices.send(Notice::Leftover(format!("{peer} never said hello")))),
    }
}

/// Reads a connection's hello. A peer that can be understood so far is told what is wrong.
async fn hello(
    connection: BoxedConnection,
) -> Result<(ControlLane<BoxedConnection>, Hello), ferry_stream::Error> {
    let mut lane = ControlLane::new(connection);
    match lane.reader.next().await {
        Ok(Some(Message::Hello(hello))) => Ok((lane, hello)),
        Ok(other) => {
            let what = other.map_or("nothing", |message| message.name());
            let text = format!("a connection begins with Hello, not with {what}");
            Err(io::Error::new(io::ErrorKind::InvalidData, text).into())
        }
        Err(error) => {
            let (code, text) = (AbortCode::Version, in_full(&error));
            drop(lane.writer.send(&Message::Abort { code, text }).await);
            Err(error)
        }
    }
}
