//! The ways to move a guest, and their names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How multifd compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// With zstd.
    Zstd,
}

/// A way to move a guest. Figures have it by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Peer {
    /// Ours, as it comes: with as many connections as it chooses, and within a host without sending
    /// pages.
    Ferry,
    /// Ours, over so many connections, within a host as from one to another.
    FerryOver {
        /// How many.
        lanes: u8,
    },
    /// Ours, the guest handed over at once, its pages after it; within a host as from one to another.
    FerryPostcopy,
    /// Ours, handed over after one round.
    FerryHybrid,
    /// QEMU's post-copy, with a channel of its own for faults, begun at once.
    Postcopy,
    /// The same, begun after QEMU's first round.
    Hybrid,
    /// QEMU's precopy over one connection.
    Precopy,
    /// QEMU's precopy over several.
    Multifd {
        /// How many.
        channels: u8,
        /// How it compresses.
        compression: Compression,
    },
    /// No move at all: the guest is stopped, its device state is saved and loaded into a second QEMU on
    /// the very same memory, and it goes on there. What any hand-over between two QEMUs costs at least.
    Switchover,
}

/// What the guest's memory is, for as long as it is moved by one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// Files in `/dev/shm`, shared: the only kind that Ferry can reach.
    SharedFile,
    /// Private memory.
    Private,
}

impl Peer {
    /// All that take part in the matrix.
    pub fn everyone() -> Vec<Self> {
        let mut all = vec![Self::Ferry];
        all.extend([1, 2, 4].map(|lanes| Self::FerryOver { lanes }));
        all.push(Self::Precopy);
        for compression in [Compression::None, Compression::Zstd] {
            all.extend([2, 4].map(|channels| Self::Multifd {
                channels,
                compression,
            }));
        }
        all
    }

    /// Whether it is QEMU's own way, with which Ferry is compared.
    pub fn is_qemu(self) -> bool {
        matches!(self, Self::Precopy | Self::Multifd { .. }) || self.is_qemu_postcopy()
    }

    /// Whether it is QEMU's own, with pages after the guest.
    pub fn is_qemu_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::Hybrid)
    }

    /// Whether pages come after the guest.
    pub fn is_postcopy(self) -> bool {
        self.is_qemu_postcopy() || matches!(self, Self::FerryPostcopy | Self::FerryHybrid)
    }

    /// All whose pages come after the guest, for the cases that compare those.
    pub fn followers() -> Vec<Self> {
        vec![
            Self::FerryPostcopy,
            Self::FerryHybrid,
            Self::Postcopy,
            Self::Hybrid,
            Self::Precopy,
        ]
    }

    /// Whether it is Ferry.
    pub fn is_ferry(self) -> bool {
        matches!(
            self,
            Self::Ferry | Self::FerryOver { .. } | Self::FerryPostcopy | Self::FerryHybrid
        )
    }

    /// The kinds of memory that it is measured with.
    pub fn memories(self) -> &'static [Memory] {
        if self.is_qemu_postcopy() {
            // Whoever looks for the guest's counter in private memory would fill pages that are missing.
            &[Memory::SharedFile]
        } else if self.is_qemu() {
            &[Memory::Private, Memory::SharedFile]
        } else {
            &[Memory::SharedFile]
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ferry => f.write_str("ferry"),
            Self::FerryOver { lanes } => write!(f, "ferry:{lanes}"),
            Self::FerryPostcopy => f.write_str("ferry:postcopy"),
            Self::FerryHybrid => f.write_str("ferry:hybrid"),
            Self::Postcopy => f.write_str("postcopy"),
            Self::Hybrid => f.write_str("hybrid"),
            Self::Precopy => f.write_str("precopy"),
            Self::Multifd {
                channels,
                compression,
            } => {
                let compression = match compression {
                    Compression::None => "",
                    Compression::Zstd => ":zstd",
                };
                write!(f, "multifd:{channels}{compression}")
            }
            Self::Switchover => f.write_str("switchover"),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SharedFile => "shared-file",
            Self::Private => "private",
        })
    }
}

/// A text that names no way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownPeer;

impl fmt::Display for UnknownPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a way to move is ferry[:LANES], ferry:postcopy, ferry:hybrid, precopy, postcopy, hybrid, \
             multifd:CHANNELS[:zstd] or switchover",
        )
    }
}

impl std::error::Error for UnknownPeer {}

impl FromStr for Peer {
    type Err = UnknownPeer;

    fn from_str(text: &str) -> Result<Self, UnknownPeer> {
        let count = |text: &str| match text.parse() {
            Ok(0) | Err(_) => Err(UnknownPeer),
            Ok(count) => Ok(count),
        };
        let words: Vec<&str> = text.split(':').collect();
        match words[..] {
            ["ferry"] => Ok(Self::Ferry),
            ["ferry", "postcopy"] => Ok(Self::FerryPostcopy),
            ["ferry", "hybrid"] => Ok(Self::FerryHybrid),
            ["postcopy"] => Ok(Self::Postcopy),
            ["hybrid"] => Ok(Self::Hybrid),
            ["ferry", lanes] => Ok(Self::FerryOver {
                lanes: count(lanes)?,
            }),
            ["precopy"] => Ok(Self::Precopy),
            ["switchover"] => Ok(Self::Switchover),
            ["multifd", channels] => Ok(Self::Multifd {
                channels: count(channels)?,
                compression: Compression::None,
            }),
            ["multifd", channels, "zstd"] => Ok(Self::Multifd {
                channels: count(channels)?,
                compression: Compression::Zstd,
            }),
            _ => Err(UnknownPeer),
        }
    }
}

impl TryFrom<String> for Peer {
    type Error = UnknownPeer;

    fn try_from(text: String) -> Result<Self, UnknownPeer> {
        text.parse()
    }
}

impl From<Peer> for String {
    fn from(peer: Peer) -> Self {
        peer.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let mut all = Peer::everyone();
        all.push(Peer::Switchover);
        for peer in all {
            assert_eq!(peer.to_string().parse(), Ok(peer));
        }
        for bad in [
            "",
            "ferry:",
            "ferry:0",
            "ferry:999",
            "multifd",
            "multifd:2:lz4",
            "precopy:1",
        ] {
            assert_eq!(bad.parse::<Peer>(), Err(UnknownPeer), "{bad}");
        }
    }
}
