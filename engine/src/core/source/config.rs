//! What a source is told beforehand, and how long it waits.

use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::time::Duration;

use ferry_stream::message::{Features, Mode, SessionId};

use super::postcopy::Postcopy;
use crate::core::growth::Room;
use crate::core::throttle::Throttling;
use crate::vmm::RunState;

/// What a source is told beforehand.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Names the migration.
    pub session: SessionId,
    /// Whether the guest runs while it is copied.
    pub mode: Mode,
    /// In which state the target leaves it: `None` for the state that it has here.
    pub run_at_target: Option<RunState>,
    /// The longest blackout that is wanted.
    pub downtime_limit: Duration,
    /// After this time the guest is no longer waited for: see [`SourceConfig::at_timeout`].
    pub timeout: Option<Duration>,
    /// Whether the guest may be handed over before its pages.
    pub postcopy: Postcopy,
    /// What the time-out does.
    pub at_timeout: AtTimeout,
    /// How the guest is slowed when rounds do not shrink; `None` for never.
    pub throttling: Option<Throttling>,
    /// Page lanes to open.
    pub lanes: LanePlan,
    /// What the lanes are able to do with pages, for the target to choose from.
    pub features: Features,
    /// What the VMMs take of a switchover: pause, device state both ways, resume. What the engine takes
    /// is measured.
    pub switchover_floor: Duration,
    /// Bounds on the peer and the VMM.
    pub limits: SourceLimits,
}

/// What becomes of a move that takes too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtTimeout {
    /// The guest is paused, and the move finishes.
    #[default]
    Suspend,
    /// The guest is handed over before its pages.
    Postcopy,
}

/// How many page lanes a source opens. The target may take fewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LanePlan {
    /// So many, no more and no fewer.
    Fixed(NonZeroU16),
    /// At first so many, and more while that pays.
    Grow {
        /// To begin with.
        first: NonZeroU16,
        /// How far.
        room: Room,
    },
}

/// Lanes to begin with where there are cores: with two, one reads and copies while the other's bytes
/// are on their way. Measured on 2 cores over loopback, a guest with 1 GiB of data: 862 ms over one
/// lane, 642 ms over two.
const FIRST_LANES: RangeInclusive<u16> = 2..=8;

/// Lanes that growth ends at.
const GROWN_LANES: NonZeroU16 = NonZeroU16::new(16).expect("sixteen is not zero");

impl LanePlan {
    /// What is sensible on a host with so many cores: half of them to begin with, the others being the
    /// guest's, and more where the link is good for them.
    pub fn for_cores(cores: NonZeroU16) -> Self {
        let (least, most) = FIRST_LANES.into_inner();
        let first = (cores.get() / 2).clamp(least, most);
        Self::Grow {
            first: NonZeroU16::new(first).unwrap_or(NonZeroU16::MIN),
            room: Room {
                most: GROWN_LANES,
                cores,
            },
        }
    }

    /// To begin with.
    pub fn first(self) -> NonZeroU16 {
        match self {
            Self::Fixed(lanes) | Self::Grow { first: lanes, .. } => lanes,
        }
    }

    /// The most at one time.
    pub fn most(self) -> NonZeroU16 {
        match self {
            Self::Fixed(lanes) => lanes,
            Self::Grow { first, room } => room.most.max(first),
        }
    }
}

/// How long the source waits for others. A peer that is alive is never cut off while pages move; a
/// dead one is found by the driver's heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceLimits {
    /// For the target's welcome.
    pub greeting: Duration,
    /// For the target to blank its RAM, and for the page lanes to stand.
    pub preparing: Duration,
    /// For a flush of the disk images, before the guest is stopped without it.
    pub flushing: Duration,
    /// For the guest to stop.
    pub stopping: Duration,
    /// For pages that stand still, and for the device state to be saved.
    pub draining: Duration,
    /// For pages that stand still while a guest that was copied live is handed over: it would stand for a
    /// dead link.
    pub standing: Duration,
    /// For the target to load.
    pub offering: Duration,
    /// For the target's word that it runs, before it is asked.
    pub given: Duration,
    /// For asking the target, before a person has to.
    pub asking: Duration,
    /// Between two attempts to ask.
    pub ask_again: Duration,
    /// Before a lane that died is opened again; doubled each time that it dies, up to a bound.
    pub redial: Duration,
    /// How long a rate is measured before another lane is opened.
    pub growing: Duration,
    /// For the peer's word on the control lane, when every page lane has ended without one.
    pub last_word: Duration,
    /// For which nothing is cleaned up once the guest runs at the target. Where both are one host, the
    /// guest would have to share its first moments with the end of tracking, of lanes and of a VMM.
    pub settling: Duration,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            greeting: Duration::from_secs(10),
            preparing: Duration::from_secs(300),
            flushing: Duration::from_secs(60),
            stopping: Duration::from_secs(30),
            draining: Duration::from_secs(60),
            standing: Duration::from_secs(5),
            offering: Duration::from_secs(60),
            given: Duration::from_secs(15),
            asking: Duration::from_secs(60),
            ask_again: Duration::from_millis(250),
            redial: Duration::from_millis(50),
            growing: Duration::from_millis(300),
            last_word: Duration::from_millis(100),
            settling: Duration::from_millis(100),
        }
    }
}
