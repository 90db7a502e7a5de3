//! What can go wrong between us and a QMP server.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::address::Address;

open_enum! {
    /// The class of an error that a QMP server answered with.
    ErrorClass {
        /// Nearly every error.
        GenericError = "GenericError",
        /// No such command, or it was disabled.
        CommandNotFound = "CommandNotFound",
        /// A device has failed to become active.
        DeviceNotActive = "DeviceNotActive",
        /// There is no such device.
        DeviceNotFound = "DeviceNotFound",
        /// A capability of KVM is missing.
        KvmMissingCap = "KVMMissingCap",
    }
}

/// What can go wrong between us and a QMP server.
///
/// It can be cloned because the end of a connection is told to every command in flight.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text that is no address.
    #[error("{given:?} is no QMP address: use unix:PATH, a path with a slash, or tcp:HOST:PORT")]
    BadAddress {
        /// The text.
        given: String,
    },
    /// No connection could be made.
    #[error("cannot connect to the QMP socket {address}")]
    Connect {
        /// Where to.
        address: Address,
        /// Why not; `TimedOut` when the time for the greeting ran out before.
        source: Arc<io::Error>,
    },
    /// The server is there but says nothing, or has not even accepted the connection.
    #[error(
        "no QMP greeting from {address} within {waited:?}: another client may hold the socket \
         (QEMU serves one at a time), or QEMU's main loop is blocked"
    )]
    NoGreeting {
        /// Who is silent.
        address: Address,
        /// For how long.
        waited: Duration,
    },
    /// The first line was no QMP greeting.
    #[error(
        "not a QMP server (or one with pretty=on, which is not supported): it said {excerpt:?}"
    )]
    NotQmp {
        /// The beginning of what it said.
        excerpt: String,
    },
    /// A line grew past the limit. The connection is over.
    #[error("the QMP server sent a line of more than {limit} bytes")]
    LineTooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// A line that is no QMP message. The connection is over.
    #[error("the QMP server sent what is no QMP message: {excerpt:?}")]
    Garbage {
        /// The beginning of the line.
        excerpt: String,
    },
    /// A reply to a command that is not in flight. The connection is over: no later reply could be
    /// trusted to be the right one.
    #[error("the QMP server answered a command that was not asked (id {id:?}): {excerpt:?}")]
    StrayReply {
        /// The id it named, if any.
        id: Option<u64>,
        /// The beginning of the reply.
        excerpt: String,
    },
    /// The server closed the connection: it ended, or it was told to.
    #[error("the QMP server closed the connection{}", Unanswered(in_flight))]
    Closed {
        /// The commands that got no answer; they may have been carried out.
        in_flight: Vec<Cow<'static, str>>,
    },
    /// The socket failed. The connection is over.
    #[error("the QMP connection failed")]
    Io {
        /// How.
        source: Arc<io::Error>,
    },
    /// The server answered with an error. The connection goes on.
    #[error("{command}: {desc} ({class})")]
    Class {
        /// The command.
        command: Cow<'static, str>,
        /// The class.
        class: ErrorClass,
        /// The server's own words.
        desc: String,
    },
    /// No answer in time. The connection goes on, and the command may still be carried out.
    #[error("{command}: no answer within {after:?}")]
    TimedOut {
        /// The command.
        command: Cow<'static, str>,
        /// The bound.
        after: Duration,
    },
    /// The answer came, but is not of the command's reply type. The connection goes on.
    #[error("{command}: the reply is not understood")]
    Reply {
        /// The command.
        command: Cow<'static, str>,
        /// What is wrong with it.
        source: Arc<serde_json::Error>,
    },
    /// The arguments cannot be written as JSON. Nothing was sent.
    #[error("{command}: the arguments cannot be written as JSON")]
    Arguments {
        /// The command.
        command: Cow<'static, str>,
        /// Why not.
        source: Arc<serde_json::Error>,
    },
    /// An out-of-band command to a server that does not offer them. Nothing was sent.
    #[error("{command}: the QMP server does not take out-of-band commands")]
    NoOutOfBand {
        /// The command.
        command: Cow<'static, str>,
    },
    /// Too many commands without an answer. Nothing was sent.
    #[error("{command}: {limit} commands are unanswered already")]
    Busy {
        /// The command.
        command: Cow<'static, str>,
        /// The limit.
        limit: usize,
    },
    /// Nobody read the events, and the next one must not be lost. The connection is over.
    #[error("more than {limit} bytes of QMP events are unread")]
    EventsUnread {
        /// The limit in bytes.
        limit: usize,
    },
}

/// Shows the commands that got no answer, if any.
struct Unanswered<'a>(&'a [Cow<'static, str>]);

impl fmt::Display for Unanswered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, " with {} unanswered", self.0.join(", "))
    }
}

/// Longest excerpt of a peer's words in an error, in characters.
const EXCERPT_MAX: usize = 80;

/// The beginning of what a peer sent, fit to be shown.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    // A character is at most four bytes, so nothing beyond these can be shown.
    let head = &bytes[..bytes.len().min(EXCERPT_MAX * 4)];
    String::from_utf8_lossy(head)
        .chars()
        .take(EXCERPT_MAX)
        .collect()
}
