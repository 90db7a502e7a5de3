//! What a QMP server says, one message a line.

use std::fmt;
use std::time::Instant;

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::{Error, ErrorClass, excerpt};
use crate::event::{Event, Timestamp};

/// QEMU's version.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "WireVersion")]
pub struct Version {
    /// 10 in 10.0.2.
    pub major: u32,
    /// 0 in 10.0.2.
    pub minor: u32,
    /// 2 in 10.0.2.
    pub micro: u32,
    /// What the packager added; may be empty.
    pub package: String,
}

impl Version {
    /// True for release `major.minor` and everything after it.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[derive(Deserialize)]
struct WireVersion {
    qemu: Triple,
    #[serde(default)]
    package: String,
}

#[derive(Deserialize)]
struct Triple {
    major: u32,
    minor: u32,
    micro: u32,
}

impl From<WireVersion> for Version {
    fn from(wire: WireVersion) -> Self {
        Self {
            major: wire.qemu.major,
            minor: wire.qemu.minor,
            micro: wire.qemu.micro,
            package: wire.package,
        }
    }
}

/// How a server introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Greeting {
    /// Its version.
    pub version: Version,
    /// Whether it takes out-of-band commands.
    pub oob: bool,
}

/// A message, read and owned.
#[derive(Debug)]
pub(super) enum Message {
    Greeting(Greeting),
    Event(Event),
    Reply {
        id: Option<u64>,
        body: Result<Box<RawValue>, Refusal>,
    },
}

/// An error that the server answered with.
#[derive(Debug, Deserialize)]
pub(super) struct Refusal {
    pub(super) class: ErrorClass,
    pub(super) desc: String,
}

/// Every key that a message may have. Which ones are there tells what it is.
#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(rename = "QMP")]
    qmp: Option<WireGreeting>,
    event: Option<String>,
    data: Option<Value>,
    timestamp: Option<Timestamp>,
    #[serde(rename = "return", borrow, default, deserialize_with = "present")]
    reply: Option<&'a RawValue>,
    error: Option<Refusal>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct WireGreeting {
    version: Version,
    #[serde(default)]
    capabilities: Vec<Value>,
}

/// A reply of `null` is a reply: `Option` alone would read it as none.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl Message {
    /// Reads one line that arrived at `arrived`. Anything but a QMP message is [`Error::Garbage`].
    pub(super) fn parse(line: &[u8], arrived: Instant) -> Result<Self, Error> {
        let garbage = || Error::Garbage {
            excerpt: excerpt(line),
        };
        let wire: Wire<'_> = serde_json::from_slice(line).map_err(|_| garbage())?;
        match wire {
            Wire {
                qmp: Some(greeting),
                ..
            } => Ok(Self::Greeting(Greeting {
                version: greeting.version,
                oob: greeting.capabilities.iter().any(|offered| offered == "oob"),
            })),
            Wire {
                event: Some(name),
                timestamp: Some(timestamp),
                data,
                ..
            } => Ok(Self::Event(Event {
                name,
                data: data.unwrap_or_default(),
                timestamp,
                received_at: arrived,
                line_bytes: line.len(),
            })),
            Wire {
                reply: Some(reply),
                error: None,
                id,
                ..
            } => Ok(Self::Reply {
                id,
                body: Ok(reply.to_owned()),
            }),
            Wire {
                reply: None,
                error: Some(refusal),
                id,
                ..
            } => Ok(Self::Reply {
                id,
                body: Err(refusal),
            }),
            _ => Err(garbage()),
        }
    }
}
