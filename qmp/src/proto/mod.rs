//! The protocol without any I/O: bytes in, messages out; commands in, bytes out.
//!
//! A [`Session`] is one connection from greeting to end. It has no socket and no clock, so tests
//! (and fuzzers) drive it with whatever bytes they like, in whatever pieces:
//!
//! ```
//! use std::time::Instant;
//! use ferry_qmp::proto::{Band, Incoming, Request, Session};
//!
//! # fn main() -> Result<(), ferry_qmp::Error> {
//! let mut session = Session::new(1 << 20);
//! let greeting = br#"{"QMP":{"version":{"qemu":{"major":10,"minor":0,"micro":2}}}}"#;
//! session.receive(&[greeting, &b"\r\n"[..]].concat(), Instant::now());
//! assert!(session.poll()?.is_none());
//! assert_eq!(session.output(), b"{\"execute\":\"qmp_capabilities\",\"id\":0}\n");
//! session.sent(session.output().len());
//! session.receive(b"{\"return\":{},\"id\":0}\r\n", Instant::now());
//! assert!(session.poll()?.is_none());
//!
//! session.submit(Request::new("stop", &(), Band::In)?, "my token").unwrap();
//! assert_eq!(session.output(), b"{\"execute\":\"stop\",\"id\":1}\n");
//! session.receive(b"{\"return\":{},\"id\":1}\r\n", Instant::now());
//! assert!(matches!(session.poll()?, Some(Incoming::Reply { token: "my token", .. })));
//! # Ok(())
//! # }
//! ```

mod lines;
mod message;
mod request;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use serde_json::json;
use serde_json::value::RawValue;

use self::lines::Lines;
pub use self::message::{Greeting, Version};
use self::message::{Message, Refusal};
pub use self::request::{Band, Request};
use crate::error::{Error, excerpt};
use crate::event::Event;

/// Most in-band commands sent and not answered; the rest wait here.
///
/// QEMU queues eight and then stops reading, out-of-band commands included: one fewer keeps the way
/// open for those.
pub const IN_BAND_MAX: usize = 7;

/// Most commands without an answer, sent or waiting. Those given up by their callers count until
/// their answer comes.
pub const UNANSWERED_MAX: usize = 1024;

/// The command that ends the negotiation, and its id. Those of others begin after it.
const NEGOTIATE: &str = "qmp_capabilities";
const NEGOTIATE_ID: u64 = 0;

/// What came from the server. `T` is what was given with the command that is answered.
#[derive(Debug)]
pub enum Incoming<T> {
    /// An answer.
    Reply {
        /// What was given with the command.
        token: T,
        /// The value, or [`Error::Class`].
        outcome: Result<Box<RawValue>, Error>,
    },
    /// Something happened.
    Event(Event),
}

/// One connection, from greeting to end.
#[derive(Debug)]
pub struct Session<T> {
    lines: Lines,
    /// When the latest bytes came.
    arrived: Option<Instant>,
    phase: Phase,
    output: Vec<u8>,
    next_id: u64,
    in_flight: BTreeMap<u64, InFlight<T>>,
    waiting: VecDeque<(Request, T)>,
}

#[derive(Debug)]
enum Phase {
    /// The server has said nothing yet.
    Connected,
    /// It has greeted, and was told which capabilities we use.
    Greeted(Greeting),
    /// It takes commands.
    Ready(Greeting),
}

#[derive(Debug)]
struct InFlight<T> {
    name: Cow<'static, str>,
    band: Band,
    token: T,
}

impl<T> Session<T> {
    /// A connection that has just been made. No line may be longer than `line_max` bytes.
    pub fn new(line_max: usize) -> Self {
        Self {
            lines: Lines::new(line_max),
            arrived: None,
            phase: Phase::Connected,
            output: Vec::new(),
            next_id: NEGOTIATE_ID + 1,
            in_flight: BTreeMap::new(),
            waiting: VecDeque::new(),
        }
    }

    /// The greeting, once the server takes commands.
    pub fn greeting(&self) -> Option<&Greeting> {
        match &self.phase {
            Phase::Connected | Phase::Greeted(_) => None,
            Phase::Ready(greeting) => Some(greeting),
        }
    }

    /// The command whose answer the negotiation waits for; none while there is no greeting.
    pub fn negotiating(&self) -> Option<&'static str> {
        matches!(self.phase, Phase::Greeted(_)).then_some(NEGOTIATE)
    }

    /// Takes what the server sent at `now`. [`Session::poll`] until it is empty before the next
    /// call: memory is bounded by the longest line plus what one call brings.
    pub fn receive(&mut self, bytes: &[u8], now: Instant) {
        self.lines.extend(bytes);
        self.arrived = Some(now);
    }

    /// The next message, or nothing when more bytes are needed.
    ///
    /// # Errors
    /// Each one ends the connection: [`Error::NotQmp`], [`Error::LineTooLong`], [`Error::Garbage`],
    /// [`Error::StrayReply`], or [`Error::Class`] when the negotiation was refused. The session is
    /// of no use afterwards.
    pub fn poll(&mut self) -> Result<Option<Incoming<T>>, Error> {
        while let Some(message) = self.next_message()? {
            if let Some(incoming) = self.handle(message)? {
                return Ok(Some(incoming));
            }
        }
        Ok(None)
    }

    /// Accepts a command; `token` comes back with its answer.
    ///
    /// # Errors
    /// [`Error::Busy`] and [`Error::NoOutOfBand`], with the token; the connection goes on.
    pub fn submit(&mut self, request: Request, token: T) -> Result<(), (Error, T)> {
        let command = request.name().clone();
        if self.in_flight.len() + self.waiting.len() >= UNANSWERED_MAX {
            let limit = UNANSWERED_MAX;
            return Err((Error::Busy { command, limit }, token));
        }
        match request.band {
            Band::In => {
                self.waiting.push_back((request, token));
                self.send_waiting();
            }
            Band::Out if self.greeting().is_some_and(|greeting| greeting.oob) => {
                self.send(&request, token);
            }
            Band::Out => return Err((Error::NoOutOfBand { command }, token)),
        }
        Ok(())
    }

    /// Forgets the commands not sent yet whose token is not `wanted` any more.
    pub fn retain_waiting(&mut self, wanted: impl Fn(&T) -> bool) {
        self.waiting.retain(|(_, token)| wanted(token));
    }

    /// What is to be sent. Tell [`Session::sent`] how much of it was.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// The first `count` bytes of the output are sent.
    pub fn sent(&mut self, count: usize) {
        self.output.drain(..count.min(self.output.len()));
    }

    /// The error that the end of the stream is at this moment.
    pub fn closed(&self) -> Error {
        let rest = self.lines.rest();
        if matches!(self.phase, Phase::Connected) && !rest.is_empty() {
            return Error::NotQmp {
                excerpt: excerpt(rest),
            };
        }
        let sent = self.in_flight.values().map(|command| &command.name);
        let waiting = self.waiting.iter().map(|(request, _)| request.name());
        Error::Closed {
            in_flight: sent.chain(waiting).cloned().collect(),
        }
    }

    /// Ends: gives back what was given with every command that got no answer.
    pub fn into_unanswered(self) -> impl Iterator<Item = T> {
        let sent = self.in_flight.into_values().map(|command| command.token);
        sent.chain(self.waiting.into_iter().map(|(_, token)| token))
    }

    fn next_message(&mut self) -> Result<Option<Message>, Error> {
        let Some(arrived) = self.arrived else {
            return Ok(None);
        };
        while let Some(line) = self.lines.next()? {
            if line.is_empty() {
                continue;
            }
            return match (Message::parse(line, arrived), &self.phase) {
                (Ok(message @ Message::Greeting(_)), Phase::Connected) => Ok(Some(message)),
                (_, Phase::Connected) => Err(Error::NotQmp {
                    excerpt: excerpt(line),
                }),
                (Ok(Message::Greeting(_)), _) => Err(Error::Garbage {
                    excerpt: excerpt(line),
                }),
                (parsed, _) => parsed.map(Some),
            };
        }
        Ok(None)
    }

    fn handle(&mut self, message: Message) -> Result<Option<Incoming<T>>, Error> {
        match message {
            Message::Greeting(greeting) => {
                self.negotiate(greeting);
                Ok(None)
            }
            Message::Event(event) => Ok(Some(Incoming::Event(event))),
            Message::Reply { id, body } => self.answered(id, body),
        }
    }

    fn negotiate(&mut self, greeting: Greeting) {
        let arguments = if greeting.oob {
            json!({"enable": ["oob"]})
        } else {
            json!({})
        };
        Request::new(NEGOTIATE, &arguments, Band::In)
            .expect("a JSON value has no map with other keys than strings")
            .encode(NEGOTIATE_ID, &mut self.output);
        self.phase = Phase::Greeted(greeting);
    }

    fn answered(
        &mut self,
        id: Option<u64>,
        body: Result<Box<RawValue>, Refusal>,
    ) -> Result<Option<Incoming<T>>, Error> {
        if let (Phase::Greeted(greeting), Some(NEGOTIATE_ID)) = (&self.phase, id) {
            body.map_err(|refusal| refusal.of(NEGOTIATE.into()))?;
            self.phase = Phase::Ready(greeting.clone());
            self.send_waiting();
            return Ok(None);
        }
        let Some(command) = id.and_then(|id| self.in_flight.remove(&id)) else {
            let text = match &body {
                Ok(value) => value.get(),
                Err(refusal) => &refusal.desc,
            };
            return Err(Error::StrayReply {
                id,
                excerpt: excerpt(text.as_bytes()),
            });
        };
        self.send_waiting();
        Ok(Some(Incoming::Reply {
            token: command.token,
            outcome: body.map_err(|refusal| refusal.of(command.name)),
        }))
    }

    fn send_waiting(&mut self) {
        while self.may_send()
            && let Some((request, token)) = self.waiting.pop_front()
        {
            self.send(&request, token);
        }
    }

    fn may_send(&self) -> bool {
        let in_band = self
            .in_flight
            .values()
            .filter(|command| command.band == Band::In)
            .count();
        in_band < IN_BAND_MAX && self.greeting().is_some()
    }

    fn send(&mut self, request: &Request, token: T) {
        let id = self.next_id;
        self.next_id += 1;
        request.encode(id, &mut self.output);
        let command = InFlight {
            name: request.name().clone(),
            band: request.band,
            token,
        };
        self.in_flight.insert(id, command);
    }
}

impl Refusal {
    fn of(self, command: Cow<'static, str>) -> Error {
        Error::Class {
            command,
            class: self.class,
            desc: self.desc,
        }
    }
}
