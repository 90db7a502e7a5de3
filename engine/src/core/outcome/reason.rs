//! Why a migration ended otherwise than as moved, and what a peer is told of it.

use std::error::Error as StdError;
use std::io;

use ferry_stream::message::{AbortCode, Message, Round};

use super::{Failure, Phase};
use crate::core::layout::LayoutDifference;
use crate::vmm::VmmError;

/// Why a migration ended otherwise than as moved.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// Somebody asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The link is gone.
    #[error("the link to the peer was lost: {what}")]
    LinkLost {
        /// How that showed.
        what: String,
    },
    /// Whatever was reached did not answer as a target does.
    #[error("no ferry answered there: {what}; is `ferry receive` what listens at that address?")]
    NoFerry {
        /// How that showed.
        what: String,
    },
    /// The peer gave up.
    #[error("the peer gave up ({code:?}): {text}")]
    PeerAborted {
        /// Its code.
        code: AbortCode,
        /// Its words.
        text: String,
    },
    /// The peer said something that must not come now.
    #[error("the peer sent {what}, which must not come while {phase}")]
    Protocol {
        /// What it sent.
        what: &'static str,
        /// What was going on.
        phase: Phase,
    },
    /// The peer's count of pages is not ours.
    #[error("{round}: {ours} pages by our count, {theirs} by the peer's")]
    Miscounted {
        /// The round.
        round: Round,
        /// Our count.
        ours: u64,
        /// Theirs.
        theirs: u64,
    },
    /// No wire version in common.
    #[error("the peer speaks wire versions {lowest} to {highest}, we speak other ones")]
    Version {
        /// Its lowest.
        lowest: u16,
        /// Its highest.
        highest: u16,
    },
    /// Architecture or machine type differ.
    #[error(
        "the source has {ours_or_source}, the target {theirs_or_target}: start the target with the same machine type"
    )]
    Machine {
        /// At the source.
        ours_or_source: String,
        /// At the target.
        theirs_or_target: String,
    },
    /// The RAM layouts differ.
    #[error("RAM differs: {}", list(.0))]
    Layout(Vec<LayoutDifference>),
    /// More than one of these at once, told together.
    #[error("{}", several(.0))]
    Several(Vec<Reason>),
    /// A region list that is no layout.
    #[error("the peer's RAM layout is impossible")]
    BadLayout(#[source] crate::core::layout::LayoutError),
    /// A device, or RAM, was plugged or unplugged during the move.
    #[error("the guest's hardware changed during the move: {what}")]
    InventoryChanged {
        /// What is different.
        what: String,
    },
    /// The guest is gone, or its VMM.
    #[error("the guest is gone: {what}")]
    GuestGone {
        /// How that showed.
        what: String,
    },
    /// Target: the VMM that the guest was to go to is gone.
    #[error("the target's VMM is gone: {what}")]
    TargetGone {
        /// How that showed.
        what: String,
    },
    /// The VMM at the target died with pages missing that the guest was handed over without.
    #[error("the guest is lost: the target's VMM died before all pages had come: {what}")]
    DiedWithoutPages {
        /// How that showed.
        what: String,
    },
    /// The guest turned itself off.
    #[error("the guest shut down during the move")]
    GuestShutDown,
    /// The guest was reset while it was handed over.
    #[error("the guest was reset during the switchover")]
    GuestReset,
    /// The guest panicked.
    #[error("the guest panicked during the move")]
    GuestPanicked,
    /// The VMM paused the guest because of an I/O error.
    #[error("an I/O error of {device:?} paused the guest: mend the disk and resume it")]
    GuestIoError {
        /// The device.
        device: String,
    },
    /// Somebody resumed the guest while it was being handed over.
    #[error("somebody else resumed the guest during the switchover")]
    ForeignResume,
    /// The rounds do not shrink.
    #[error(
        "not converging: stopping now would take {predicted_ms} ms, the limit is {limit_ms} ms \
         (dirty {dirty_bytes_per_s} B/s, link {link_bytes_per_s} B/s{}): raise --max-downtime, \
         use {}--timeout, or move it without --live",
        slowed(*.throttled_percent),
        if .throttled_percent.is_none() { "--auto-converge or " } else { "" }
    )]
    NotConverging {
        /// The blackout that stopping now would cost, in ms.
        predicted_ms: u64,
        /// The limit in ms.
        limit_ms: u64,
        /// What the guest dirties, in bytes a second.
        dirty_bytes_per_s: u64,
        /// What the link carries, in bytes a second.
        link_bytes_per_s: u64,
        /// By how much the guest was slowed, in percent of its time; `None` when that was not asked for.
        throttled_percent: Option<u8>,
    },
    /// The target cannot have a guest without all of its pages.
    #[error(
        "the target cannot do post-copy: `ferry receive` there says why; move the guest by precopy, \
         without --postcopy-now and --postcopy-after-precopy"
    )]
    NoPostcopy,
    /// Something took too long.
    #[error("{phase} took longer than {limit_ms} ms")]
    TimedOut {
        /// What.
        phase: Phase,
        /// The bound in milliseconds.
        limit_ms: u64,
    },
    /// Target: the source asked whose the guest is, and so gave up this attempt.
    #[error("the source asked who owns the guest before it was taken")]
    Asked,
    /// The target, asked, said that it never took the guest.
    #[error("the target did not take the guest")]
    Refused,
    /// The target took the guest and could not resume it.
    #[error("the target could not resume the guest and gave it back: {text}")]
    Returned {
        /// Its words.
        text: String,
    },
    /// An action failed.
    #[error(transparent)]
    Failed(Failure),
}

/// An error with its causes, in one line, none said twice.
pub fn in_full(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

fn slowed(percent: Option<u8>) -> String {
    match percent {
        None | Some(0) => String::new(),
        Some(percent) => format!(", slowed by {percent} %"),
    }
}

fn several(reasons: &[Reason]) -> String {
    let lines: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

fn list(differences: &[LayoutDifference]) -> String {
    let lines: Vec<String> = differences.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

impl Reason {
    /// What a peer is told: it has only these words, so the causes are among them.
    pub fn abort(&self) -> Message {
        Message::Abort {
            code: self.abort_code(),
            text: in_full(self),
        }
    }

    /// Whatever failed because the VMM is gone failed for that reason: its death is also told as an
    /// event, and either may come first.
    pub(crate) fn or_death(self) -> Self {
        let gone = match &self {
            Self::Failed(failure) => failure.source.downcast_ref::<VmmError>(),
            _ => None,
        };
        match gone {
            Some(VmmError::Gone { what }) => Self::GuestGone { what: what.clone() },
            _ => self,
        }
    }

    /// The code that tells a peer.
    fn abort_code(&self) -> AbortCode {
        match self {
            Self::Cancelled => AbortCode::Cancelled,
            Self::Protocol { .. } | Self::Miscounted { .. } | Self::BadLayout(_) => {
                AbortCode::Protocol
            }
            Self::Version { .. } => AbortCode::Version,
            Self::Machine { .. } => AbortCode::Machine,
            Self::Layout(_) | Self::InventoryChanged { .. } => AbortCode::Layout,
            Self::Several(reasons) => {
                let first = reasons.first().map(Self::abort_code);
                first.unwrap_or(AbortCode::Internal)
            }
            Self::GuestGone { .. }
            | Self::TargetGone { .. }
            | Self::DiedWithoutPages { .. }
            | Self::GuestShutDown
            | Self::GuestPanicked => AbortCode::GuestGone,
            Self::TimedOut { .. } => AbortCode::Timeout,
            Self::LinkLost { .. } | Self::PeerAborted { .. } | Self::NoFerry { .. } => {
                AbortCode::Internal
            }
            Self::Failed(failure) => cause_code(&*failure.source),
            _ => AbortCode::Vmm,
        }
    }
}

/// The code of a failure, by whatever caused it in the end.
fn cause_code(failure: &(dyn StdError + 'static)) -> AbortCode {
    let mut cause = Some(failure);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<ferry_stream::Error>() {
            return error.abort_code();
        }
        let full = error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::StorageFull);
        if full {
            return AbortCode::Memory;
        }
        cause = error.source();
    }
    AbortCode::Vmm
}
